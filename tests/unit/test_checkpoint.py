"""The checkpoint package on its own, as another program would use it."""

import json

import pytest
import torch
import torch.distributed as dist
from support import fork
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError
from shardwright.checkpoint.box import Box
from shardwright.parallel.world import World


class State:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = state


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
    (file,) = (tmp_path / "c").glob("*.safetensors")
    loaded = load_file(file)
    assert torch.equal(loaded["model.weight"], model.weight)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["tensors"]["model.weight"]["shape"] == [2, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(a=torch.zeros(4), b=torch.zeros(2), n=0), "no tensor p.b"),
        (dict(a=torch.zeros(5), n=0), r"p.a as float32 \[4\], this run as float32 \[5\]"),
        (dict(a=torch.zeros(4).double(), n=0), r"this run as float64 \[4\]"),
        (dict(a=torch.zeros(4), m=0), "no value p.m"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, words):
    checkpoint.save(tmp_path / "c", {"p": State(a=torch.ones(4), n=1)})
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(tmp_path / "c", {"p": State(**change)})


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
