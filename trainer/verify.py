"""Any layout of any model against the oracle: the plain model, in one process, on all data.

Both start from the same weights, train a few steps on the same made-up batches in float32, with accumulation, clipping
and the configured optimizer, and are compared: loss and gradient norm of every step, every parameter's gradient before
clipping in the first and the last step, every weight afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from shardwright.checkpoint.box import Piece, pieces_of
from shardwright.conf.load import from_dict, to_dict
from shardwright.conf.schema import TrainConfig
from shardwright.data.loader import Share
from shardwright.data.pack import Batch, Document, Packed, pack, stack
from shardwright.kernels import Kernels, select
from shardwright.parallel.apply import Layout, apply, lay_out
from shardwright.parallel.mesh import AXES, Mesh
from shardwright.parallel.world import World
from shardwright.trainer.build import make_plain_model, plan_share
from shardwright.trainer.engine import StepResult, StepValues
from shardwright.trainer.native import NativeEngine
from shardwright.trainer.optim import Optimizer

NUM_STEPS = 3
TOLERANCE = 1e-5  # greatest relative difference that passes
GRADIENT_FLOOR = 1e-3  # of the whole gradient's norm: what a parameter's difference is at least compared with
ADAM_EPS = 1e-3  # with a small one, elements whose gradient is rounding noise move by a whole learning rate

GRADIENT, WEIGHT = "gradient", "weight"
Pieces = list[tuple[str, Piece]]
Kind = tuple[str, int]  # gradient or weight, step
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Comparison:
    """One number of the layout beside the oracle's.

    Attributes:
        quantity: loss, gradient norm, gradient, weight.
        step: counted from 1.
        name: of the parameter; empty for a number of the whole step.
        layout: the layout's value; a parameter's L2 norm.
        oracle: the oracle's.
        difference: relative to the oracle's; for a parameter, norm of the difference over norm of the oracle's (or
            over a floor, where that is greater: see `_compare`).
    """

    quantity: str
    step: int
    name: str
    layout: float
    oracle: float
    difference: float

    @property
    def passed(self) -> bool:
        """Whether both are finite and alike."""
        return math.isfinite(self.layout) and math.isfinite(self.oracle) and self.difference <= TOLERANCE

    @property
    def ratio(self) -> float:
        """The layout's value over the oracle's."""
        return _ratio(self.layout, self.oracle)


@dataclass(frozen=True)
class Report:
    """All comparisons of a layout, and the faults that are no number: parameters missing, extra or incomplete."""

    comparisons: tuple[Comparison, ...]
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.faults and all(comparison.passed for comparison in self.comparisons)

    @property
    def worst(self) -> Comparison:
        """The comparison with the largest difference."""
        return max(self.comparisons, key=_badness)

    def of_steps(self) -> list[Comparison]:
        """Return the comparisons of whole steps, in order."""
        return [comparison for comparison in self.comparisons if not comparison.name]

    def of_parameters(self) -> dict[tuple[str, int], list[Comparison]]:
        """Return (gradient or weight, step) -> the comparisons of all parameters, worst first."""
        groups: dict[tuple[str, int], list[Comparison]] = {}
        for comparison in sorted(self.comparisons, key=_badness, reverse=True):
            if comparison.name:
                groups.setdefault((comparison.quantity, comparison.step), []).append(comparison)
        return dict(sorted(groups.items()))


def verify(config: TrainConfig, world: World, *, num_steps: int = NUM_STEPS) -> Report:
    """Run a layout and the oracle and compare them (collective).

    Args:
        config: the layout; precision is float32, the learning rate the peak throughout, epsilon of Adam `ADAM_EPS`.
        world: started; groups are made here, and belong to it.
        num_steps: at least 1.

    Returns:
        The report, on every process.

    Raises:
        ConfigError, TopologyError, PlanError, ScheduleError, KernelError: the layout cannot run.
    """
    config = _well_conditioned(config)
    subject = Subject.of(config, num_processes=world.num_processes, rank=world.rank, device=world.device)
    layout = _train(replace(subject, mesh=subject.mesh.start(world.device.type)), num_steps)
    received: list[dict[Kind, Pieces]] | None = [{} for _ in range(world.num_processes)] if world.rank == 0 else None
    dist.gather_object(layout.pieces, received)
    reports: list[Report | None] = [None]
    if received is not None:
        alone = Subject.of(_plain(config), num_processes=1, rank=0, device=world.device)
        pieces = {kind: [piece for parts in received for piece in parts[kind]] for kind in layout.pieces}
        reports = [_compare(_Record(layout.values, pieces), _train(alone, num_steps), config)]
    dist.broadcast_object_list(reports, device=torch.device("cpu"))
    report = reports[0]
    assert report is not None
    return report


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and one process's place in a layout of it: all that can be known, and refused, before anything runs."""

    config: TrainConfig
    mesh: Mesh
    share: Share
    kernels: Kernels
    model: nn.Module
    layout: Layout
    device: torch.device

    @classmethod
    def of(cls, config: TrainConfig, *, num_processes: int, rank: int, device: torch.device) -> Subject:
        """Lay a model out (local; no memory, no groups).

        Raises:
            ConfigError, TopologyError, PlanError, ScheduleError, KernelError: the layout cannot run.
        """
        mesh = Mesh.of(config.parallel, num_processes=num_processes, rank=rank)
        share = plan_share(config, mesh)
        sizes = config.model.kernel_sizes
        kernels = select(config.kernels, device=device.type, dtype=torch.float32, sizes=sizes)
        model, plan = make_plain_model(config, kernels)
        layout = lay_out(model, plan, mesh, config)
        return cls(config=config, mesh=mesh, share=share, kernels=kernels, model=model, layout=layout, device=device)


