"""Tensor and sequence parallelism: installs a plan's styles on a plain model's modules.

Weights become DTensors over the tensor axis; computation runs on their local parts with explicit collectives
(`products`, `vocabulary`), so that communication can be overlapped. Between products, every process holds its own
1 / P of the tokens; only inside them does it hold all tokens, of its heads and features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from shardwright.kernels import Kernels
from shardwright.parallel.gradients import LocalPart
from shardwright.parallel.mesh import COPIES, HEADS
from shardwright.parallel.plan import (
    Columns,
    ParallelPlan,
    PlanError,
    Row,
    SequenceSharded,
    TensorStyle,
    VocabularyEmbedding,
    VocabularyHead,
    match,
)
from shardwright.parallel.products import GatherProducts, Overlap, ProductScatter, Unsplit, WeightGradients
from shardwright.parallel.vocabulary import VocabularyCrossEntropy, embed


class SharedProducts:
    """Linear maps of one input as one operation: the input is gathered once, whichever of them is called first.

    Args:
        linears: called in this order with the same tensor; each call takes its own output.
        overlap: how the products and their collectives are interleaved.
        gradients: where the weights' gradients go.
    """

    def __init__(self, linears: list[nn.Linear], overlap: Overlap, gradients: WeightGradients) -> None:
        self.linears, self._overlap, self._gradients = linears, overlap, gradients
        self.products: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] = self._products
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def take(self, index: int, x_BtC: torch.Tensor) -> torch.Tensor:
        """Return one of the outputs for an input."""
        if self._input is not x_BtC or index not in self._outputs:
            self._input, self._outputs = x_BtC, dict(enumerate(self.products(x_BtC)))
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output

    def _products(self, x_BtC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs: Any = GatherProducts.apply(self._overlap, self._gradients, self.linears, x_BtC, self._overlap.anchor)
        return tuple(_add_bias(out, linear) for out, linear in zip(outs, self.linears, strict=True))


class SharedForward:
    """The forward of one of several linears that share their products."""

    def __init__(self, shared: SharedProducts, index: int) -> None:
        self.shared, self.index = shared, index

    def __call__(self, x_BtC: torch.Tensor) -> torch.Tensor:
        """Return this linear's output."""
        return self.shared.take(self.index, x_BtC)


