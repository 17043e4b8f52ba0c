"""What a block may keep for backward at what price, and the choice of it for all blocks under a budget of bytes.

One forward of a block shows all there is to know: which storages stay in use, which op made which from what (`Ledger`),
and the work of each op (`Meter`). What any choice of ops would keep and cost follows from it
without a further run, and without a clock, so that all processes that run a block alike choose alike.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from shardwright.parallel.plan import PlanError
from shardwright.parallel.provenance import Kept, Op, Provenance, RecomputedBlock, address, new_tensors

logger = logging.getLogger(__name__)

GIB = 2**30
FLOPS_PER_BYTE = 300  # what an H100 computes while it writes a byte: 989 TFLOP/s over 3.35 TB/s
# Fused attention is priced by its bytes: its products depend on a batch's documents, and processes must agree.
PRODUCTS = {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._scaled_mm", "shardwright.fp8_linear"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to run a block.

    Attributes:
        ops: what backward makes again; None: the block keeps its input only.
        saved_bytes: what it keeps between forward and backward.
        price: work of making the rest again, in FLOPs; a byte written counts as `FLOPS_PER_BYTE`.
    """

    ops: frozenset[str] | None
    saved_bytes: int
    price: int

    def __str__(self) -> str:
        if self.ops is None:
            return "keep inputs only"
        return f"drop {', '.join(sorted(self.ops))}" if self.ops else "keep everything"


def choose(options: Sequence[Sequence[Choice]], budget_bytes: float) -> list[Choice]:
    """Choose one option per block, so that the saved bytes fit and the price is low.

    Greedy, for an exact knapsack would have to count bytes: steps along each block's lower convex hull are taken in the
    order of price per byte until all fits, then each block gets back what the room left over allows. The price is above
    the least possible one by no more than that of the last step: the linear relaxation takes the same steps, and of the
    last one a part.

    Args:
        options: those of each block.
        budget_bytes: upper bound of their sum.

    Raises:
        PlanError: the least sum is above the budget.
    """
    least = sum(min(choice.saved_bytes for choice in block) for block in options)
    if least > budget_bytes:
        raise PlanError(
            f"recompute.gib={budget_bytes / GIB:.3g} is less than what {len(options)} blocks keep at least; "
            f"raise it to {1.005 * least / GIB:.3g} or use smaller microbatches"
        )
    hulls = [_hull(block) for block in options]
    steps = [
        ((b.price - a.price) / (a.saved_bytes - b.saved_bytes), i, b)
        for i, hull in enumerate(hulls)
        for a, b in pairwise(hull)
    ]
    chosen = [hull[0] for hull in hulls]
    room = budget_bytes - sum(choice.saved_bytes for choice in chosen)
    for _, i, choice in sorted(steps, key=lambda step: step[:2]):
        if room >= 0:
            break
        room += chosen[i].saved_bytes - choice.saved_bytes
        chosen[i] = choice
    for i, block in enumerate(options):
        fitting = (choice for choice in block if choice.saved_bytes - chosen[i].saved_bytes <= room)
        better = min(fitting, key=lambda choice: (choice.price, choice.saved_bytes))
        room += chosen[i].saved_bytes - better.saved_bytes
        chosen[i] = better
    return chosen


def _frontier(options: Iterable[Choice]) -> list[Choice]:
    """Return the options that no other beats in both price and bytes, by rising price."""
    frontier: list[Choice] = []
    for choice in sorted(options, key=lambda choice: (choice.price, choice.saved_bytes)):
        if not frontier or choice.saved_bytes < frontier[-1].saved_bytes:
            frontier.append(choice)
    return frontier


def _hull(options: Iterable[Choice]) -> list[Choice]:
    """Return the options on the lower convex hull of price over bytes, by rising price."""
    hull: list[Choice] = []
    for c in _frontier(options):
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], c):
            hull.pop()
        hull.append(c)
    return hull


def _is_above(a: Choice, b: Choice, c: Choice) -> bool:
    direct = (c.price - a.price) * (a.saved_bytes - b.saved_bytes)
    return (b.price - a.price) * (a.saved_bytes - c.saved_bytes) >= direct


