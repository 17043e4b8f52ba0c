"""scripts/verify.py: right layouts pass, wrong ones are caught with the parameter named."""

import os

import pytest
from support import ROOT, command, fork

from shardwright.conf.load import load_config
from shardwright.data.loader import Share
from shardwright.parallel import model as parallel_model
from shardwright.parallel import products
from shardwright.parallel.world import World
from shardwright.scripts import verify as script
from shardwright.trainer.native import NativeEngine
from shardwright.trainer.verify import synthetic_batches, verify

VERIFY = ROOT / "scripts" / "verify.py"
SMALL = ["train.sequence_length=32", "train.global_batch_sequences=8"]
TINY = [
    *SMALL,
    "model.vocab_size=96",
    "model.hidden_size=48",
    "model.intermediate_size=80",
    "model.num_layers=2",
    "model.head_dim=12",
]


def report(*overrides):
    world = World.from_environment("cpu")
    world.start()
    try:
        return verify(load_config([*TINY, *overrides]), world)
    finally:
        world.stop()


def failing(found, quantity):
    return {c.name for c in found.comparisons if c.quantity == quantity and not c.passed}


def run(*overrides):
    return command(*overrides, script=VERIFY)


def test_a_right_layout_passes():
    done = run(*TINY, "parallel.tensor=2", "parallel.pipeline=2")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("4 processes (pipeline=2 x tensor=2)", "gradient norm", "layers.0.", "passed; largest difference"):
        assert word in done.stdout, done.stdout
    assert "DIFFERS" not in done.stdout


