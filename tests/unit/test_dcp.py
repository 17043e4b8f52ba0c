"""Checkpoints of torch.distributed.checkpoint: real ones both ways, and those of an enemy."""

import io
import os
import pickle
import random
import warnings
import zipfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import fork
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardwright.checkpoint import archive
from shardwright.checkpoint.errors import CheckpointError, DamagedError
from shardwright.checkpoint.interop import dcp as interop
from shardwright.checkpoint.interop import dcp_files, safe_pickle
from shardwright.checkpoint.interop.dcp import export_to_dcp, import_from_dcp
from shardwright.parallel.world import World

FORMS = ["nested", "flat", "app", "titan"]


class Small(nn.Module):
    """A model with all that a state can have: matrices, biases, a buffer, and a parameter that is not trained."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.arange(4.0), requires_grad=False)
        self.register_buffer("count", torch.tensor(3))


def make(num_groups, seed):
    """A sharded model and its optimizer: FSDP2, within tensor parallel pairs if there are 4 processes."""
    torch.manual_seed(seed)
    model = Small()
    if dist.get_world_size() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        parallelize_module(model, mesh["tensor"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
        fully_shard(model, mesh=mesh["shard"])
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, rest = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [trained] if num_groups == 1 else [decayed, rest]
    decays = [0.1, 0.0]
    groups = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=False)]
    return model, torch.optim.AdamW(groups, lr=3e-4)


def whole(model, optimizer):
    """All tensors under the names that they have here, gathered."""
    tensors = {f"model.{name}": t for name, t in get_model_state_dict(model).items()}
    for name, state in get_optimizer_state_dict(model, optimizer)["state"].items():
        tensors |= {f"optimizer.moments.{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


class App:
    def __init__(self, model, optimizer):
        self.state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        raise NotImplementedError


def save_real(folder):
    """Train two steps and save in all forms; return all tensors."""
    World.from_environment("cpu").start()
    model, optimizer = make(num_groups=2, seed=0)
    for step in range(2):
        for index, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.grad = torch.sin(p.detach() * 9 + index + step)
        optimizer.step()
    weights, moments = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    train = {"step": torch.tensor(2), "tokens": 77, "betas": (0.9, [None, "x"])}
    dcp.save({"model": weights, "optimizer": moments, "train": train}, checkpoint_id=folder / "nested")
    dcp.save({"model": weights, "optimizer": flat}, checkpoint_id=folder / "flat")
    dcp.save({"app": App(model, optimizer), "epoch": 5}, checkpoint_id=folder / "app")
    dcp.save({**weights, "optimizer": flat, "loader": {"0": pickle.dumps(1)}}, checkpoint_id=folder / "titan")
    tensors = whole(model, optimizer)
    dist.destroy_process_group()
    return tensors


def load_real(folder, num_groups):
    """Load with torch, as its documentation says; return all tensors, steps and groups."""
    World.from_environment("cpu").start()
    model, optimizer = make(num_groups, seed=1)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    steps = {int(s["step"]) for s in optimizer.state.values()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    tensors = whole(model, optimizer)
    dist.destroy_process_group()
    return tensors, steps, groups


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


def read_all(path):
    opened = archive.open(path)
    return {name: opened.read(name) for name in opened.tensors}, opened.values


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with DCP checkpoints of two processes in all forms, one of ours from each, and the tensors."""
    folder = tmp_path_factory.mktemp("dcp")
    expected = fork(2, save_real, folder)[0]
    for form in FORMS:
        import_from_dcp(folder / form, folder / f"our_{form}")
    return folder, expected


@pytest.mark.parametrize("form", FORMS)
def test_a_real_checkpoint_is_imported_bit_by_bit(real, form):
    folder, expected = real
    tensors, values = read_all(folder / f"our_{form}")
    more = {"train.step": torch.tensor(2)} if form == "nested" else {}
    assert_equal(tensors, {**expected, **more})
    first, second = values.pop("optimizer.param_groups")
    assert (first["weight_decay"], second["weight_decay"], first["betas"]) == (0.1, 0.0, [0.9, 0.999])
    assert (set(first["params"]), set(second["params"])) == ({"a.weight", "b.weight"}, {"a.bias", "b.bias"})
    assert values.pop("optimizer.num_updates") == 2
    rest = {"nested": {"train.tokens": 77, "train.betas": [0.9, [None, "x"]]}, "app": {"epoch": 5}}
    assert values == rest.get(form, {})


