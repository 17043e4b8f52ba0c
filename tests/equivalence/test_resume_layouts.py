"""Saved at one layout, resumed at another: the run goes on as one process would have done."""

import random

import pytest
from support import assert_close, curve, fork, records, small, spell_out, train

from shardwright.checkpoint.box import pieces_of

LAYOUTS = [
    (1, "recompute=full"),
    (2, "shard=2"),
    (2, "tensor=2"),
    (2, "context=2"),
    (2, "pipeline=2 schedule=zbv"),
    (2, "replicate=2"),
    (3, "shard=3 microbatch=2"),
    (3, "pipeline=3 schedule=zb_h1"),
    (4, "tensor=4"),
    (4, "shard=2 tensor=2"),
    (4, "replicate=2 shard=2"),
    (4, "pipeline=2 tensor=2"),
    (4, "pipeline=2 schedule=interleaved_1f1b shard=2"),
    (4, "context=2 mode=ulysses tensor=2"),
]
SHUFFLED = random.Random(2026).sample(LAYOUTS, len(LAYOUTS))
PAIRS = list(zip(SHUFFLED[:10], SHUFFLED[4:], strict=True))  # each layout is in one pair or two
OPTIONS = ["layers=4 tied=true", "layers=4 tied=false"]


def overrides(corpus, folder, num_steps, options, layout):
    steps = [f"train.num_steps={num_steps}", "checkpoint.every_steps=2", "schedule.decay_fraction=0"]
    return small(
        corpus,
        folder,
        "train.sequence_length=32",
        "train.microbatch_sequences=3",
        *steps,
        *spell_out(f"{options} {layout}"),
    )


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """Options -> the last steps of the run in one process."""
    found = {}
    for options in OPTIONS:
        folder = tmp_path_factory.mktemp("uninterrupted")
        fork(1, train, overrides(corpus, folder, 4, options, ""))
        found[options] = curve(folder)
    return found


@pytest.mark.parametrize(
    ("index", "saved", "resumed"),
    [pytest.param(i, *pair, marks=[pytest.mark.slow] if i >= 3 else []) for i, pair in enumerate(PAIRS)],
)
def test_saved_at_one_layout_resumed_at_another(corpus, tmp_path, uninterrupted, index, saved, resumed):
    options = OPTIONS[index % 2]
    for num_steps, (processes, layout) in ((2, saved), (4, resumed)):
        assert fork(processes, train, overrides(corpus, tmp_path, num_steps, options, layout)) == [True] * processes
    assert_close(curve(tmp_path), uninterrupted[options])


def resumed_weights(lines):
    """Resume, and return the parts of the weights that this process begins with."""
    held = []

    def keep(run, step, batches):
        for stage in run.engine.model.stages.values() if step == 2 else ():
            for name, parameter in stage.named_parameters():
                piece = pieces_of(parameter)[0]
                held.append((name, piece.box, piece.tensor.numpy().copy()))

    train(lines, keep)
    return held


RESUMED = [
    (2, "shard=2"),
    (2, "replicate=2"),
    (2, "pipeline=2 schedule=zbv"),
    (3, "pipeline=3 schedule=zb_h1"),
    (4, "tensor=4"),
]


@pytest.fixture(scope="module")
def split_save(corpus, tmp_path_factory):
    """A checkpoint that four processes wrote in parts, and what one process makes of it: weights and losses."""
    folder = tmp_path_factory.mktemp("saved")
    fork(4, train, overrides(corpus, folder / "run", 2, OPTIONS[0], "pipeline=2 tensor=2"))
    start = f"checkpoint.resume={folder}/run/checkpoints/step_00000002"
    (held,) = fork(1, resumed_weights, [*overrides(corpus, folder / "one", 3, OPTIONS[0], ""), start])
    return start, {name: values for name, _, values in held}, records(folder / "one")[3]["loss"]


@pytest.mark.parametrize(("processes", "layout"), RESUMED)
def test_loaded_weights_and_the_next_loss_are_the_same_bits(corpus, tmp_path, split_save, processes, layout):
    start, whole, loss = split_save
    ranks = fork(processes, resumed_weights, [*overrides(corpus, tmp_path, 3, OPTIONS[0], layout), start])
    assert {name for held in ranks for name, _, _ in held} == whole.keys()
    for name, box, values in (part for held in ranks for part in held):
        part = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        assert values.tobytes() == whole[name][part].tobytes(), name
    if "tensor" not in layout:
        assert records(tmp_path)[3]["loss"] == loss
