"""From a config to a run, in one straight line: first everything that can be refused, then the processes."""

from __future__ import annotations

import logging
import platform
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from shardwright.checkpoint import HostMemory, Stateful
from shardwright.conf import ConfigError
from shardwright.conf.schema import TrainConfig
from shardwright.data.loader import Loader, Position, Share, held_out_batches, merge_lanes
from shardwright.data.pack import Batch
from shardwright.data.text import Text, load_text
from shardwright.kernels import Kernels, select
from shardwright.models.registry import FAMILIES
from shardwright.observe.hardware import device_name
from shardwright.observe.sinks import Sinks, check_tensorboard, make_sinks, wandb_mode
from shardwright.parallel.apply import Layout, apply, lay_out
from shardwright.parallel.mesh import DATA_AXES, Mesh
from shardwright.parallel.plan import ParallelPlan
from shardwright.parallel.world import World, use_deterministic_algorithms
from shardwright.trainer.engine import Engine
from shardwright.trainer.guards import lock_folder
from shardwright.trainer.native import NativeEngine
from shardwright.trainer.optim import Optimizer
from shardwright.trainer.resume import DataPosition, Progress, find_candidates, restore
from shardwright.trainer.saves import open_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the loop drives.

    `parts` is what a checkpoint holds, `memory` where the hosts keep one, `stream` the number of this process's
    stream of random numbers; `cleanup` undoes what `build` started.
    """

    config: TrainConfig
    world: World
    engine: Engine
    loader: Loader
    held_out: list[list[Batch]]
    parts: dict[str, Stateful]
    memory: HostMemory | None
    stream: int
    progress: Progress
    sinks: Sinks
    cleanup: ExitStack


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What one process can find out and refuse on its own, before any group starts."""

    world: World
    mesh: Mesh
    share: Share
    kernels: Kernels
    model: nn.Module
    layout: Layout
    text: Text
    compute_dtype: torch.dtype
    candidates: list[str]
    wandb: str | None


