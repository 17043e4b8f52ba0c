"""A plain model made parallel from outside, in one visible order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardwright.kernels import Kernels
from shardwright.parallel.context import context_attention
from shardwright.parallel.init import fill_initial_values
from shardwright.parallel.mesh import Mesh
from shardwright.parallel.model import ParallelModel
from shardwright.parallel.pipeline.execute import Channels, Executor, Microbatch, edges
from shardwright.parallel.pipeline.schedule import Schedule, check, live_at_peak, load_schedule, make_schedule
from shardwright.parallel.pipeline.stage import cut, split_by_cost
from shardwright.parallel.plan import ParallelPlan, PlanError, TensorStyle
from shardwright.parallel.products import OVERLAPS, WeightGradients
from shardwright.parallel.recompute import recompute
from shardwright.parallel.shard import shard
from shardwright.parallel.tensor import TensorParallel, resolve, split_backward

if TYPE_CHECKING:
    from shardwright.conf.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is decided before any process group exists.

    Attributes:
        plan: of the model's family.
        schedule: of the pipeline; with one process along it, of its microbatches.
        split: which blocks each stage holds.
        styles: module name -> how it is split over the tensor axis; empty with one process along it.
    """

    plan: ParallelPlan
    schedule: Schedule
    split: list[range]
    styles: dict[str, TensorStyle]


def lay_out(model: nn.Module, plan: ParallelPlan, mesh: Mesh, config: TrainConfig) -> Layout:
    """Decide stages and schedule, and check the plan against the model (local; needs no memory and no groups).

    Raises:
        PlanError, ScheduleError: the model cannot be laid out so.
    """
    names = plan.match_blocks(name for name, _ in model.named_modules())
    tensor = mesh.degrees["tensor"]
    styles = resolve(plan, model, tensor) if tensor > 1 else {}
    if mesh.degrees["context"] > 1 and not any(Kernels.of(module) for module in model.modules()):
        raise PlanError(
            f"parallel.context={mesh.degrees['context']}: no module of this model has kernels, whose attention alone "
            "goes round a split sequence; call self.kernels.attention, or set parallel.context=1"
        )
    schedule = _schedule(mesh, config)
    if schedule.splits_backward and config.kernels.linear not in ("auto", "reference"):
        raise PlanError(
            f"kernels.linear={config.kernels.linear} computes both gradients at once, and parallel.pipeline_schedule="
            f"{config.parallel.pipeline_schedule} computes those of weights later; use kernels.linear=auto, or 1f1b"
        )
    split = [range(len(names))]
    if schedule.num_stages > 1:
        split = split_by_cost(model, plan, schedule.num_stages, config.train.sequence_length)
    return Layout(plan=plan, schedule=schedule, split=split, styles=styles)


def apply(
    model: nn.Module,
    layout: Layout,
    mesh: Mesh,
    config: TrainConfig,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> ParallelModel:
    """Make a model on the meta device parallel, give it memory and initial values (collective; mutates the model).

    One process computing in float32 runs the plain model, untouched: the specification of all layouts.
    """
    plan, schedule, parallel = layout.plan, layout.schedule, config.parallel
    rank, gradients = mesh.coordinate("pipeline"), WeightGradients()
    stages = {0: model}
    if schedule.num_stages > 1:
        stages = {stage: cut(model, plan, layout.split, stage) for stage in schedule.stages_of(rank)}
    blocks = {stage: _blocks(module, plan) for stage, module in stages.items()}
    all_blocks = [block for several in blocks.values() for block in several]
    if mesh.degrees["context"] > 1:
        _install_context(stages.values(), mesh, config)
    if layout.styles:
        overlap = OVERLAPS[parallel.tensor_overlap](mesh.get_group("tensor"))
        tensor = TensorParallel(layout.styles, mesh.get("tensor"), overlap, gradients)
        for module in stages.values():
            tensor.install(module)
    elif schedule.splits_backward:
        split_backward(all_blocks, gradients)
    live = live_at_peak(schedule, rank)
    recompute(
        all_blocks,
        config.recompute,
        [live[stage] for stage, several in blocks.items() for _ in several],
    )
    num_shards = mesh.degrees["shard"] * mesh.degrees["context"]
    free_weights = parallel.zero == 3 or (parallel.zero == "auto" and schedule.num_ranks == 1 and num_shards > 1)
    for stage, module in stages.items():
        if mesh.data_degree * mesh.degrees["context"] > 1 or compute_dtype != torch.float32:
            shard(module, blocks[stage], mesh, compute_dtype, free_after_forward=free_weights)
        module.to_empty(device=device)
        fill_initial_values(module, plan, config.train.seed)
    channels = Channels(mesh.get_group("pipeline"), device, edges(schedule)) if schedule.num_ranks > 1 else None
    executor = Executor(
        schedule,
        rank,
        stages,
        gradients=gradients,
        hidden=_hidden_states(plan, mesh, device, compute_dtype),
        channels=channels,
        free_weights=free_weights,
    )
    ends = schedule.ranks[0], schedule.ranks[-1]
    return ParallelModel(
        stages, executor, mesh, context_mode=parallel.context_mode, tied=_tied(model, plan, schedule), ends=ends
    )


def num_microbatches(config: TrainConfig, data_degree: int) -> int:
    """Return the microbatches of a step on each process."""
    return config.train.global_batch_sequences // (data_degree * config.train.microbatch_sequences)


def _schedule(mesh: Mesh, config: TrainConfig) -> Schedule:
    parallel, num_ranks = config.parallel, mesh.degrees["pipeline"]
    count = num_microbatches(config, mesh.data_degree)
    if num_ranks == 1:
        return make_schedule("1f1b", num_ranks=1, num_chunks=1, num_microbatches=count)
    if parallel.pipeline_schedule.endswith((".yaml", ".yml")):
        return load_schedule(parallel.pipeline_schedule, num_ranks=num_ranks, num_microbatches=count)
    schedule = make_schedule(
        parallel.pipeline_schedule, num_ranks=num_ranks, num_chunks=parallel.num_chunks, num_microbatches=count
    )
    check(schedule)
    return schedule


def _blocks(stage: nn.Module, plan: ParallelPlan) -> list[nn.Module]:
    modules = dict(stage.named_modules())
    return [modules[name] for name in plan.match_blocks(modules)]


def _install_context(stages: Iterable[nn.Module], mesh: Mesh, config: TrainConfig) -> None:
    for module in (module for stage in stages for module in stage.modules()):
        if kernels := Kernels.of(module):
            attention = context_attention(kernels.attention, config.parallel.context_mode, mesh.get_group("context"))
            replaced: Any = replace(kernels, attention=attention)
            module.kernels = replaced


def _hidden_states(
    plan: ParallelPlan, mesh: Mesh, device: torch.device, dtype: torch.dtype
) -> Callable[[Microbatch], torch.Tensor]:
    """Return what makes an empty tensor for the hidden states of a microbatch [B, t, C] on this process."""

    def empty(microbatch: Microbatch) -> torch.Tensor:
        assert plan.ends is not None
        num_sequences, length = microbatch[1].shape
        shape = num_sequences, length // mesh.degrees["tensor"], plan.ends.hidden_size
        return torch.empty(shape, device=device, dtype=dtype)

    return empty


def _tied(model: nn.Module, plan: ParallelPlan, schedule: Schedule) -> list[str]:
    if schedule.num_stages == 1 or plan.ends is None:
        return []
    both = set(plan.ends.first) & set(plan.ends.last)
    return [name for name, _ in model.named_parameters() if any(name.startswith(f"{module}.") for module in both)]
