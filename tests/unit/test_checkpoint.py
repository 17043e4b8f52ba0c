"""The checkpoint package on its own, as another program would use it."""

import pytest
import torch
import torch.distributed as dist
from support import fork
from support_saves import CHUNK, NO_SPACE, at, load_seed, own_part, shrink
from support_saves import Part as State
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, SaveOptions, files, job, manifest
from shardwright.checkpoint.box import Box
from shardwright.parallel.world import World


def test_boxes():
    a, b = Box((0, 2), (4, 4)), Box((2, 0), (4, 3))
    common = a.intersect(b)
    assert common == Box((2, 2), (2, 1))
    assert common.within(a) == (slice(2, 4), slice(0, 1)) and common.within(b) == (slice(0, 2), slice(2, 3))
    assert a.intersect(Box((4, 0), (1, 9))) is None
    assert Box((), ()).intersect(Box((), ())) == Box((), ()) and Box((), ()).numel == 1


DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def test_every_dtype_and_shape_round_trips(tmp_path):
    torch.manual_seed(0)
    tensors = {
        f"{dtype}/{i}": (torch.randn(shape) * 50).to(dtype)
        for dtype in DTYPES
        for i, shape in enumerate([(), (3,), (2, 5), (0, 4), (2, 1, 3)])
    }
    tensors["transposed"] = torch.randn(4, 6).T
    checkpoint.save(tmp_path / "c", {"a": State(**tensors, note={"x": [1, None, "y"]}, n=3)})
    empty = State(**{n: torch.zeros_like(t) for n, t in tensors.items()}, note=None, n=0)
    checkpoint.load(tmp_path / "c", {"a": empty})
    assert empty.state["note"] == {"x": [1, None, "y"]} and empty.state["n"] == 3
    for name, tensor in tensors.items():
        assert torch.equal(empty.state[name], tensor), name


def test_files_are_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    model = nn.Linear(3, 2)
    checkpoint.save(tmp_path / "c", {"model": model})
    (file,) = (file for file in (tmp_path / "c").glob("*.safetensors") if file.name != manifest.NAME)
    loaded = load_file(file)
    assert torch.equal(loaded["model.weight"], model.weight)
    assert load_file(tmp_path / "c" / manifest.NAME)["box.sizes"].tolist() == [[2, 1], [2, 3]]
    assert checkpoint.open(tmp_path / "c").tensors["model.weight"].shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(a=torch.zeros(4), b=torch.zeros(2), n=0), "no tensor p.b"),
        (dict(a=torch.zeros(5), n=0), r"p.a as float32 \[4\], this program as float32 \[5\]"),
        (dict(a=torch.zeros(4, 1), n=0), r"this program as float32 \[4, 1\]"),
        (dict(a=torch.zeros(4).long(), n=0), r"p.a as float32 \[4\], this program as int64 \[4\]"),
        (dict(i=torch.zeros(4), n=0), r"p.i as int64 \[4\], this program as float32 \[4\]"),
        (dict(i=torch.zeros(4).int(), n=0), r"p.i as int64 \[4\], this program as int32 \[4\]"),
        (dict(i=torch.zeros(4).bool(), n=0), r"this program as bool \[4\]"),
        (dict(a=torch.zeros(4), m=0), "no value p.m"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, words):
    checkpoint.save(tmp_path / "c", {"p": State(a=torch.ones(4), i=torch.arange(4), n=1)})
    before = {name: leaf.clone() for name, leaf in change.items() if isinstance(leaf, torch.Tensor)}
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(tmp_path / "c", {"p": State(**change)})
    if "value" not in words:  # tensors are compared before any is filled
        assert all(torch.equal(change[name], tensor) for name, tensor in before.items())


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("saved", FLOATS, ids=str)
def test_floats_are_cast_to_the_width_that_the_program_has(tmp_path, saved):
    tensor = (torch.randn(300) * 3).to(saved)
    checkpoint.save(tmp_path / "c", {"p": State(a=tensor, s=tensor[0].clone())})
    for wanted in FLOATS:
        part = State(a=torch.zeros(300, dtype=wanted), s=torch.zeros((), dtype=wanted))
        checkpoint.load(tmp_path / "c", {"p": part})
        assert part.state["a"].dtype == part.state["s"].dtype == wanted
        assert torch.equal(part.state["a"].float(), tensor.to(wanted).float())
        assert part.state["s"].float() == tensor[0].to(wanted).float()


def test_saving_again_replaces_whole(tmp_path):
    for n in (1, 2):
        checkpoint.save(tmp_path / "c", {"p": State(a=torch.full((4,), float(n)))})
    assert len(list((tmp_path / "c").iterdir())) == 2
    part = State(a=torch.zeros(4))
    checkpoint.load(tmp_path / "c", {"p": part})
    assert part.state["a"].tolist() == [2] * 4


def start():
    World.from_environment("cpu").start()


