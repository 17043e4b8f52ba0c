"""The command that converts checkpoints, as a user types it."""

import random
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from support_checkpoints import assert_same, data_file, flip_bit, refused

from shardwright import checkpoint
from shardwright.checkpoint import Box, CheckpointError, TensorInfo
from shardwright.checkpoint.files import Entry
from shardwright.checkpoint.storage import open_storage
from shardwright.scripts import checkpoints, convert

pytest_plugins = ["support_checkpoints"]


def test_deal_covers_every_tensor_once():
    rng, dtypes = random.Random(3), [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool]
    for _ in range(60):
        shapes = [tuple(rng.choice([0, 1, 2, 3, 5, 9]) for _ in range(rng.randint(0, 3))) for _ in range(12)]
        tensors = {f"t{i}": TensorInfo(rng.choice(dtypes), shape) for i, shape in enumerate(shapes)}
        total, limit = sum(info.num_bytes for info in tensors.values()), rng.choice([8, 17, 64, 300, 10**6])
        files = list(convert.deal(tensors, limit))
        sizes = [sum(entry.num_bytes for entry in entries) for entries in files]
        assert sum(sizes) == total and max(sizes, default=0) <= limit
        assert len(files) == max(-(-total // (limit // 8 * 8)), 1)
        assert all(size == sizes[0] for size in sizes[:-1])
        seen = {name: torch.zeros(info.shape, dtype=torch.int64) for name, info in tensors.items()}
        for entry in (entry for entries in files for entry in entries):
            seen[entry.name][entry.box.within(Box((0,) * len(entry.info.shape), entry.info.shape))] += 1
        assert all((count == 1).all() for count in seen.values())
        assert {entry.name for entries in files for entry in entries} == tensors.keys()


@pytest.mark.parametrize("files", [1, 2, 7])
def test_reshard_to_some_files(use, saved, tmp_path, files):
    done = use(convert, "reshard", saved, tmp_path / "c", "--files", files)
    assert done.status == 0 and done.out.startswith(f"{tmp_path / 'c'}: ")
    archive = checkpoint.open(tmp_path / "c")
    assert len(archive.manifest.files) == files and archive.values == checkpoint.open(saved).values
    assert_same(saved, tmp_path / "c")
    assert use(checkpoints, "verify", tmp_path / "c").status == 0


def test_reshard_to_a_size(use, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "PIECE_BYTES", 1000)
    assert use(convert, "reshard", saved, tmp_path / "c", "--max-file-size", "20 KiB").status == 0
    for file in checkpoint.open(tmp_path / "c").manifest.files:
        with safe_open(tmp_path / "c" / file, framework="pt") as data:
            sizes = [data.get_tensor(key).nbytes for key in data.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20 * 1024 and max(sizes) <= 1000
    assert_same(saved, tmp_path / "c")


def test_reshard_casts_and_drops(use, saved, tmp_path):
    assert use(convert, "reshard", saved, tmp_path / "c", "--dtype", "bf16").status == 0
    cast, source = checkpoint.open(tmp_path / "c"), checkpoint.open(saved)
    assert cast.tensors.keys() == source.tensors.keys()
    for name, info in source.tensors.items():
        x, y = source.read(name), cast.read(name)
        assert torch.equal(y.nan_to_num(), (x.bfloat16() if info.dtype.is_floating_point else x).nan_to_num())
    assert use(convert, "reshard", saved, tmp_path / "d", "--only", "model").status == 0
    weights = checkpoint.open(tmp_path / "d")
    assert weights.tensors.keys() == {name for name in source.tensors if name.startswith("model.")}
    assert weights.values.keys() == source.values.keys() - {"optimizer.num_updates"}
    assert_same(tmp_path / "d", saved)


def test_reshard_in_place(use, own, saved):
    path = own / "checkpoints" / "step_00000004"
    assert "not empty" in refused(use(convert, "reshard", path, path, "--files", 2))
    assert use(convert, "reshard", path, path, "--files", 2, "--overwrite").status == 0
    assert len(list(path.glob("*.safetensors"))) == 3
    assert_same(saved, path)


def test_a_failed_conversion_leaves_what_was_there(use, own, tmp_path):
    old, source = own / "checkpoints" / "step_00000002", own / "checkpoints" / "step_00000004"
    before = sorted(old.iterdir())
    file = flip_bit(data_file(source))
    assert file.name in refused(use(convert, "reshard", source, old, "--overwrite"))
    assert file.name in refused(use(convert, "reshard", source, tmp_path / "new"))
    assert sorted(old.iterdir()) == before and use(checkpoints, "verify", old).status == 0
    assert not list((tmp_path / "new").iterdir())
    assert use(convert, "to-hf", old, tmp_path / "hub").status == 0
    with checkpoint.create(tmp_path / "foreign") as writer:
        writer.add("model.a", torch.zeros(2))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert "progress.config" in refused(use(convert, "to-hf", tmp_path / "foreign", tmp_path / "hub", "--overwrite"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["reshard", "to-hf", "from-hf", "to-dcp", "from-dcp", "from-deepspeed"])
def test_only_its_own_is_overwritten(use, saved, tmp_path, command):
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    assert "is not empty" in refused(use(convert, command, saved, home))
    assert "letter.txt" in refused(use(convert, command, saved, home, "--overwrite"))
    assert [path.name for path in home.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("reshard {empty} {new}", "manifest.safetensors is missing"),
        ("reshard {saved} memory://tools/large --max-file-size 1GB", "ask for smaller"),
        ("reshard {moments} {new} --only model", "no tensor model.*"),
        ("to-hf {empty} {new}", "manifest.safetensors is missing"),
        ("to-hf {saved} memory://tools/hub", "local folders only"),
        ("from-hf {empty} {new}", "config.json is missing"),
        ("from-hf memory://tools/x {new}", "copy it"),
        ("to-dcp {empty} {new}", "manifest.safetensors is missing"),
        ("from-dcp {empty} {new}", ".metadata"),
        ("from-deepspeed {empty} {new}", "_model_states.pt"),
        ("from-deepspeed {broken} {new}", "_states.pt"),
    ],
)
def test_conversions_that_are_refused(use, saved, tmp_path, line, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (tmp_path / "broken" / name).write_bytes(b"no pickle")
    with checkpoint.create(tmp_path / "moments") as writer:
        writer.add("optimizer.a", torch.zeros(2))
    names = {name: tmp_path / name for name in ("empty", "broken", "moments", "new")}
    assert words in refused(use(convert, *line.format(saved=saved, **names).split()))
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("size", ["5XB", "7", "-1GB", "0.1", ""])
def test_sizes_that_are_none(use, saved, tmp_path, size):
    done = use(convert, "reshard", saved, tmp_path / "c", f"--max-file-size={size}")
    assert done.status == 2 and "write it as 512MiB" in done.err


def test_sizes():
    texts = {"512MiB": 2**29, "5GB": 5 * 10**9, "1.5 kB": 1500, "64": 64, "2gi": 2**31, "1TB": 10**12}
    assert {text: convert._size(text) for text in texts} == texts


def weights_of(path):
    return {name for name in checkpoint.open(path).tensors if name.startswith("model.")}


def test_to_the_hub_and_back(use, saved, tmp_path):
    with checkpoint.create(tmp_path / "run") as writer:  # without what the model does not know
        archive = checkpoint.open(saved)
        for name in weights_of(saved):
            writer.add(name, archive.read(name))
        writer.values |= archive.values
    assert use(convert, "to-hf", tmp_path / "run", tmp_path / "hub", "--max-shard-size", "30kB").status == 0
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 1
    assert use(convert, "from-hf", tmp_path / "hub", tmp_path / "back", "--name", "again").status == 0
    assert_same(saved, tmp_path / "back", weights_of(saved))
    assert use(checkpoints, "list", tmp_path / "back").out.count("again") == 1
    assert use(convert, "to-hf", tmp_path / "back", tmp_path / "hub", "--overwrite", "--dtype", "bf16").status == 0
    assert [path.name for path in (tmp_path / "hub").glob("*.safetensors")] == ["model.safetensors"]
    assert use(convert, "from-hf", tmp_path / "hub", tmp_path / "back", "--overwrite").status == 0
    assert {info.dtype for info in checkpoint.open(tmp_path / "back").tensors.values()} == {torch.bfloat16}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hub", "run"]


def test_to_dcp_and_back(use, saved, tmp_path):
    with checkpoint.create(tmp_path / "run") as writer:
        archive = checkpoint.open(saved)
        for name in archive.tensors:
            if not name.startswith("odd."):
                writer.add(name, archive.read(name))
        writer.values |= archive.values
    for more in ([], ["--overwrite"]):
        assert use(convert, "to-dcp", tmp_path / "run", tmp_path / "dcp", *more).status == 0
        assert use(convert, "from-dcp", tmp_path / "dcp", tmp_path / "back", *more).status == 0
    assert_same(tmp_path / "run", tmp_path / "back")
    skipped = use(convert, "from-dcp", tmp_path / "dcp", tmp_path / "some", "--skip", "optimizer.*")
    assert skipped.status == 0 and checkpoint.open(tmp_path / "some").tensors.keys() == weights_of(saved)


def test_progress_follows_the_bytes(tmp_path, monkeypatch, capsys):
    """On a terminal, the bar stands at what is new in the target, or in the hidden folder of an export to the hub."""
    monkeypatch.setattr(convert, "CONSOLE", Console(file=sys.stdout, force_terminal=True, width=100))
    monkeypatch.setattr(convert, "POLL_SECONDS", 0.01)
    target, hidden = tmp_path / "hub", tmp_path / ".hub-0123.part"
    target.mkdir()
    (target / "old").write_bytes(b"x" * 50)
    text, deadline = "", time.monotonic() + 20
    with convert._progress(convert.Job(lambda target: None, 600), open_storage(target)) as written_bytes:
        hidden.mkdir()
        (hidden / "model.safetensors").write_bytes(b"x" * 300)
        while "300/600 bytes" not in text and time.monotonic() < deadline:
            time.sleep(0.02)
            text += capsys.readouterr().out
        (target / "old").unlink()
    assert "300/600 bytes" in text and written_bytes() == 300
    assert "600/600 bytes" in capsys.readouterr().out


def test_an_error_of_ours_is_not_a_refusal(use, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "rewrite", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        use(convert, "reshard", saved, tmp_path / "c")


def test_a_writer_takes_files_of_boxes(tmp_path):
    """`Writer.add_file` loads each box once, and refuses what does not agree."""
    info, loads = TensorInfo(torch.float32, (4, 3)), []
    data = torch.arange(12.0).view(4, 3)

    def load(first):
        loads.append(first)
        return data[first : first + 2]

    with checkpoint.create(tmp_path / "c") as writer:
        for first in (0, 2):
            writer.add_file([(Entry("x", info, Box((first, 0), (2, 3))), lambda first=first: load(first))])
        with pytest.raises(CheckpointError, match="must agree"):
            writer.add_file([(Entry("x", TensorInfo(torch.float32, (4, 4)), Box((0, 0), (1, 3))), lambda: data)])
    assert loads == [0, 2]
    archive = checkpoint.open(tmp_path / "c")
    assert torch.equal(archive.read("x"), data) and len(archive.manifest.files) == 2
    parts = {box.offsets: part.clone() for _, box, part in archive.stream(["x"])}
    assert torch.equal(torch.cat([parts[key] for key in sorted(parts)]), data)
    with pytest.raises(CheckpointError, match="no tensor y"):
        next(archive.stream(["y"]))