def prepare(config: TrainConfig) -> Prepared:
    """Check the config against processes, devices, data, kernels and checkpoints.

    Raises:
        ConfigError, TopologyError, KernelError, DataError, CheckpointError: what cannot be run.
    """
    train = config.train
    world = World.from_environment(train.device)
    mesh = Mesh.of(config.parallel, num_processes=world.num_processes, rank=world.rank)
    share = plan_share(config, mesh)
    bf16 = train.precision == "bf16" or (train.precision == "auto" and world.device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    check_tensorboard(config.observe.tensorboard)
    kernels = select(config.kernels, device=world.device.type, dtype=dtype, sizes=config.model.kernel_sizes)
    model, plan = make_plain_model(config, kernels)
    return Prepared(
        world=world,
        mesh=mesh,
        share=share,
        kernels=kernels,
        model=model,
        layout=lay_out(model, plan, mesh, config),
        compute_dtype=dtype,
        wandb=wandb_mode(config.observe.wandb) if world.rank == 0 else None,
        candidates=find_candidates(config.checkpoint),
        text=load_text(
            config.data,
            vocab_size=config.model.vocab_size,
            num_lanes=train.global_batch_sequences,
            seed=train.seed,
        ),
    )


def build(config: TrainConfig, plain_config: dict[str, Any]) -> Run:
    """Prepare, start the processes, make the model, restore the newest state (collective).

    Args:
        config: the run.
        plain_config: the same as plain containers, kept in the run folder and in every checkpoint.

    Raises:
        ConfigError, TopologyError, KernelError, DataError, CheckpointError: what cannot be run.
    """
    ready = prepare(config)
    world, share = ready.world, ready.share
    if config.train.deterministic:
        use_deterministic_algorithms()
    with ExitStack() as cleanup:
        if world.rank == 0:
            cleanup.enter_context(lock_folder(Path(config.run.folder)))
        cleanup.callback(world.stop)
        world.start()
        mesh = ready.mesh.start(world.device.type)
        num_parameters = sum(p.numel() for p in ready.model.parameters())
        model = apply(ready.model, ready.layout, mesh, config, device=world.device, compute_dtype=ready.compute_dtype)
        optimizer = Optimizer(config.optim, model, ready.kernels.optimizer)
        engine = NativeEngine(model, optimizer, mesh, world.device, config.optim.max_grad_norm)
        progress = Progress(wandb_id=secrets.token_hex(4), config=plain_config)
        data_position = DataPosition(Position.start(config.train.global_batch_sequences))
        parts = {**engine.parts, "progress": progress, "data": data_position}
        memory = open_memory(config.checkpoint, config.run.folder, mesh)
        resumed = restore(
            ready.candidates, parts, memory, automatic=ready.candidates != [config.checkpoint.resume.rstrip("/")]
        )
        _announce(config, ready, num_parameters, resumed)

        position = data_position.position
        loader = Loader(
            ready.text.open(position, share),
            ready.text.tokenizer,
            share,
            position,
            prefetch_batches=config.data.prefetch_batches,
            pin_memory=world.device.type == "cuda",
        )
        cleanup.callback(loader.close)
        data_position.current = lambda: merge_lanes(loader.position, share, lambda lanes: mesh.sum(lanes, DATA_AXES))
        sinks = open_sinks(config, plain_config, ready, progress)
        cleanup.callback(sinks.close)
        return Run(
            config=config,
            world=world,
            engine=engine,
            loader=loader,
            held_out=held_out_batches(ready.text.held_out, ready.text.tokenizer, share, config.evaluate.num_batches),
            parts=parts,
            memory=memory,
            stream=world.rank // mesh.degrees["tensor"],
            progress=progress,
            sinks=sinks,
            cleanup=cleanup.pop_all(),
        )


def open_sinks(config: TrainConfig, plain_config: dict[str, Any], ready: Prepared, progress: Progress) -> Sinks:
    """Write the config into the run folder and open the sinks, on rank 0; the others report nothing."""
    if ready.world.rank:
        return Sinks([])
    (Path(config.run.folder) / "config.yaml").write_text(yaml.safe_dump(plain_config, sort_keys=False), "utf-8")
    return make_sinks(config, plain_config, step=progress.step, wandb_id=progress.wandb_id, mode=ready.wandb)


def make_plain_model(config: TrainConfig, kernels: Kernels) -> tuple[nn.Module, ParallelPlan]:
    """Return the plain model without memory (on the meta device), and its family's plan."""
    family = FAMILIES[config.model.kind]
    with torch.device("meta"):
        return family.build(config.model, kernels), family.plan(config.model)


def plan_share(config: TrainConfig, mesh: Mesh) -> Share:
    """Return what this process takes of each global batch.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    train, degree = config.train, mesh.data_degree
    unit = train.microbatch_sequences * degree
    if train.global_batch_sequences % unit:
        raise ConfigError(
            f"train.global_batch_sequences={train.global_batch_sequences} cannot be shared out; it must be a multiple "
            f"of microbatch_sequences x data-parallel processes = {train.microbatch_sequences} x {degree}; "
            f"use {-(-train.global_batch_sequences // unit) * unit}"
        )
    return Share(
        sequence_length=train.sequence_length,
        global_batch_sequences=train.global_batch_sequences,
        microbatch_sequences=train.microbatch_sequences,
        data_rank=mesh.data_rank,
        data_degree=degree,
    )


def _announce(config: TrainConfig, ready: Prepared, num_parameters: int, resumed: str | None) -> None:
    train, flops = config.train, FAMILIES[config.model.kind].flops_per_token
    logger.info(
        f"{config.run.name}: {config.model.name}, {num_parameters:,} parameters, "
        f"{flops(config.model, train.sequence_length, 'causal') / 1e9:.3g} GFLOP per token (causal), "
        f"{str(ready.compute_dtype).removeprefix('torch.')} on {ready.mesh}, {device_name(ready.world.device)}; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    logger.info(
        f"{train.num_steps} steps of {train.global_batch_sequences} x {train.sequence_length} tokens "
        f"= {train.num_steps * train.tokens_per_step / 1e6:.1f} M tokens; "
        f"settings in {config.run.folder}/config.yaml"
    )
    schedule, split = ready.layout.schedule, ready.layout.split
    if len(split) > 1:
        sizes = ", ".join(f"{len(blocks)} on rank {rank}" for blocks, rank in zip(split, schedule.ranks, strict=True))
        logger.info(
            f"pipeline {schedule.name}, {schedule.num_microbatches} microbatches; blocks of each stage: {sizes}"
        )
    logger.info(f"resumed from {resumed}" if resumed else "starting afresh: no checkpoint to resume from")