def split_backward(blocks: list[nn.Module], gradients: WeightGradients) -> None:
    """Let the linear maps of blocks on one tensor process leave their weights' gradients to `gradients`."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                _set_forward(module, SharedForward(SharedProducts([module], Unsplit(None), gradients), 0))


class TensorParallel:
    """Interprets the tensor part of a plan.

    Args:
        styles: module name -> style, from `resolve`.
        mesh: the live tensor axis.
        overlap: over the same group.
        gradients: where the weights' gradients go.
    """

    def __init__(
        self, styles: Mapping[str, TensorStyle], mesh: DeviceMesh, overlap: Overlap, gradients: WeightGradients
    ) -> None:
        self._styles, self._mesh, self._overlap, self._gradients = styles, mesh, overlap, gradients
        self._copies: dict[int, DeviceMesh] = {}

    def install(self, stage: nn.Module) -> None:
        """Split the parameters of a model or stage on the meta device, and replace the forwards of its modules."""
        modules = dict(stage.named_modules())
        for name, style in self._styles.items():
            if name in modules:
                for part in split(modules, name, style, self._mesh.size()):
                    self._distribute(part)
                self._replace_forward(modules, name, style)
        for module in modules.values():
            if kernels := Kernels.of(module):
                loss = partial(self._linear_cross_entropy, kernels.vocabulary_statistics)
                replaced: Any = replace(kernels, linear_cross_entropy=loss)
                module.kernels = replaced

    def _replace_forward(self, modules: dict[str, nn.Module], name: str, style: TensorStyle) -> None:
        module = modules[name]
        match style:
            case Columns():
                linears = [_linear(modules, f"{name}.{inner}") for inner in style.linears]
                shared = SharedProducts(linears, self._overlap, self._gradients)
                for index, linear in enumerate(linears):
                    _set_forward(linear, SharedForward(shared, index))
            case Row():
                _set_forward(module, self._row_forward(_linear(modules, name)))
            case VocabularyEmbedding():
                _set_forward(module, lambda ids_BT: embed(ids_BT, _weight(module), self._overlap))
            case SequenceSharded():
                _set_forward(module, _with_local_parameters(module))

    def _row_forward(self, linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x_BTD: torch.Tensor) -> torch.Tensor:
            out: Any = ProductScatter.apply(self._overlap, self._gradients, linear, x_BTD)
            return _add_bias(out, linear)

        return forward

    def _linear_cross_entropy(self, statistics, hidden_BtC, weight_VC, labels_BT):
        """As the op of this name, with the vocabulary split over the group."""
        owners = [SimpleNamespace(weight=weight_VC)]
        outs: Any = GatherProducts.apply(self._overlap, self._gradients, owners, hidden_BtC, self._overlap.anchor)
        logits_Nv, labels_N = outs[0].flatten(0, 1), labels_BT.flatten()
        lse_N, wanted_N = statistics(logits_Nv, labels_N, self._overlap.rank * logits_Nv.shape[-1])
        return VocabularyCrossEntropy.apply(lse_N, wanted_N, labels_N, self._overlap)

    def _distribute(self, part: SplitParameter) -> None:
        """Replace a parameter by a DTensor whose local part has this process's share of the size."""
        mesh = self._mesh if part.copies == 1 else self._mesh_of_copies(part.copies)
        parameter = getattr(part.owner, part.key)
        distributed = DTensor.from_local(
            torch.empty(part.local_shape, dtype=parameter.dtype, device=parameter.device),
            mesh,
            (part.placement, Replicate())[: mesh.ndim],
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        setattr(part.owner, part.key, nn.Parameter(distributed, requires_grad=parameter.requires_grad))

    def _mesh_of_copies(self, copies: int) -> DeviceMesh:
        """Return the tensor axis as (heads, copies of each)."""
        if copies not in self._copies:
            self._copies[copies] = self._mesh._unflatten(0, (self._mesh.size() // copies, copies), (HEADS, COPIES))
        return self._copies[copies]


@dataclass(frozen=True)
class SplitParameter:
    """A parameter and its part on one tensor process; each part is held by `copies` processes."""

    owner: nn.Module
    key: str
    placement: Placement
    local_shape: tuple[int, ...]
    copies: int = 1


def split(modules: dict[str, nn.Module], name: str, style: TensorStyle, size: int) -> Iterator[SplitParameter]:
    """Yield how the parameters of a module are split over `size` tensor processes.

    Raises:
        PlanError: a dim cannot be split evenly, or a module is of a kind that the style cannot treat.
    """
    match style:
        case Columns():
            for inner in style.linears:
                copies = max(1, size // style.heads.get(inner, size))
                for key, _ in _linear(modules, f"{name}.{inner}").named_parameters():
                    yield _part(modules, f"{name}.{inner}.{key}", Shard(0), size, copies)
        case Row():
            _linear(modules, name)
            yield _part(modules, f"{name}.weight", Shard(1), size)
            if modules[name].bias is not None:
                yield _part(modules, f"{name}.bias", Replicate(), size)
        case VocabularyEmbedding() | VocabularyHead():
            yield _part(modules, f"{name}.weight", Shard(0), size)
        case SequenceSharded():
            for key, _ in modules[name].named_parameters():
                yield _part(modules, f"{name}.{key}", Replicate(), size)


def _part(modules: dict[str, nn.Module], name: str, placement: Placement, size: int, copies: int = 1) -> SplitParameter:
    module, _, key = name.rpartition(".")
    shape = list(getattr(modules[module], key).shape)
    if isinstance(placement, Shard):
        parts = size // copies
        if shape[placement.dim] % parts:
            raise PlanError(
                f"parallel.tensor={size} cannot split {name} of shape {shape} along dim {placement.dim} into {parts} "
                f"equal parts; the degree must divide {shape[placement.dim]}; choose another, or pad the model's size"
            )
        shape[placement.dim] //= parts
    return SplitParameter(modules[module], key, placement, tuple(shape), copies)


def resolve(plan: ParallelPlan, model: nn.Module, size: int) -> dict[str, TensorStyle]:
    """Return module name -> style for a whole model that is to be split over `size` processes (local).

    Raises:
        PlanError: the family has no tensor plan, a pattern matches nothing, a parameter is covered by none, or one
            cannot be split.
    """
    if plan.tensor is None:
        raise PlanError("parallel.tensor: this model family has no tensor plan; add one, or set parallel.tensor=1")
    modules = dict(model.named_modules())
    styles = {name: style for pattern, style in plan.tensor.items() for name in match(pattern, modules, "tensor")}
    for name, style in styles.items():
        list(split(modules, name, style, size))
    covered = {prefix for name, style in styles.items() for prefix in _covered(name, style)}
    for parameter, _ in model.named_parameters():
        owner = parameter.rpartition(".")[0]
        if not any(owner == prefix or owner.startswith(f"{prefix}.") for prefix in covered):
            raise PlanError(
                f"parameter {parameter!r} has no style under the tensor axis; every parameter needs one; add a pattern "
                "that matches its module to the plan (SequenceSharded if it works on single tokens)"
            )
    return styles


def _covered(name: str, style: TensorStyle) -> Iterator[str]:
    yield from (f"{name}.{inner}" for inner in style.linears) if isinstance(style, Columns) else (name,)


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward


def _weight(module: nn.Module) -> torch.Tensor:
    return _local_part(module.weight)


def _add_bias(out: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return out if linear.bias is None else out + _local_part(linear.bias)


def _local_part(parameter: Any) -> torch.Tensor:
    return LocalPart.apply(parameter)  # pyright: ignore[reportReturnType]


def _linear(modules: dict[str, nn.Module], name: str) -> nn.Linear:
    module = modules.get(name)
    if not isinstance(module, nn.Linear):
        raise PlanError(f"{name} is {type(module).__name__}; Columns and Row need nn.Linear; change the plan")
    return module


def _with_local_parameters(module: nn.Module) -> Callable[..., Any]:
    """Return the module's forward, run with the local parts of its parameters in place of the DTensors."""
    inner_forward = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        held = [(m, key, p) for m in module.modules() for key, p in m._parameters.items() if p is not None]
        for owner, key, parameter in held:
            owner._parameters[key] = _local_part(parameter)  # pyright: ignore[reportArgumentType]
        try:
            return inner_forward(*args, **kwargs)
        finally:
            for owner, key, parameter in held:
                owner._parameters[key] = parameter

    return forward