def synthetic_batches(seed: int, step: int, share: Share, vocab_size: int) -> list[Batch]:
    """Return one process's microbatches of a made-up global batch; steps are counted from 1.

    Sequence n of all steps is a pure function of seed and n, and goes to the process that a loader would give it to.
    """
    first = (step - 1) * share.global_batch_sequences
    own = [n for n in range(first, first + share.global_batch_sequences) if share.owns(n)]
    sequences = [_sequence(seed, n, share.sequence_length, vocab_size) for n in own]
    size = share.microbatch_sequences
    return [stack(sequences[i : i + size]) for i in range(0, len(sequences), size)]


def _sequence(seed: int, number: int, length: int, vocab_size: int) -> Packed:
    """Return random documents of one token, few tokens, half the sequence or all of it; some end in filler."""
    rng = np.random.default_rng((seed, number))
    longest = int(rng.choice([1, 8, length // 2 + 1, 2 * length, 2 * length]))
    total = int(rng.integers(length // 2, 2 * length)) + 1

    def documents() -> Iterator[Document]:
        made = 0
        while made < total:
            size = min(int(rng.integers(1, longest + 1)), total - made)
            made += size
            yield Document(0, 0, rng.integers(0, vocab_size, size))

    return next(pack(documents(), length))


@dataclass(frozen=True)
class _Record:
    """Numbers of every step, and what was held of gradients and weights."""

    values: list[StepValues]
    pieces: dict[Kind, Pieces]


def _train(subject: Subject, num_steps: int) -> _Record:
    """Train a layout from its initial values (collective, if the mesh is live)."""
    config, mesh, device = subject.config, subject.mesh, subject.device
    model = apply(subject.model, subject.layout, mesh, config, device=device, compute_dtype=torch.float32)
    optimizer = Optimizer(config.optim, model, subject.kernels.optimizer)
    engine = NativeEngine(model, optimizer, mesh, device, config.optim.max_grad_norm)
    backward, gradients, values = engine.backward, [], []

    def watched(batches: Sequence[Batch]) -> StepResult:
        result = backward(batches)
        gradients.append(_copy((name, p.grad) for name, p in model.named_parameters() if p.grad is not None))
        return result

    engine.backward = watched  # a step drops its gradients once it has used them
    for step in range(1, num_steps + 1):
        batches = synthetic_batches(config.train.seed, step, subject.share, config.model.vocab_size)
        values.append(engine.read(engine.train_step(batches, lr=config.optim.peak_lr)))
    weights = _copy(pair for stage in model.stages.values() for pair in stage.named_parameters())
    ends = {(GRADIENT, 1): gradients[0], (GRADIENT, num_steps): gradients[-1]}
    return _Record(values, {**ends, (WEIGHT, num_steps): weights})


def _copy(tensors: Iterable[tuple[str, torch.Tensor]]) -> Pieces:
    pieces = [(name, pieces_of(tensor)[0]) for name, tensor in tensors]
    return [(name, replace(piece, tensor=piece.tensor.clone().cpu())) for name, piece in pieces]


def _well_conditioned(config: TrainConfig) -> TrainConfig:
    """Return the same run with an epsilon that keeps rounding noise as small in the update as it is in the gradient."""
    raw = to_dict(config)
    raw["optim"]["eps"] = ADAM_EPS
    return from_dict(raw)


def _plain(config: TrainConfig) -> TrainConfig:
    """Return the same run in one process, with nothing done to the model."""
    raw = to_dict(config)
    plain = {"pipeline_schedule": "1f1b", "pipeline_chunks": "auto", "context_mode": "ring", "tensor_overlap": "none"}
    raw["parallel"] = dict.fromkeys(AXES, 1) | plain | {"zero": "auto"}
    raw["recompute"] = {"kind": "none"}
    return from_dict(raw)


def _compare(layout: _Record, oracle: _Record, config: TrainConfig) -> Report:
    """Compare numbers, and tensors put together from pieces.

    A gradient can cancel out until only rounding is left of it (a bias of the keys, for example), and so can what it
    did to a weight. So a gradient's difference is compared with a thousandth of the whole model's gradient at least, a
    weight's with the way that the optimizer can take it.
    """
    comparisons, faults = [], []
    for step, (a, b) in enumerate(zip(layout.values, oracle.values, strict=True), start=1):
        for quantity, x, y in (("loss", a.loss, b.loss), ("gradient norm", a.grad_norm, b.grad_norm)):
            comparisons.append(Comparison(quantity, step, "", x, y, _ratio(abs(x - y), abs(y))))
    for (quantity, step), ours in layout.pieces.items():
        whole = {name: piece.tensor for name, piece in oracle.pieces[quantity, step]}
        found: dict[str, list[Piece]] = {name: [] for name in (*whole, *(name for name, _ in ours))}
        for name, piece in ours:
            found[name].append(piece)
        for name, pieces in found.items():
            fault = _find_fault(pieces, whole.get(name))
            if fault:
                faults.append(f"{quantity} of step {step}: {name} {fault}")
                continue
            x, y, distance = _measure(pieces, whole[name])
            if quantity == GRADIENT:
                floor = GRADIENT_FLOOR * oracle.values[step - 1].grad_norm
            else:
                floor = step * config.optim.peak_lr * math.sqrt(whole[name].numel())
            comparisons.append(Comparison(quantity, step, name, x, y, _ratio(distance, max(y, floor))))
    return Report(tuple(comparisons), tuple(faults))


def _find_fault(pieces: Sequence[Piece], whole: torch.Tensor | None) -> str | None:
    """Say how pieces fail to make up a tensor of the plain model, if they do."""
    if whole is None:
        return "is not in the plain model"
    if not pieces:
        return "is missing"
    covered = torch.zeros(whole.shape, dtype=torch.bool)
    for piece in pieces:
        if piece.shape != tuple(whole.shape):
            return f"has shape {list(piece.shape)}, in the plain model {list(whole.shape)}"
        if piece.box.sizes != tuple(piece.tensor.shape):
            return f"has a part of shape {list(piece.tensor.shape)} where {list(piece.box.sizes)} belong"
        covered[_slices(piece)] = True
    missing = covered.numel() - int(covered.sum())
    return f"is incomplete: no process holds {missing} of its {covered.numel()} elements" if missing else None


def _measure(pieces: Sequence[Piece], whole: torch.Tensor) -> tuple[float, float, float]:
    """Return the norms of what pieces make up, of the oracle's tensor and of the difference; the worst copy counts."""
    whole = whole.double()
    value, error = torch.zeros_like(whole), torch.zeros_like(whole)
    for piece in pieces:
        part, tensor = _slices(piece), piece.tensor.double()
        distance = (tensor - whole[part]).abs()
        value[part] = torch.where(distance >= error[part], tensor, value[part])
        error[part] = torch.maximum(error[part], distance)
    return value.norm().item(), whole.norm().item(), error.norm().item()


def _slices(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.box.offsets, piece.box.sizes, strict=True))


def _ratio(x: float, y: float) -> float:
    return 1.0 if x == y != 0 else x / max(y, _TINY)


def _badness(comparison: Comparison) -> float:
    return comparison.difference if math.isfinite(comparison.difference) else math.inf
