"""Tensor and sequence parallelism: installs a plan's styles on a plain model's modules.

Weights become DTensors over the tensor axis; computation runs on their local parts with explicit collectives
(`products`, `vocabulary`), so that communication can be overlapped. Between products, every process holds its own
1 / P of the tokens; only inside them does it hold all tokens, of its heads and features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from shardwright.kernels import Kernels
from shardwright.parallel.gradients import local
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

    def forward_of(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the forward of one of the linears."""

        def forward(x_BtC: torch.Tensor) -> torch.Tensor:
            if self._input is not x_BtC or index not in self._outputs:
                self._input, self._outputs = x_BtC, dict(enumerate(self.products(x_BtC)))
            output = self._outputs.pop(index)
            if not self._outputs:
                self._input = None
            return output

        return forward

    def _products(self, x_BtC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = [local(linear.weight) for linear in self.linears]
        outs = GatherProducts.apply(self._overlap, self._gradients, self.linears, x_BtC, *weights)
        return tuple(
            out if linear.bias is None else out + local(linear.bias)
            for out, linear in zip(outs, self.linears, strict=True)  # pyright: ignore[reportArgumentType]
        )


def split_backward(blocks: list[nn.Module], gradients: WeightGradients) -> None:
    """Let the linear maps of blocks on one tensor process leave their weights' gradients to `gradients`."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.forward = SharedProducts([module], Unsplit(None), gradients).forward_of(0)


class TensorParallel:
    """Interprets the tensor part of a plan.

    Args:
        plan: of the model's family.
        model: the whole plain model, for the patterns' matches; it is not changed.
        mesh: the live tensor axis.
        overlap: over the same group.
        gradients: where the weights' gradients go.

    Raises:
        PlanError: the family has no tensor plan, a pattern matches nothing, or a parameter is covered by none.
    """

    def __init__(
        self, plan: ParallelPlan, model: nn.Module, mesh: DeviceMesh, overlap: Overlap, gradients: WeightGradients
    ) -> None:
        self._mesh, self._overlap, self._gradients = mesh, overlap, gradients
        self._styles = resolve(plan, model)
        self._copies: dict[int, DeviceMesh] = {}

    def install(self, stage: nn.Module) -> None:
        """Split the parameters of a model or stage on the meta device, and replace the forwards of its modules."""
        modules = dict(stage.named_modules())
        for name, style in self._styles.items():
            if name in modules:
                self._install(modules, name, style)
        for module in modules.values():
            if isinstance(getattr(module, "kernels", None), Kernels):
                module.kernels = replace(module.kernels, linear_cross_entropy=self._linear_cross_entropy)

    def _install(self, modules: dict[str, nn.Module], name: str, style: TensorStyle) -> None:
        module = modules[name]
        match style:
            case Columns():
                linears = [_linear(modules, f"{name}.{inner}") for inner in style.linears]
                shared = SharedProducts(linears, self._overlap, self._gradients)
                for index, (inner, linear) in enumerate(zip(style.linears, linears, strict=True)):
                    heads = style.heads.get(inner, self._mesh.size())
                    self._distribute(f"{name}.{inner}", linear, weight=Shard(0), bias=Shard(0), heads=heads)
                    linear.forward = shared.forward_of(index)
            case Row():
                linear = _linear(modules, name)
                self._distribute(name, linear, weight=Shard(1), bias=Replicate())
                linear.forward = self._row_forward(linear)
            case VocabularyEmbedding():
                self._distribute(name, module, weight=Shard(0))
                module.forward = lambda ids_BT: embed(ids_BT, local(module.weight), self._overlap)  # pyright: ignore
            case VocabularyHead():
                self._distribute(name, module, weight=Shard(0))
            case SequenceSharded():
                self._distribute(name, module, **{key: Replicate() for key, _ in module.named_parameters()})
                module.forward = _with_local_parameters(module)

    def _row_forward(self, linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x_BTD: torch.Tensor) -> torch.Tensor:
            out = ProductScatter.apply(self._overlap, self._gradients, linear, x_BTD, local(linear.weight))
            return out if linear.bias is None else out + local(linear.bias)  # pyright: ignore

        return forward

    def _linear_cross_entropy(self, hidden_BtC, weight_VC, labels_BT):
        """As the op of this name, with the vocabulary split over the group."""
        now = WeightGradients()
        logits_BTv = GatherProducts.apply(self._overlap, now, (), hidden_BtC, local(weight_VC))[0]  # pyright: ignore
        return VocabularyCrossEntropy.apply(logits_BTv.flatten(0, 1), labels_BT.flatten(), self._overlap)

    def _distribute(self, name: str, module: nn.Module, *, heads: int | None = None, **placements: Placement) -> None:
        """Replace parameters by DTensors whose local part has this process's share of the size."""
        size = self._mesh.size()
        mesh, copies = self._mesh, 1
        if heads is not None and heads < size:
            mesh, copies = self._mesh_of_heads(heads), size // heads
        for key, placement in placements.items():
            owner, _, leaf = key.rpartition(".")
            inner = module.get_submodule(owner)
            parameter = getattr(inner, leaf)
            if parameter is None:
                continue
            shape = list(parameter.shape)
            if isinstance(placement, Shard):
                parts = size // copies
                if shape[placement.dim] % parts:
                    raise PlanError(
                        f"parallel.tensor={size}: {name}.{key} has {shape[placement.dim]} features to split in {parts}; "
                        "the degree must divide them; choose another degree, or pad the model's size"
                    )
                shape[placement.dim] //= parts
            distributed = DTensor.from_local(
                torch.empty(shape, dtype=parameter.dtype, device=parameter.device),
                mesh,
                (placement, Replicate())[: mesh.ndim],
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            setattr(inner, leaf, nn.Parameter(distributed, requires_grad=parameter.requires_grad))

    def _mesh_of_heads(self, heads: int) -> DeviceMesh:
        """Return the tensor axis as (heads, copies of each)."""
        if heads not in self._copies:
            sizes = (heads, self._mesh.size() // heads)
            self._copies[heads] = self._mesh._unflatten(0, sizes, (HEADS, COPIES))
        return self._copies[heads]


def resolve(plan: ParallelPlan, model: nn.Module) -> dict[str, TensorStyle]:
    """Return module name -> style for a whole model.

    Raises:
        PlanError: see `TensorParallel`.
    """
    if plan.tensor is None:
        raise PlanError("parallel.tensor: this model family has no tensor plan; add one, or set parallel.tensor=1")
    names = [name for name, _ in model.named_modules()]
    styles = {name: style for pattern, style in plan.tensor.items() for name in match(pattern, names, "tensor")}
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
            owner._parameters[key] = local(parameter)  # pyright: ignore[reportArgumentType]
        try:
            return inner_forward(*args, **kwargs)
        finally:
            for owner, key, parameter in held:
                owner._parameters[key] = parameter

    return forward