GLOBAL = {"w": torch.arange(77.0).reshape(11, 7), "v": torch.arange(5.0), "s": torch.tensor(4.0)}
LAYOUTS = {
    1: [((1,), {"w": [Replicate()], "v": [Replicate()]})],
    2: [((2,), {"w": [Shard(1)], "v": [Shard(0)]}), ((2,), {"w": [Shard(0)], "v": [Replicate()]})],
    3: [((3,), {"w": [Shard(0)], "v": [Shard(0)]})],
    4: [
        ((2, 2), {"w": [Shard(0), Shard(1)], "v": [Replicate(), Shard(0)]}),
        ((2, 2), {"w": [Replicate(), Shard(0)], "v": [Shard(0), Shard(0)]}),
        ((4,), {"w": [Shard(1)], "v": [Shard(0)]}),
    ],
}  # fmt: skip


def distributed(layout, filled):
    shape, placements = layout
    mesh = init_device_mesh("cpu", shape)
    source = {n: t if filled else torch.full_like(t, -1) for n, t in GLOBAL.items()}
    tensors = {n: distribute_tensor(source[n].clone(), mesh, p) for n, p in placements.items()}
    return State(**tensors, s=source["s"].clone())


def save_all(folder, processes):
    start()
    for number, layout in enumerate(LAYOUTS[processes]):
        checkpoint.save(folder / f"{processes}-{number}", {"p": distributed(layout, filled=True)})
    dist.destroy_process_group()


def load_all(folder):
    start()
    for path in sorted(folder.iterdir()):
        for layout in LAYOUTS[dist.get_world_size()]:
            part = distributed(layout, filled=False)
            checkpoint.load(path, {"p": part})
            for name, expected in GLOBAL.items():
                value = part.state[name]
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                assert torch.equal(whole, expected), f"{path.name} at {layout}: {name}"
    dist.destroy_process_group()


def test_any_layout_loads_at_any_other(tmp_path):
    for processes in LAYOUTS:
        fork(processes, save_all, tmp_path, processes)
    assert len(list(tmp_path.iterdir())) == 7
    for processes in LAYOUTS:
        fork(processes, load_all, tmp_path)


def fsdp_and_plain(path):
    """In a program that uses nothing else of ours: FSDP2 saves, a plain module loads."""
    start()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    sharded = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    checkpoint.save(path, {"model": sharded})
    other = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    checkpoint.load(path, {"model": other})
    dist.destroy_process_group()
    return [torch.equal(a, b) for a, b in zip(other.parameters(), plain.parameters(), strict=True)]


def test_fsdp2_saves_what_a_plain_module_loads(tmp_path):
    assert fork(2, fsdp_and_plain, tmp_path / "c") == [[True] * 4] * 2


def num_files(path):
    return len([file for file in path.iterdir() if file.name != manifest.NAME])


def test_a_plan_is_kept_while_the_tensors_stay_what_they_are(tmp_path):
    options = SaveOptions(timeout_seconds=77)  # a saver of its own
    part = State(a=torch.ones(30, 2), b=torch.ones(3), note="x")

    def save(name, **changes):
        part.state |= changes
        pending = checkpoint.save(tmp_path / name, {"p": part}, options=options)
        loaded = State(
            **{n: torch.zeros_like(t) if isinstance(t, torch.Tensor) else None for n, t in part.state.items()}
        )
        checkpoint.load(tmp_path / name, {"p": loaded})
        for key, value in part.state.items():
            same = (
                torch.equal(loaded.state[key], value) if isinstance(value, torch.Tensor) else loaded.state[key] == value
            )
            assert same, f"{name}: {key}"
        assert pending.num_bytes == sum(checkpoint.open(tmp_path / name).manifest.files.values())
        return pending.plan_reused

    assert not save("first")
    assert save("values", a=torch.zeros(30, 2), note="another")
    assert not save("shape", a=torch.ones(31, 2))
    assert save("shape again")
    assert not save("dtype", b=torch.ones(3, dtype=torch.int32))
    assert not save("name", c=torch.ones(3))
    with at(("before", "write data", 1), NO_SPACE), pytest.raises(CheckpointError, match="No space left"):
        save("failed")
    assert not save("after")
    assert save("and again")
    assert not checkpoint.save(tmp_path / "x", {"p": part}, options=SaveOptions(cache=False)).plan_reused
    assert not checkpoint.save(tmp_path / "x", {"p": part}, options=SaveOptions(cache=False)).plan_reused


def replan(path):
    """One of two processes changes what it holds."""
    start()
    answers = []
    for length in (4, 4, 5, 5):
        rank = dist.get_rank()
        part = State(common=torch.ones(3), **{f"of_{rank}": torch.full((length if rank else 4,), rank + 1.0)})
        answers.append(checkpoint.save(path, {"p": part}).plan_reused)
        both = State(common=torch.zeros(3), of_0=torch.zeros(4), of_1=torch.zeros(length))
        checkpoint.load(path, {"p": both})
        assert both.state["common"].tolist() == [1] * 3
        assert both.state["of_0"].tolist() == [1] * 4 and both.state["of_1"].tolist() == [2] * length
    dist.destroy_process_group()
    return answers


