"""Before anything adds up: initial weights and the first loss are the same bits, and tensor processes keep less."""

from collections import defaultdict
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from support import TINY, first_backward, fork, fork_each, make_engine, spell_out

from shardwright.checkpoint.box import pieces_of
from shardwright.conf.load import load_config
from shardwright.models.blocks import RMSNorm

SAME_LOSS = {
    1: ["microbatch=2", "recompute=full"],
    2: [
        "shard=2",
        "shard=2 zero=2",
        "replicate=2",
        *(f"pipeline=2 schedule={kind}" for kind in ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zbv")),
        "context=2 mode=ulysses",
    ],
    4: [
        "pipeline=4",
        "replicate=2 shard=2",
        "pipeline=2 schedule=zbv shard=2",
        "pipeline=2 schedule=interleaved_1f1b replicate=2",
        "context=4 mode=ulysses",
    ],
}
OTHER_LOSS = {
    2: ["tensor=2", "tensor=2 overlap=chunked", "context=2"],
    3: ["shard=3 batch=6"],
    4: ["tensor=4", "pipeline=2 schedule=zbv tensor=2", "shard=2 tensor=2", "context=2 tensor=2"],
}
SAME_LOSS_OF_REFERENCES = {  # the ring splits sums over keys, which only the reference computes in float64
    1: ["kernels=reference", "window=7 kernels=reference"],
    2: ["context=2 kernels=reference", "context=2 window=7 kernels=reference"],
    4: ["context=4 kernels=reference", "context=2 pipeline=2 schedule=zbv kernels=reference"],
}
CASES = [(n, layout) for part in (SAME_LOSS, OTHER_LOSS, SAME_LOSS_OF_REFERENCES) for n in part for layout in part[n]]


def configs(layouts, *overrides):
    return {layout: [load_config([*TINY, *overrides, *spell_out(layout)])] for layout in layouts}


def first_step(config):
    """Return (name, shape, first index, values) of the weights that this process holds, and the first loss."""
    subject, engine = make_engine(config)
    held = []
    for stage in engine.model.stages.values():
        for name, parameter in stage.named_parameters():
            piece = pieces_of(parameter)[0]
            held.append((name, piece.shape, piece.box.offsets, piece.tensor.numpy().copy()))
    return held, first_backward(config, engine, subject.share).loss


def assemble(ranks):
    """Return the weights whole; parts that several processes hold must be alike."""
    whole, known = {}, defaultdict(lambda: False)
    for name, shape, offsets, values in (piece for pieces, _ in ranks for piece in pieces):
        value, seen = whole.setdefault(name, np.zeros(shape, np.float32)), known[name] | np.zeros(shape, bool)
        part = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
        assert np.array_equal(value[part][seen[part]], values[seen[part]]), f"copies of {name} differ"
        value[part], seen[part] = values, True
        known[name] = seen
    assert all(seen.all() for seen in known.values())
    return whole


@pytest.fixture(scope="module")
def steps():
    """(number of processes, layout) -> results by rank."""
    found = {}
    for processes in (1, 2, 3, 4):
        layouts = [layout for n, layout in CASES if n == processes]
        for layout, ranks in fork_each(
            processes, first_step, configs(["", *layouts] if processes == 1 else layouts)
        ).items():
            found[processes, layout] = ranks
    return found


@pytest.mark.parametrize(("processes", "layout"), CASES)
def test_initial_weights_are_the_same_bits(steps, processes, layout):
    found, plain = steps[processes, layout], assemble(steps[1, ""])
    assert not isinstance(found, str), found
    weights = assemble(found)
    assert weights.keys() == plain.keys()
    for name, value in weights.items():
        assert value.tobytes() == plain[name].tobytes(), name


@pytest.mark.parametrize(("processes", "layout"), [(n, layout) for n in SAME_LOSS for layout in SAME_LOSS[n]])
def test_the_first_loss_is_the_same_bits(steps, processes, layout):
    assert {loss for _, loss in steps[processes, layout]} == {steps[1, ""][0][1]}


@pytest.mark.parametrize(
    ("processes", "layout"), [(n, x) for n, several in SAME_LOSS_OF_REFERENCES.items() for x in several if n > 1]
)
def test_the_first_loss_of_reference_kernels_is_the_same_bits_round_a_ring(steps, processes, layout):
    plain = "window=7 kernels=reference" if "window" in layout else "kernels=reference"
    assert {loss for _, loss in steps[processes, layout]} == {steps[1, plain][0][1]}


def kept_by_norms(config):
    """Return the bytes that the norms of this process keep for backward, by norm, weights aside."""
    subject, engine = make_engine(config)
    (stage,) = engine.model.stages.values()
    kept = defaultdict(int)
    with ExitStack() as watched:
        for name, module in stage.named_modules():
            if isinstance(module, RMSNorm):
                watch(module, lambda size, name=name: kept.__setitem__(name, kept[name] + size), watched)
        first_backward(config, engine, subject.share)
    return dict(kept)


def watch(module, count, watched):
    """Count the bytes of the tensors of tokens that a module's forward saves."""

    def pack(tensor):
        if tensor.ndim > 1:
            count(tensor.untyped_storage().nbytes())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    watched.enter_context(module.register_forward_pre_hook(lambda *_: hooks.__enter__()))
    watched.enter_context(module.register_forward_hook(lambda *_: hooks.__exit__()))


@pytest.mark.parametrize("options", ["microbatch=2", "parallel_block=true tied=true"])
def test_norms_keep_their_share_of_the_tokens(options):
    plain = fork(1, kept_by_norms, *configs([options])[options])[0]
    assert len(plain) == 4 * (1 if "parallel_block" in options else 2) + 1 and min(plain.values()) > 0
    for degree in (2, 4):
        layout = f"tensor={degree} {options}"
        for kept in fork(degree, kept_by_norms, *configs([layout])[layout]):
            assert kept == {name: size // degree for name, size in plain.items()}
