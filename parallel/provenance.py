"""Provenance: tensors that know which op made them, so that backward can make them again instead of keeping them.

While a block runs, the outputs of its named ops are registered with a recipe (the op and its inputs, which may be
recipes themselves). Where autograd saves such an output, or any view of it, the recipe is saved in its place, and
backward runs that op alone. No block runs twice and no dispatcher stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from shardwright.kernels import Kernels
from shardwright.parallel.plan import PlanError

KERNELS = ("rope", "swiglu")  # those that take activations only: weights are to be read through their module

Op = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


class Kept:
    """A saved tensor that is kept as it is. Detached, for a saved output would otherwise hold its own graph."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def restore(self) -> torch.Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: it was changed in place (autograd itself does not look where hooks are installed).
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that backward needs was changed in place after it was "
                f"saved; saved tensors must stay as they are; use the operation that returns a new tensor"
            )
        return self.tensor


class Remade:
    """A saved view of a recipe's output, from which it is restored."""

    def __init__(self, recipe: Recipe, index: int, view: torch.Tensor) -> None:
        self.recipe, self.index = recipe, index
        self.geometry = view.size(), view.stride(), view.storage_offset()
        recipe.users.add(self)

    def restore(self) -> torch.Tensor:
        """Return the view of an output that is made again, or has just been for another user."""
        return self.recipe.serve(self).as_strided(*self.geometry)