def test_tensor_parallel_shards_are_imported_bit_by_bit(tmp_path):
    expected = fork(4, save_real, tmp_path)[0]
    import_from_dcp(tmp_path / "flat", tmp_path / "ours")
    assert_equal(read_all(tmp_path / "ours")[0], expected)


@pytest.mark.parametrize("num_processes", [1, 3])
def test_torch_loads_what_is_exported_at_another_layout(real, tmp_path, monkeypatch, num_processes):
    folder, expected = real
    monkeypatch.setattr(interop, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(interop, "_FILE_BYTES", 200)
    export_to_dcp(folder / "our_nested", tmp_path / "dcp")
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) > 2
    for tensors, steps, groups in fork(num_processes, load_real, tmp_path / "dcp", 2):
        assert_equal(tensors, expected)
        assert steps == {2} and [group["weight_decay"] for group in groups] == [0.1, 0.0]
    import_from_dcp(tmp_path / "dcp", tmp_path / "again")
    before, after = read_all(folder / "our_nested"), read_all(tmp_path / "again")
    assert_equal(after[0], before[0])
    assert after[1] == before[1]


@pytest.mark.parametrize("num_groups", [1, 2])
def test_torch_loads_a_run_of_ours(real, tmp_path, num_groups):
    """Which has no groups, but a config."""
    _, expected = real
    optim = {"peak_lr": 0.02, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.3}
    values = {"optimizer.num_updates": 9, "progress.step": 4, "progress.config": {"optim": optim, "x": [1]}}
    with archive.create(tmp_path / "ours") as writer:
        for name, tensor in expected.items():
            writer.add(name, tensor)
        writer.values.update(values)
    export_to_dcp(tmp_path / "ours", tmp_path / "dcp")
    tensors, steps, groups = fork(1, load_real, tmp_path / "dcp", num_groups)[0]
    assert_equal(tensors, expected)
    assert steps == {9} and [group["weight_decay"] for group in groups] == [0.3, 0.0][:num_groups]
    assert all((group["lr"], tuple(group["betas"]), group["eps"]) == (0.02, (0.8, 0.9), 1e-6) for group in groups)
    import_from_dcp(tmp_path / "dcp", tmp_path / "again")
    again = read_all(tmp_path / "again")[1]
    assert {name: again[name] for name in values} == values