@pytest.mark.slow
def test_under_torchrun():
    done = command(*TINY, "parallel.context=2", script=VERIFY, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed; largest difference") == 1


def unsummed_row():
    """Each process keeps its own summand of a row-parallel product."""

    class Broken(products.Unsplit):
        def start_products_scatter(self, lefts_ND, factors_DC):
            whole = products._sum_products(lefts_ND, factors_DC)
            return lambda: whole.chunk(self.size)[self.rank]

    inner = products.ProductScatter.forward

    def forward(ctx, overlap, *rest):
        out = inner(ctx, Broken(overlap.group), *rest)
        ctx.overlap = overlap
        return out

    products.ProductScatter.forward = staticmethod(forward)
    return report("parallel.tensor=2", "model.tied_embeddings=false")


def test_a_row_linear_without_its_sum_is_caught():
    found, _ = fork(2, unsummed_row)
    assert not found.passed
    assert failing(found, "loss")
    assert {"layers.0.attention.o.weight", "layers.1.feed_forward.down.weight"} <= failing(found, "gradient")


def unsummed_norms():
    parallel_model.sum_over_tensor = lambda parameters: None
    return report("parallel.tensor=2")


def test_a_norm_gradient_not_summed_over_tensor_ranks_is_caught():
    found, _ = fork(2, unsummed_norms)
    first = {c.name for c in found.comparisons if c.quantity == "gradient" and c.step == 1 and not c.passed}
    norms = {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("attention_norm", "feed_forward_norm")}
    assert first == norms | {"norm.weight"}
    assert not [c for c in found.of_steps() if c.quantity == "loss" and c.step == 1 and not c.passed]


def own_count():
    NativeEngine._count_labels = lambda self, batches: sum((b.labels != -100).sum() for b in batches)
    return report("parallel.shard=2")


def test_a_loss_divided_by_the_wrong_count_is_caught():
    found, _ = fork(2, own_count)
    everything = {c.name for c in found.comparisons if c.name}
    assert failing(found, "loss") == {""}
    assert failing(found, "gradient") == everything


def lost_parameter():
    inner = parallel_model.ParallelModel.named_parameters

    def named_parameters(self):
        for name, parameter in inner(self):
            if os.environ["RANK"] == "0" or name != "layers.1.attention.q.weight":  # rank 0 runs the oracle
                yield name, parameter

    parallel_model.ParallelModel.named_parameters = named_parameters
    return report("parallel.pipeline=2")


def test_a_parameter_without_a_gradient_is_named():
    found, _ = fork(2, lost_parameter)
    assert "gradient of step 1: layers.1.attention.q.weight is missing" in found.faults
    assert "layers.1.attention.q.weight" in failing(found, "weight"), "it was never updated"
    assert not found.passed


def poisoned():
    """One process's part of one weight is not a number after the last step."""
    inner = NativeEngine.train_step

    def train_step(self, batches, *, lr, before_update=None):
        result = inner(self, batches, lr=lr)
        if os.environ["RANK"] == "1":
            dict(self.model.named_parameters())["norm.weight"].detach().to_local()[0] = float("nan")
        return result

    NativeEngine.train_step = train_step
    world = World.from_environment("cpu")
    world.start()
    found = verify(load_config([*TINY, "parallel.replicate=2"]), world, num_steps=1)
    world.stop()
    return found


def test_copies_that_disagree_and_what_is_not_finite_are_caught():
    found, _ = fork(2, poisoned)
    assert failing(found, "weight") == {"norm.weight"} and not failing(found, "gradient")
    assert found.worst.name == "norm.weight"


def several():
    layouts = [["parallel.tensor=2"], ["parallel.context=2"], ["parallel.pipeline=2", "parallel.pipeline_schedule=zbv"]]
    world = World.from_environment("cpu")
    world.start()
    found = [verify(load_config([*TINY, "model.num_layers=4", *layout]), world, num_steps=1) for layout in layouts]
    world.stop()
    return [one.passed for one in found]


def test_several_layouts_in_one_set_of_processes():
    assert fork(2, several) == [[True, True, True]] * 2


def test_made_up_data_does_not_depend_on_the_layout():
    def share(rank, degree, size):
        return Share(
            sequence_length=48, global_batch_sequences=48, microbatch_sequences=size, data_rank=rank, data_degree=degree
        )

    whole = [b for step in (1, 2) for b in synthetic_batches(3, step, share(0, 1, 1), 50)]
    for rank in range(3):
        part = [b for step in (1, 2) for b in synthetic_batches(3, step, share(rank, 3, 1), 50)]
        assert all((a.ids == b.ids).all() for a, b in zip(part, whole[rank::3], strict=True))
    labels = [int((b.labels >= 0).sum()) for b in whole]
    lengths = {int(n) for b in whole for n in b.bounds.diff()}
    assert 0 in labels and {47, 48} & set(labels), "sequences of nothing to predict, and of one document"
    assert {1, 2, 48} <= lengths and len(lengths) > 20


MINE = """
from typing import Literal
import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn
from shardwright.conf.schema import STRICT, ModelConfig
from shardwright.models.registry import Family, register
from shardwright.parallel.plan import (
    Columns, Constant, Ends, Normal, ParallelPlan, Row, SequenceSharded, VocabularyEmbedding, VocabularyHead,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MineConfig(ModelConfig):
    kind: Literal["mine"]
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, c, kernels):
        super().__init__()
        self.size, self.kernels = c.width // c.heads, kernels
        self.norm, self.q, self.k, self.v, self.o = nn.LayerNorm(c.width), *(nn.Linear(c.width, c.width) for _ in "qkvo")
        self.mlp_norm, self.mlp = nn.LayerNorm(c.width), Mlp(c.width)

    def forward(self, x, positions, bounds, longest):
        normed = self.norm(x)
        q, k, v = (f(normed).unflatten(-1, (-1, self.size)) for f in (self.q, self.k, self.v))
        x = x + self.o(self.kernels.attention(q, k, v, positions, bounds, longest).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class Mine(nn.Module):
    def __init__(self, c, kernels):
        super().__init__()
        self.kernels = kernels
        self.tokens = nn.Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleDict({str(i): Block(c, kernels) for i in range(c.depth)})
        self.last = nn.LayerNorm(c.width)
        self.out = nn.Linear(c.width, c.vocab_size, bias=False)

    def forward(self, x, positions, bounds, longest, labels=None):
        x = x if x.is_floating_point() else self.tokens(x)
        for block in self.blocks.values():
            x = block(x, positions, bounds, longest)
        if self.last is None:
            return x
        return self.kernels.linear_cross_entropy(self.last(x), self.out.weight, labels)


def plan(c):
    return ParallelPlan(
        blocks=("blocks.*",),
        initial_values={"*.bias": Constant(0.0), "*norm.weight": Constant(1.0), "last.weight": Constant(1.0), "*": Normal(0.05)},
        tensor={
            "tokens": VocabularyEmbedding(), "out": VocabularyHead(), "last": SequenceSharded(),
            "blocks.*": Columns(("q", "k", "v")), "blocks.*.o": Row(), "blocks.*.norm": SequenceSharded(),
            "blocks.*.mlp_norm": SequenceSharded(), "blocks.*.mlp": Columns(("up",)), "blocks.*.mlp.down": Row(),
        },
        ends=Ends(first=("tokens",), last=("last", "out"), hidden_size=c.width),
    )


register("mine", MineConfig, Family(build=Mine, plan=plan, flops_per_token=lambda c, length, attention: 1.0))
"""


@pytest.fixture
def own_model(tmp_path):
    """Overrides that choose a family of the user's own: LayerNorms, and biases everywhere, of keys too."""
    (tmp_path / "model").mkdir()
    settings = "kind: mine\nname: mine\nvocab_size: 96\nwidth: 48\ndepth: 3\nheads: 4\n"
    (tmp_path / "model" / "mine.yaml").write_text(settings)
    (tmp_path / "mine.py").write_text(MINE)
    return [f"hydra.searchpath=[file://{tmp_path}]", f"plugins=[{tmp_path}/mine.py]", "model=mine", *SMALL]


@pytest.mark.slow
def test_a_users_own_model(own_model):
    done = run(*own_model, "parallel.tensor=2", "parallel.pipeline=2", "parallel.pipeline_schedule=zb_h1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine on 4 processes" in done.stdout and "blocks." in done.stdout


@pytest.mark.slow
def test_a_users_own_model_with_a_wrong_plan(own_model, tmp_path):
    text = MINE.replace('"blocks.*.norm": SequenceSharded(),', "")
    (tmp_path / "mine.py").write_text(text)
    done = run(*own_model, "parallel.tensor=2")
    assert done.returncode == 2 and "blocks.0.norm.weight" in done.stderr, done.stderr
    (tmp_path / "mine.py").write_text(MINE.replace("x + self.mlp(", "x + positions.shape[1] / 32 * self.mlp("))
    done = run(*own_model, "parallel.context=2")
    assert done.returncode == 1 and "DIFFERS" in done.stdout, done.stdout + done.stderr
    assert "FAILED" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["parallel.tensors=2"], ["ConfigError", "did you mean parallel.tensor?"]),
        (["parallel.tensor=3"], ["ConfigError", "parallel.tensor=3 does not divide"]),
        (["parallel.tensor=2", "--processes", "3"], ["TopologyError", "3 processes"]),
        (["parallel.shard=5", "train.global_batch_sequences=12"], ["ConfigError", "global_batch_sequences=12"]),
        (["parallel.pipeline=2", "parallel.pipeline_schedule=none.yaml"], ["ScheduleError", "none.yaml"]),
        (["kernels.rope=fast"], ["KernelError", "reference"]),
        (["train.device=cuda"], ["ConfigError", "torchrun"]),
        (["--random", "2"], ["ConfigError", "--processes"]),
        (["--steps", "0"], ["--steps", "0 is not a positive number"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input(line, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["verify.py", *line])
    with pytest.raises(SystemExit) as caught:
        script.main()
    shown = capsys.readouterr()
    assert caught.value.code == 2 and not shown.out
    for word in words:
        assert word in shown.err, shown.err


@pytest.mark.slow
def test_random_layouts():
    done = run("--random", "2", "--processes", "4", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line[:4] for line in lines[:2]] == ["pass", "pass"] and lines[2] == "2 of 2 layouts pass"


def test_a_random_layout_that_fails_says_how_to_run_it_again(monkeypatch, capsys):
    monkeypatch.setattr(parallel_model, "sum_over_tensor", lambda parameters: None)
    line = ["--random", "1", "--processes", "2", "--steps", "1", "parallel.tensor=2", "parallel.shard=1"]
    monkeypatch.setattr("sys.argv", ["verify.py", *line])
    with pytest.raises(SystemExit) as caught:
        script.main()
    shown = capsys.readouterr().out
    assert caught.value.code == 1 and shown.startswith("FAIL") and shown.endswith("0 of 1 layouts pass\n")
    assert "norm.weight" in shown and "DIFFERS" in shown
    again = shown.splitlines()[-2]
    assert again.startswith("  python scripts/verify.py --steps 1 parallel") and "parallel.tensor=2" in again
    monkeypatch.setattr("sys.argv", again.split()[1:])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 1 and "norm.weight" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [6, 8])
def test_many_random_layouts(processes):
    done = command("--random", "20", "--processes", str(processes), "--seed", "1", script=VERIFY, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