def test_all_plan_again_when_one_must(tmp_path):
    assert fork(2, replan, tmp_path / "c") == [[False, True, False, True]] * 2


@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("mode", ["sync", "async", "overlap"])
def test_a_state_larger_than_the_memory_for_copies_goes_through_two_buffers(tmp_path, monkeypatch, mode, pipeline):
    shrink(monkeypatch)
    made = []
    monkeypatch.setattr(
        job, "make_buffer", lambda *args, **kwargs: made.append(args) or files.make_buffer(*args, **kwargs)
    )
    options = SaveOptions(memory_gib=CHUNK / 2**30, pipeline=pipeline)
    for seed in (1, 2):
        pending = checkpoint.save(tmp_path / "c", {"part": own_part(seed)}, mode=mode, options=options)
        pending.wait()
        assert load_seed(tmp_path / "c") == seed
    assert len(made) == 2 and pending.num_bytes > 3 * CHUNK
    assert 0 < pending.staged_seconds <= pending.total_seconds


def test_without_pipeline_and_with_memory_all_is_copied_before_anything_is_written(tmp_path, monkeypatch):
    shrink(monkeypatch)
    options, copied = SaveOptions(pipeline=False), []
    fill = files.FileLayout.fill
    monkeypatch.setattr(files.FileLayout, "fill", lambda *args: copied.append(args[1]) or fill(*args))
    with at(("before", "write data", 1), lambda: copied.append("write")):
        checkpoint.save(tmp_path / "c", {"part": own_part(1)}, mode="async", options=options).wait()
    assert copied == [*range(len(copied) - 1), "write"] and len(copied) > 3


@pytest.mark.parametrize("mode", ["async", "overlap"])
def test_what_goes_wrong_behind_shows_in_wait(tmp_path, mode):
    with at(("before", "write data", 1), NO_SPACE):
        pending = checkpoint.save(tmp_path / "c", {"part": own_part(1)}, mode=mode)
        pending.wait_staged()
        for _ in range(2):
            with pytest.raises(CheckpointError, match="No space left"):
                pending.wait()
    assert pending.done() and num_files(tmp_path / "c") == 0
    assert checkpoint.save(tmp_path / "c", {"part": own_part(1)}, mode=mode).wait() is None
    assert load_seed(tmp_path / "c") == 1


def test_a_bug_in_the_threads_is_an_error_not_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "make_manifest", lambda *args: 1 / 0)
    with pytest.raises(CheckpointError, match=r"ZeroDivisionError.*this is a bug"):
        checkpoint.save(tmp_path / "c", {"part": own_part(1)}, options=SaveOptions(cache=False))


def test_boxes_that_do_not_make_up_their_tensor_are_not_saved(tmp_path):
    with (
        pytest.raises(CheckpointError, match="boxes do not make up their tensor"),
        checkpoint.create(tmp_path / "c") as writer,
    ):
        for _ in range(2):  # the second should be elsewhere
            writer.add("a", torch.ones(2), shape=(4,), offsets=(0,))
    part = State(a=checkpoint.FlatSlice((4,), 0, torch.ones(3)))
    with pytest.raises(CheckpointError, match="boxes do not make up their tensor"):
        checkpoint.save(tmp_path / "c", {"p": part})
    assert list((tmp_path / "c").iterdir()) == []


def test_what_is_kept_and_what_goes(tmp_path):
    for step in (10, 20, 25, 30, 40):
        checkpoint.save(checkpoint.step_folder(tmp_path, step), {"part": own_part(1)})
    (tmp_path / "step_00000025" / manifest.NAME).unlink()  # a save that did not end
    (tmp_path / "step_00000050").mkdir()
    (tmp_path / "step_00000050" / "00000-00000-abc.safetensors").write_bytes(b"half")
    (tmp_path / "step_00000040" / "00000-00000-abc.safetensors").write_bytes(b"of a save before this one")
    (tmp_path / "step_x").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    names = [path.rpartition("_")[2] for path in checkpoint.find_complete(tmp_path)]
    assert names == ["00000040", "00000030", "00000020", "00000010"]
    checkpoint.retain(tmp_path, keep=2, keep_every_steps=20)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["notes.txt", "step_00000020", "step_00000030", "step_00000040", "step_x"]
    assert num_files(tmp_path / "step_00000040") == 1 and load_seed(tmp_path / "step_00000040") == 1
    (tmp_path / "step_00000040" / manifest.NAME).write_bytes(b"damaged")
    checkpoint.retain(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step_00000040", "step_x"]
