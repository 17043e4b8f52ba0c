"""The training loop: asks the engine for steps, lets those look whose turn it is. Names no axis."""

from __future__ import annotations

import logging
from pathlib import Path

from shardwright import checkpoint
from shardwright.observe.record import Meter
from shardwright.trainer.build import Run
from shardwright.trainer.guards import GracefulStop
from shardwright.trainer.measure import measure
from shardwright.trainer.schedule import lr_factor

logger = logging.getLogger(__name__)


def train(run: Run) -> bool:
    """Train to the end, or to an agreed stop (collective). Returns whether the end was reached."""
    config, progress, num_steps = run.config, run.progress, run.config.train.num_steps
    if progress.step >= num_steps:
        logger.info(f"nothing to do: step {progress.step} of train.num_steps={num_steps} is done; raise it to go on")
    meter, stop, stopping = Meter(), GracefulStop(), False
    while progress.step < num_steps and not stopping:
        with meter.waiting():
            batches = next(run.loader)
        lr = config.optim.peak_lr * lr_factor(config.schedule, progress.step, num_steps)
        result = run.engine.train_step(batches, lr=lr)
        progress.step += 1
        progress.tokens += config.train.tokens_per_step
        stopping, last = stop.poll(), progress.step == num_steps
        run.sinks.advance(progress.step)
        if last or _is_due(progress.step, config.observe.every_steps):
            run.sinks.step(measure(run, meter, result, lr))
        with meter.excluded():
            if last or _is_due(progress.step, config.evaluate.every_steps):
                run.sinks.evaluation(progress.step, run.engine.evaluate(run.held_out))
            if last or stopping or _is_due(progress.step, config.checkpoint.every_steps):
                _save(run, must=last or stopping)
    stop.close()
    if stopping:
        logger.info(f"stopped on a signal after step {progress.step}; the same command goes on from there")
    return progress.step >= num_steps


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def _save(run: Run, *, must: bool) -> None:
    """Save (collective); a failure that is not the last chance is logged, and training goes on."""
    folder, step = Path(run.config.checkpoint.folder), run.progress.step
    path = checkpoint.step_folder(folder, step)
    try:
        checkpoint.save(path, run.parts)
    except checkpoint.CheckpointError as error:
        if must:
            raise
        logger.error(f"step {step} is not saved, training goes on: {error}")
        return
    if run.world.rank == 0:
        checkpoint.retain(folder, run.config.checkpoint.keep)
    logger.info(f"saved {path}")