class Meter(TorchDispatchMode):
    """Notes every storage that is made while it is active, and prices the work."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.price = 0  # an integer: sums do not depend on their order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if str(func.overloadpacket) in PRODUCTS:
            self.price += flop_registry[func.overloadpacket](*args, **kwargs, out_val=outputs)
        given = {address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and address(x) not in given and address(x) not in self.made:
                storage = x.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.price += FLOPS_PER_BYTE * storage.nbytes()
        return outputs

    def saved(self, outputs: Any) -> set[int]:
        """Return the storages that are still in use, other than those of the outputs."""
        gc.collect()  # what cycles of Python objects hold is not saved, and ranks must find the same
        held = {address(x) for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)}
        return {key for key, (storage, _) in self.made.items() if key not in held and not storage.expired()}

    def bytes_of(self, storages: Iterable[int]) -> int:
        """Return the sum of the sizes of those storages that were made meanwhile: not of weights, for one."""
        return sum(self.made[key][1] for key in storages if key in self.made)


def measure_saved_bytes(function: Callable[[], Any]) -> int:
    """Run `function`; return the bytes that it made and that its outputs hold for backward, themselves not counted."""
    with Meter() as meter:
        outputs = function()
    return meter.bytes_of(meter.saved(outputs))


@dataclass(frozen=True, eq=False)
class Step:
    """One call of a named op: what it took, made and cost."""

    names: frozenset[str]
    inputs: frozenset[int]
    outputs: frozenset[int]
    price: int


class Ledger:
    """The record of a forward that is not for backward, from which follows what any choice of ops keeps.

    It drops what any op can make again, so that what is in use afterwards is so whatever the choice.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter, self.provenance = meter, Provenance()
        self.makers: dict[int, Step] = {}
        self.saved: set[int] = set()
        self.kept: set[int] = set()
        self.outputs: set[int] = set()

    def call(self, names: tuple[str, ...], function: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the op and enter it."""
        before = self.meter.price
        outputs = self.provenance.call(names, function, args, kwargs)
        made = frozenset(address(x) for _, x in new_tensors(outputs, args, kwargs))
        inputs = frozenset(address(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        step = Step(frozenset(names), inputs, made, self.meter.price - before)
        self.makers.update(dict.fromkeys(made, step))
        return outputs

    def pack(self, tensor: torch.Tensor) -> Kept | None:
        """Drop the tensor and enter its storage if an op can make it again, else keep it."""
        saved = self.provenance.pack(tensor)
        if isinstance(saved, Kept):
            return saved
        self.saved.add(address(tensor))
        return None

    def close(self, outputs: Any) -> None:
        """Enter what is in use after the forward. The outputs count where they are inputs."""
        self.provenance = Provenance()  # recipes hold inputs that nobody may need
        self.kept = self.meter.saved(outputs)
        self.outputs = {address(x) for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)}

    def choice(self, ops: frozenset[str]) -> Choice:
        """Return what making `ops` again would keep and cost."""
        kept, run, wanted = set(self.kept), set(), [*self.saved]
        while wanted:
            key = wanted.pop()
            step = self.makers.get(key)
            if step is None or step.names.isdisjoint(ops):
                kept.add(key)
            elif step not in run:
                run.add(step)
                wanted += step.inputs
        return Choice(
            ops=ops, saved_bytes=self.meter.bytes_of(kept - self.outputs), price=sum(step.price for step in run)
        )

    def choices(self, names: Iterable[str]) -> list[Choice]:
        """Return the choices worth having, from keeping everything to dropping all that the ops can make again.

        Names are added in the order of their price per byte; those that have come to drop nothing are left out.
        """
        order = sorted(names, key=lambda name: (self._price_per_byte(name), name))
        return _frontier(self._without_idle(order[:count]) for count in range(len(order) + 1))

    def _price_per_byte(self, name: str) -> float:
        steps = {step for step in self.makers.values() if name in step.names}
        size = sum(self.meter.bytes_of(step.outputs) for step in steps)
        return sum(step.price for step in steps) / max(size, 1)

    def _without_idle(self, names: Sequence[str]) -> Choice:
        best = self.choice(frozenset(names))
        for name in reversed(names):
            other = self.choice((best.ops or frozenset()) - {name})
            if other.saved_bytes <= best.saved_bytes:
                best = other
        return best


def _probe(block: RecomputedBlock, x: torch.Tensor, *args: Any, **kwargs: Any) -> list[Choice]:
    """Run the block twice and return its choices. What it is given is a copy of `x`, which counts if it is saved."""
    whole = _probe_whole(block, x, args, kwargs)
    return _frontier([*_probe_ops(block, x, args, kwargs), whole])


def _probe_whole(block: RecomputedBlock, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
    with Meter() as meter:
        outputs = block.run_for_inputs((_copy(x), *args), kwargs)
    return Choice(ops=None, saved_bytes=meter.bytes_of(meter.saved(outputs)), price=meter.price)


def _probe_ops(block: RecomputedBlock, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Choice]:
    before, block.ops = block.ops, block.names
    with Meter() as meter:
        ledger = Ledger(meter)
        outputs = block.run(ledger, (_copy(x), *args), kwargs)
    block.ops = before
    ledger.close(outputs)
    return ledger.choices(block.names)


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_().clone()


class Budget:
    """Chooses for all blocks once the first forward for training has shown a block of each structure its arguments.

    Until then blocks keep their input only: where all are alike, the choice is made before the first of them runs.
    """

    def __init__(self, blocks: Sequence[nn.Module], live: Sequence[int], gib: float) -> None:
        self.structures = [_structure(block) for block in blocks]
        self.blocks = [RecomputedBlock(block) for block in blocks]
        self.live, self.gib = live, gib
        self.known: dict[Any, list[Choice]] = {}
        for block, structure in zip(self.blocks, self.structures, strict=True):
            block.ops, block.prepare = None, partial(self._prepare, block, structure)

    def _prepare(self, block: RecomputedBlock, structure: Any, *args: Any, **kwargs: Any) -> None:
        if structure not in self.known:
            self.known[structure] = _probe(block, *args, **kwargs)
            if self.known.keys() >= set(self.structures):
                self._apply()

    def _apply(self) -> None:
        chosen = choose(
            [
                [replace(choice, saved_bytes=choice.saved_bytes * live) for choice in self.known[structure]]
                for structure, live in zip(self.structures, self.live, strict=True)
            ],
            self.gib * GIB,
        )
        for block, choice in zip(self.blocks, chosen, strict=True):
            block.ops = choice.ops
        plan = ", ".join(f"{count} {choice}" for choice, count in Counter(map(str, chosen)).items())
        saved = sum(choice.saved_bytes for choice in chosen) / GIB
        count = len(chosen)
        logger.info("recompute of %d blocks: %s; saved activations %.3g of %.3g GiB", count, plan, saved, self.gib)


def _structure(block: nn.Module) -> Any:
    return type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
