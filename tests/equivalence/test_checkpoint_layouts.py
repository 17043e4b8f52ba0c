"""Saved at any layout or by any program, loaded at any other: every tensor of model and optimizer, bit for bit.

Tensors are filled with numbers that only their name and the global index give, so that no process needs the whole.
"""

import random
import zlib

import pytest
import torch
import torch.distributed as dist
from support import TINY, fork_each, make_engine, spell_out, started_world
from support_deepspeed import save_filled
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardwright import checkpoint
from shardwright.checkpoint.box import pieces_of
from shardwright.checkpoint.interop.deepspeed import import_from_deepspeed
from shardwright.checkpoint.state import collect
from shardwright.conf.load import load_config
from shardwright.kernels import select
from shardwright.trainer.build import make_plain_model

DEEPSPEED = [(2, f"deepspeed {stage}") for stage in (1, 2, 3)]  # its checkpoints are imported; it never loads
PROGRAMS = [(1, "plain"), (2, "ddp"), (2, "fsdp2"), (4, "fsdp2"), (4, "hsdp")]
LAYOUTS = [
    *PROGRAMS,
    (1, "recompute=full"),
    (2, "shard=2 zero=2"),
    (2, "shard=2 zero=3"),
    (2, "replicate=2"),
    (2, "tensor=2"),
    (2, "context=2"),
    (2, "pipeline=2 schedule=zbv"),
    (4, "shard=4 zero=3"),
    (4, "tensor=4"),
    (4, "tensor=2 pipeline=2"),
    (4, "pipeline=2 schedule=interleaved_1f1b shard=2"),
    (4, "context=2 mode=ulysses tensor=2"),
    (4, "replicate=2 shard=2 zero=2"),
    (4, "pipeline=4 schedule=zb_h1"),
    (8, "tensor=2 pipeline=2 shard=2"),
    (8, "replicate=2 shard=2 tensor=2"),
    (8, "tensor=2 context=2 pipeline=2"),
]
RANDOM = random.Random(4)
SOURCES = [*DEEPSPEED, *LAYOUTS]
PAIRS = [(source, target) for source in SOURCES for target in RANDOM.sample([x for x in LAYOUTS if x != source], 2)]
MODES = ("sync", "async", "overlap")


def program_parts(kind, config):
    """A program that knows our model as a plain module, and torch's AdamW."""
    kernels = select(config.kernels, device="cpu", dtype=torch.float32, sizes=config.model.kernel_sizes)
    model = make_plain_model(config, kernels)[0].to_empty(device="cpu")
    if kind in ("fsdp2", "hsdp"):
        size = started_world().num_processes
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        mesh = mesh if kind == "hsdp" else mesh._flatten()
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        optimizer.step()
    if kind == "ddp":
        started_world()
        model = DistributedDataParallel(model)
    return {"model": model, "optimizer": optimizer}


def make_parts(layout):
    words = "" if layout in [kind for _, kind in PROGRAMS] else layout
    config = load_config([*TINY, *spell_out(f"layers=4 {words}")])
    started_world()
    return program_parts(layout, config) if not words else make_engine(config)[1].parts


def expected(name, piece):
    """The numbers of a piece: of the name and the global index, each a whole number below 2 ** 24."""
    index = torch.zeros(piece.box.sizes, dtype=torch.int64)
    for dim, (offset, size) in enumerate(zip(piece.box.offsets, piece.box.sizes, strict=True)):
        place = torch.arange(offset, offset + size).view(-1, *[1] * (len(piece.box.sizes) - dim - 1))
        index = index * piece.shape[dim] + place
    return ((index * 2654435761 + zlib.crc32(name.encode())) % 2**24).to(piece.tensor.dtype)


def fill(parts):
    for name, tensor in collect(parts).tensors.items():
        for piece in pieces_of(tensor):
            piece.tensor.copy_(expected(name, piece))


def save_by_deepspeed(stage, path):
    """Let DeepSpeed save the same tensors, and import that."""
    plain = program_parts("plain", load_config([*TINY, *spell_out("layers=4")]))["model"]
    shapes = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
    save_filled(f"{path}-deepspeed", stage, shapes, lambda name, x: x.copy_(expected(name, pieces_of(x)[0])))
    if dist.get_rank() == 0:
        import_from_deepspeed(f"{path}-deepspeed", path)
    dist.barrier()


def save(layout, path, mode):
    if layout.startswith("deepspeed"):
        save_by_deepspeed(int(layout[-1]), path)
        return
    parts = make_parts(layout)
    with torch.no_grad():
        fill(parts)
    checkpoint.save(path, parts, mode=mode).wait()


def load(layout, path):
    """Load, and return the names of all tensors, and of those that have a wrong bit."""
    parts = make_parts(layout)
    checkpoint.load(path, parts)
    names, wrong = [], []
    for name, tensor in collect(parts).tensors.items():
        names.append(name)
        if not all(torch.equal(piece.tensor, expected(name, piece)) for piece in pieces_of(tensor)):
            wrong.append(name)
    return names, wrong


def by_processes(layouts):
    return {processes: [x for x in layouts if x[0] == processes] for processes in sorted({x[0] for x in layouts})}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Layout -> the checkpoint that it saved."""
    folder, paths = tmp_path_factory.mktemp("saved"), {}
    for processes, layouts in by_processes(SOURCES).items():
        calls = {}
        for number, layout in enumerate(layouts):
            paths[layout] = str(folder / f"{processes}-{number}")
            calls[layout] = (layout[1], paths[layout], MODES[number % 3])
        for layout, outcome in fork_each(processes, save, calls).items():
            assert not isinstance(outcome, str), f"{layout}: {outcome}"
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("processes", sorted({target[0] for _, target in PAIRS}))
def test_forty_random_pairs(saved, processes):
    calls = {pair: (pair[1][1], saved[pair[0]]) for pair in PAIRS if pair[1][0] == processes}
    for (source, target), ranks in fork_each(processes, load, calls).items():
        assert not isinstance(ranks, str), f"{source} -> {target}: {ranks}"
        for _, wrong in ranks:
            assert not wrong, f"{source} -> {target}: {wrong}"
        every = {name for names, _ in ranks for name in names}
        assert every == set(checkpoint.open(saved[source]).tensors), f"{source} -> {target}"


def test_the_pairs_are_forty():
    assert len(PAIRS) >= 40 and {source for source, _ in PAIRS} == set(SOURCES)


def test_the_numbers_tell_places_apart():
    piece = pieces_of(torch.zeros(6, 5))[0]
    assert len(set(expected("a", piece).flatten().tolist())) == 30
    assert not torch.equal(expected("a", piece), expected("b", piece))