def test_an_export_that_fails_leaves_nothing(tmp_path):
    with archive.create(tmp_path / "ours") as writer:
        writer.add("model.w", torch.ones(5000))
    with pytest.raises(CheckpointError, match=r"ours exists and is not empty; give a new folder"):
        export_to_dcp(tmp_path / "ours", tmp_path / "ours")
    (file,) = (tmp_path / "ours").glob("0*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError):
        export_to_dcp(tmp_path / "ours", tmp_path / "dcp")
    assert not (tmp_path / "dcp").exists()


def test_what_has_no_place_here_is_refused(tmp_path):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    states = {
        "numbered": {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        "uneven": {
            "model": model.state_dict(),
            "optimizer": {"state": {"weight": {"step": torch.tensor(2.0)}, "bias": {"step": torch.tensor(3.0)}}},
        },
        "wordy": {"model": {"w": torch.ones(1)}, "optimizer": {"state": {"w": {"step": "two"}}}},
        "complex": {"model": {"w": torch.ones(2, dtype=torch.complex64)}},
        "twice": {"app": {"model": model.state_dict()}, "ema": {"model": model.state_dict()}},
    }
    words = {
        "numbered": r"optimizer.state.0.step is of no tensor of the model; .* skip the entries of the optimizer",
        "uneven": "bias.step is 3.0 and optimizer.state.weight.step is 2.0",
        "wordy": "optimizer.state.w.step is no whole number of updates",
        "complex": "model.w is of dtype torch.complex64",
        "twice": "ema.model.weight and app.model.weight would both be model.weight",
    }
    for name, state in states.items():
        save(tmp_path / name, state)
        with pytest.raises(CheckpointError, match=words[name]):
            import_from_dcp(tmp_path / name, tmp_path / f"our_{name}")
    import_from_dcp(tmp_path / "numbered", tmp_path / "ours", skip=["optimizer.*"])
    assert_equal(read_all(tmp_path / "ours")[0], {f"model.{n}": t for n, t in model.state_dict().items()})
    with pytest.raises(CheckpointError, match="is the source folder"):
        import_from_dcp(tmp_path / "numbered", tmp_path / "numbered")


def test_empty_tensors_and_shards_survive(tmp_path):
    state = {"none": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "flag": torch.tensor([True, False])}
    save(tmp_path / "dcp", {"model": state})
    import_from_dcp(tmp_path / "dcp", tmp_path / "ours")
    export_to_dcp(tmp_path / "ours", tmp_path / "back")
    import_from_dcp(tmp_path / "back", tmp_path / "again")
    assert_equal(read_all(tmp_path / "again")[0], {f"model.{n}": t for n, t in state.items()})


# Hostile checkpoints.


def save(folder, state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)


class Evil:
    """Unpickling one makes a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


W = MetadataIndex("model.w", torch.Size([0, 0]), 0)


class Case:
    """A DCP checkpoint of one tensor and a number, to be spoiled."""

    def __init__(self, folder):
        self.path, self.mark, self.target = folder / "dcp", folder / "mark", folder / "ours"
        save(self.path, {"model": {"w": torch.arange(12.0).view(4, 3)}, "step": 3})
        self.metadata = pickle.loads((self.path / ".metadata").read_bytes())
        self.file = self.path / "__0_0.distcp"

    @property
    def tensor(self):
        return self.metadata.state_dict_metadata["model.w"]

    def place(self, index, data, name="__1_0.distcp"):
        """Put other bytes in the place of an entry."""
        (self.path / name).write_bytes(data)
        self.metadata.storage_data[index] = _StorageInfo(name, 0, len(data))

    def chunks(self, *boxes):
        """Say that the tensor is made of other boxes, all of them the one that is there."""
        info = self.metadata.storage_data.pop(W)
        self.tensor.chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
        for offsets, _ in boxes:
            self.metadata.storage_data[MetadataIndex("model.w", torch.Size(offsets))] = info

    def raw(self, data):
        """Give `.metadata` these bytes."""
        self.metadata = data

    def write(self):
        data = self.metadata if isinstance(self.metadata, bytes) else pickle.dumps(self.metadata)
        if (self.path / ".metadata").is_file():
            (self.path / ".metadata").write_bytes(data)


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def deflated(data):
    """The same zip file, compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return stream.getvalue()


def global_of(module, name):
    parts = [pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, name)]
    return b"".join(parts) + pickle.STACK_GLOBAL


METADATA = "torch.distributed.checkpoint.metadata"
HEAD = pickle.PROTO + b"\x04"


def escape(case):
    outside = case.path.parent / "outside.distcp"
    outside.write_bytes(case.file.read_bytes())
    case.metadata.storage_data[W].relative_path = "../outside.distcp"


def bend(case):
    """A pickle that would set an attribute of a class of torch's."""
    state = pickle.NONE + pickle.EMPTY_DICT + pickle.SHORT_BINUNICODE + b"\x07version" + pickle.NEWTRUE + pickle.SETITEM
    case.raw(HEAD + global_of(METADATA, "Metadata") + state + pickle.TUPLE2 + pickle.BUILD + pickle.STOP)


def fifo(case, name):
    (case.path / name).unlink()
    os.mkfifo(case.path / name)


def hostile_in_place(case):
    """An evil tensor that claims the right length."""
    info = case.metadata.storage_data[W]
    data = saved(Evil(case.mark))
    whole_file = bytearray(case.file.read_bytes())
    whole_file[info.offset : info.offset + len(data)] = data
    info.length = len(data)
    case.file.write_bytes(whole_file)


HOSTILE = {
    "metadata": (lambda c: c.raw(pickle.dumps(Evil(c.mark))), "names posix.mkdir"),
    "metadata deep inside": (lambda c: setattr(c.metadata, "planner_data", {"x": Evil(c.mark)}), "names posix.mkdir"),
    "dotted name": (lambda c: c.raw(HEAD + global_of(METADATA, "os.system") + b"."), f"names {METADATA}.os.system"),
    "attribute of a class": (bend, "what is no record"),
    "memo of 32 GiB": (lambda c: c.raw(HEAD + b"N" + pickle.LONG_BINPUT + b"\xff" * 4 + pickle.STOP), "no metadata"),
    "deep key": (lambda c: c.raw(HEAD + b"})" + pickle.TUPLE1 * 10**5 + b"Ns."), "a key of a dict is a tuple"),
    "deep name": (
        lambda c: setattr(c.metadata, "storage_data", {MetadataIndex(((),)): c.metadata.storage_data[W]}),
        "an entry has no name",
    ),
    "no pickle": (lambda c: c.raw(b"nothing"), "is refused"),
    "empty": (lambda c: c.raw(b""), "is refused"),
    "another object": (lambda c: c.raw(pickle.dumps([1])), "holds no metadata"),
    "no storage": (lambda c: setattr(c.metadata, "storage_data", None), "malformed"),
    "byte entry": (lambda c: c.place(MetadataIndex("step"), saved(Evil(c.mark))), "step is refused: 'it names posix.mkdir'; skip that entry"),
    "tensor entry": (lambda c: c.place(W, saved(Evil(c.mark))), "model.w is refused: 'it names posix.mkdir'"),
    "tensor entry in place": (hostile_in_place, "model.w is refused: 'it names posix.mkdir'"),
    "legacy tensor entry": (lambda c: c.place(W, pickle.dumps(Evil(c.mark)) + bytes(99)), "model.w is refused"),
    "compressed entry": (lambda c: c.place(W, deflated(saved(torch.zeros(4, 3)))), "unpack to more bytes"),
    "other shape": (lambda c: c.place(W, saved(torch.zeros(3, 4))), r"is not the torch.float32 \[4, 3\]"),
    "other dtype": (lambda c: c.place(W, saved(torch.zeros(4, 3).double())), "is not the torch.float32"),
    "no tensor": (lambda c: c.place(W, saved([1] * 20)), "is not the torch.float32"),
    "path escape": (escape, "lies outside of the folder"),
    "absolute path": (lambda c: setattr(c.metadata.storage_data[W], "relative_path", str(c.file)), "lies outside of"),
    "missing file": (lambda c: c.file.unlink(), "cannot be read"),
    "truncated file": (lambda c: os.truncate(c.file, c.file.stat().st_size - 1), "the file is damaged"),
    "truncated entry": (lambda c: setattr(c.metadata.storage_data[W], "length", 400), "model.w is refused"),
    "file is a pipe": (lambda c: fifo(c, "__0_0.distcp"), "is no file"),
    "metadata is a pipe": (lambda c: fifo(c, ".metadata"), "is no file of up to"),
    "negative offset": (lambda c: setattr(c.metadata.storage_data[W], "offset", -1), "size or offset is negative"),
    "offset past the end": (lambda c: setattr(c.metadata.storage_data[W], "offset", 10**6), "the file is damaged"),
    "offset of 10^99": (lambda c: setattr(c.metadata.storage_data[W], "offset", 10**99), "size or offset is negative"),
    "absurd shape": (
        lambda c: (setattr(c.tensor, "size", torch.Size([2**40, 3])), c.chunks(([0, 0], [2**40, 3]))),
        "a chunk of model.w is larger than its bytes",
    ),
    "absurd stored shape": (lambda c: c.place(W, saved(torch.ones(1).expand(2**40))), "is not the torch.float32"),
    "too many dims": (lambda c: setattr(c.tensor, "size", torch.Size([1] * 17)), "too many dims"),
    "chunk outside": (lambda c: c.chunks(([1, 0], [4, 3])), "reaches out of it"),
    "hole": (lambda c: c.chunks(([0, 0], [3, 3])), "do not make it up"),
    "overlap": (lambda c: c.chunks(([0, 0], [2, 3]), ([1, 0], [2, 3])), "overlap"),
    "the same bytes twice": (lambda c: c.chunks(([0, 0], [2, 3]), ([2, 0], [2, 3])), "lies over another entry"),
    "no chunks": (lambda c: setattr(c.tensor, "chunks", []), "has no chunks"),
    "path elsewhere": (lambda c: c.metadata.planner_data.update({"model.w": ("x",)}), "leads elsewhere"),
    "line break in a name": (lambda c: c.metadata.state_dict_metadata.update({"a\nb": c.tensor}), "is no name"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_are_refused(tmp_path, name):
    spoil, words = HOSTILE[name]
    case = Case(tmp_path)
    spoil(case)
    case.write()
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=words):
        import_from_dcp(case.path, case.target)
    assert {path.name for path in tmp_path.iterdir()} - before <= {"ours"}
    assert not case.target.exists() or not list(case.target.iterdir())


def test_the_traps_of_these_tests_are_real(tmp_path):
    """torch itself springs them."""
    case = Case(tmp_path)
    case.place(MetadataIndex("step"), saved(Evil(case.mark)))
    case.write()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": {"w": torch.zeros(4, 3)}, "step": 0}, checkpoint_id=case.path, no_dist=True)
    assert case.mark.exists()


def test_values_that_json_does_not_know_are_left_out(tmp_path, caplog):
    case = Case(tmp_path)
    bomb = []
    for _ in range(64):
        bomb = [bomb, bomb]
    for value in (bomb, b"bytes", {1: 2}, 2**64):
        case.place(MetadataIndex("step"), saved(value))
        case.write()
        caplog.clear()
        import_from_dcp(case.path, case.target)
        assert "step" in caplog.text and not archive.open(case.target).values


def test_nothing_but_refusals_comes_of_random_damage(tmp_path):
    case, rng = Case(tmp_path), random.Random(0)
    refused = 0
    for path in (case.path / ".metadata", case.file):
        sound = path.read_bytes()
        for _ in range(300):
            data = bytearray(sound)
            for _ in range(rng.randint(1, 4)):
                first, last = sorted(rng.choices(range(len(data)), k=2))
                kind = rng.randrange(4)
                if kind == 0:
                    data[first] = rng.randrange(256)
                elif kind == 1:
                    data[first] ^= 1 << rng.randrange(8)
                elif kind == 2:
                    data[first : first + rng.randint(1, 8)] = rng.randbytes(rng.randint(0, 8))
                else:
                    data[first:first] = data[first : min(last, first + 40)]
            path.write_bytes(data)
            try:
                import_from_dcp(case.path, case.target)
            except CheckpointError:
                refused += 1
        path.write_bytes(sound)
    assert refused > 200
    import_from_dcp(case.path, case.target)
    assert torch.equal(archive.open(case.target).read("model.w"), torch.arange(12.0).view(4, 3))


def test_slices_of_files():
    part = safe_pickle.Slice(io.BytesIO(b"0123456789"), 2, 5)
    assert part.read() == b"23456" and part.read(1) == b"" and part.seek(-2, io.SEEK_END) == 3
    assert part.read(99) == b"56" and part.seek(1) == 1 and part.read(2) == b"34" and part.tell() == 3
    with pytest.raises(OSError, match="before the start"):
        part.seek(-1)


@pytest.mark.parametrize(
    ("boxes", "disjoint"),
    [
        ([((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (1, 4))], True),
        ([((0, 0), (2, 2)), ((1, 1), (2, 2))], False),
        ([((0, 0), (4, 1)), ((0, 1), (4, 1)), ((3, 0), (1, 1))], False),
        ([((0, 0), (2, 2)), ((0, 0), (0, 2))], True),
    ],
)
def test_overlaps_are_found(boxes, disjoint):
    assert dcp_files._are_disjoint([dcp_files.Box(*box) for box in boxes]) == disjoint