class Recipe:
    """How the outputs of one call come about.

    Results live from the first user's demand until every user has been served once: kept for longer they would cost
    what dropping them saved, held weakly they would be made again for every user. A user that was freed is not waited
    for; autograd, which owns the users, frees them with the graph, and the recipe with them.
    """

    def __init__(self, function: Op, args: list[Any], kwargs: dict[str, Any], outputs: Iterable[torch.Tensor]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.layouts = [_layout(tensor) for tensor in outputs]
        self.users: WeakSet[Remade] = WeakSet()
        self.waiting: WeakSet[Remade] = WeakSet()
        self.results: tuple[torch.Tensor, ...] | None = None

    def serve(self, user: Remade) -> torch.Tensor:
        """Return the output that `user` views, running the op unless its results are at hand."""
        if self.results is None:
            self.results = self._run()
            self.waiting = WeakSet(self.users)
        result = self.results[user.index]
        self.waiting.discard(user)
        if not self.waiting:
            self.results = None
        return result

    def _run(self) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            outputs = as_tuple(
                self.function(*map(_restore, self.args), **{key: _restore(x) for key, x in self.kwargs.items()})
            )
        layouts = [_layout(tensor) for tensor in outputs]
        if layouts != self.layouts:
            raise PlanError(
                f"a recomputed op returned {layouts}, at first {self.layouts}; it must depend on its inputs alone; "
                f"leave it out of recompute.ops"
            )
        return outputs


class Origin(NamedTuple):
    """Where a storage comes from."""

    storage: StorageWeakRef
    recipe: Recipe
    index: int
    version: int
    dtype: torch.dtype


class Record(Protocol):
    """What a block's forward reports to: the calls of its named ops, and the tensors that autograd saves."""

    def call(self, names: tuple[str, ...], function: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the op and return its outputs."""
        ...

    def pack(self, tensor: torch.Tensor) -> Kept | Remade | None:
        """Return what to save in the place of `tensor`; None if there will be no backward."""
        ...


class Provenance:
    """The origins of one forward's tensors.

    They are found by the address of the storage. The weak reference beside it reserves that address, so that no later
    storage can be taken for an earlier one.
    """

    def __init__(self) -> None:
        self.origins: dict[int, Origin] = {}

    def call(self, names: tuple[str, ...], function: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the op and remember how its outputs came about."""
        held, named = [self._hold(x) for x in args], {key: self._hold(x) for key, x in kwargs.items()}
        outputs = function(*args, **kwargs)
        tensors = as_tuple(outputs)
        recipe = Recipe(function, held, named, tensors)
        for index, tensor in new_tensors(tensors, args, kwargs):
            storage = StorageWeakRef(tensor.untyped_storage())
            self.origins[storage.cdata] = Origin(storage, recipe, index, tensor._version, tensor.dtype)
        return outputs

    def pack(self, tensor: torch.Tensor) -> Kept | Remade:
        """Return the tensor's recipe, or else the tensor."""
        origin = self.origins.get(address(tensor)) if is_plain(tensor) else None
        if origin is None or (origin.version, origin.dtype) != (tensor._version, tensor.dtype):
            return Kept(tensor)
        return Remade(origin.recipe, origin.index, tensor)

    def _hold(self, argument: Any) -> Any:
        return self.pack(argument) if isinstance(argument, torch.Tensor) else argument


class RecomputedBlock:
    """Takes the place of a block's `forward` and wraps its ops.

    Attributes:
        names: the names of the block's ops.
        ops: those whose outputs backward makes again; None: the block keeps its input only. May change any time.
        prepare: called with the arguments before each forward that is for training.
    """

    def __init__(self, block: nn.Module) -> None:
        self.forward = block.forward
        self.record: Record | None = None
        self.names = self._wrap(block)
        self.ops: frozenset[str] | None = frozenset()
        self.prepare: Callable[..., None] = lambda *args, **kwargs: None
        block.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        self.prepare(*args, **kwargs)
        if self.ops is None:
            return self.run_for_inputs(args, kwargs)
        return self.run(Provenance(), args, kwargs) if self.ops else self.forward(*args, **kwargs)

    def run_for_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block's own forward so that its inputs are kept, and backward runs it again."""
        return checkpoint(partial(self.forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)

    def run(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block's own forward while `record` hears of the calls of `ops` and of all that autograd saves."""
        self.record = record
        try:
            with saved_tensors_hooks(self._pack, _restore):
                return self.forward(*args, **kwargs)
        finally:
            self.record = None

    def _pack(self, tensor: torch.Tensor) -> Any:
        """Ask the record. The graph holds its hooks: a method of the record would hold recipes that nobody uses."""
        assert self.record is not None
        return self.record.pack(tensor)

    def remember(self, function: Op, *names: str) -> Op:
        """Return `function` with outputs that carry their recipe while any of `names` is among the block's ops.

        Args:
            function: takes tensors, returns a tensor or a tuple of tensors, and depends on nothing else that changes
                before backward; weights it reads through their module, which may have freed and refilled them.
            names: the ops that it stands for: several where one call computes several products.
        """

        def remembered(*args: Any, **kwargs: Any) -> Any:
            if self.record is None or self.ops is None or self.ops.isdisjoint(names):
                return function(*args, **kwargs)
            return self.record.call(names, function, args, kwargs)

        return remembered

    def _wrap(self, block: nn.Module) -> frozenset[str]:
        names: set[str] = set()
        leaves: dict[nn.Module, str] = {}
        for path, module in block.named_modules():
            if kernels := Kernels.of(module):
                wrapped: Any = replace(kernels, **{op: self.remember(getattr(kernels, op), op) for op in KERNELS})
                module.kernels = wrapped
                names.update(KERNELS)
            if path and (name := _op_name(path, module)):
                leaves[module] = name
        for module, name in leaves.items():
            shared = getattr(module.forward, "shared", None)
            if shared is None:
                module.forward = self.remember(module.forward, name)
            elif module is shared.linears[0]:
                shared.products = self.remember(shared.products, *(leaves[linear] for linear in shared.linears))
        return frozenset(names.union(leaves.values()))


def address(tensor: torch.Tensor) -> int:
    """Return the address of the tensor's storage, which all its views share."""
    return tensor.untyped_storage()._cdata


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is nothing but a strided view of its storage."""
    lazy = tensor.is_conj() or tensor.is_neg()
    return type(tensor) is torch.Tensor and tensor.layout is torch.strided and not lazy


def new_tensors(outputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, torch.Tensor]]:
    """Return index and value of the outputs of an op that are no views of its inputs."""
    given = {address(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
    return [(i, x) for i, x in enumerate(as_tuple(outputs)) if is_plain(x) and address(x) not in given]


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    """Return what an op returned as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _op_name(path: str, module: nn.Module) -> str | None:
    parameters = [*module.parameters(recurse=False)]
    if next(module.children(), None) is not None or not parameters or isinstance(module, nn.Embedding):
        return None
    return "norms" if all(p.ndim <= 1 for p in parameters) else path.rpartition(".")[2]


def _restore(saved: Any) -> Any:
    return saved.restore() if isinstance(saved, Kept | Remade) else saved


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage_bytes = tensor.untyped_storage().nbytes()
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), storage_bytes
