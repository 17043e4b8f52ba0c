"""The training loop: asks the engine for steps, lets those look whose turn it is. Names no axis."""

from __future__ import annotations

import logging
from pathlib import Path

from shardwright import checkpoint
from shardwright.models.registry import FAMILIES
from shardwright.observe.hardware import peak_flops, peak_memory_gib
from shardwright.observe.record import Meter, StepRecord
from shardwright.trainer.build import Run
from shardwright.trainer.engine import StepResult
from shardwright.trainer.guards import GracefulStop
from shardwright.trainer.schedule import lr_factor

logger = logging.getLogger(__name__)


def train(run: Run) -> bool:
    """Train to the end, or to an agreed stop (collective). Returns whether the end was reached."""
    config, progress = run.config, run.progress
    num_steps, meter, stop = config.train.num_steps, Meter(), GracefulStop()
    tokens_per_step = config.train.global_batch_sequences * config.train.sequence_length
    stopping, saved_step = False, progress.step
    while progress.step < num_steps and not stopping:
        with meter.waiting():
            batches = next(run.loader)
        lr = config.optim.peak_lr * lr_factor(config.schedule, progress.step, num_steps)
        result = run.engine.train_step(batches, lr=lr)
        progress.step += 1
        progress.tokens += tokens_per_step
        stopping, last = stop.poll(), progress.step == num_steps
        run.sinks.advance(progress.step)
        if progress.step % config.observe.every_steps == 0 or last:
            run.sinks.step(_measure(run, meter, result, lr))
        with meter.excluded():
            if last or _is_due(progress.step, config.evaluate.every_steps):
                run.sinks.evaluation(progress.step, run.engine.evaluate(run.held_out))
            if last or stopping or _is_due(progress.step, config.checkpoint.every_steps):
                saved_step = _save(run, must=last or stopping) or saved_step
    stop.close()
    if stopping:
        logger.warning(f"stopped on SIGTERM after step {progress.step}; the same command goes on from {saved_step}")
    return progress.step >= num_steps


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def _measure(run: Run, meter: Meter, result: StepResult, lr: float) -> StepRecord:
    """Read the device once and turn the interval into rates (collective)."""
    config, progress, world = run.config, run.progress, run.world
    values = run.engine.read(result)
    step_seconds, wait_seconds = meter.read()
    tokens_per_step = config.train.global_batch_sequences * config.train.sequence_length
    rate = tokens_per_step / step_seconds / world.num_processes
    peak, count_flops = peak_flops(world.device), FAMILIES[config.model.kind].flops_per_token
    mfu = {
        f"mfu_{kind}": rate * count_flops(config.model, config.train.sequence_length, kind) / peak if peak else None
        for kind in ("full", "causal")
    }
    return StepRecord(
        step=progress.step,
        tokens=progress.tokens,
        loss=values.loss,
        grad_norm=values.grad_norm,
        lr=lr,
        tokens_per_second_per_gpu=rate,
        step_seconds=step_seconds,
        data_wait_seconds=wait_seconds,
        memory_gib=peak_memory_gib(world.device),
        skipped_steps=values.num_skipped,
        eta_seconds=(config.train.num_steps - progress.step) * step_seconds,
        **mfu,
    )


def _save(run: Run, *, must: bool) -> int | None:
    """Save (collective) and return the step; a failure that is not the last chance is logged, and training goes on."""
    folder = Path(run.config.checkpoint.folder)
    path = checkpoint.step_folder(folder, run.progress.step)
    try:
        checkpoint.save(path, {**run.engine.parts, "progress": run.progress, "data": run.data_position})
    except checkpoint.CheckpointError as error:
        if must:
            raise
        logger.error(f"step {run.progress.step} is not saved, training goes on: {error}")
        return None
    if run.world.rank == 0:
        checkpoint.retain(folder, run.config.checkpoint.keep)
    logger.info(f"saved {path}")
    return run.progress.step
