"""The training loop: asks the engine for steps, lets those look whose turn it is. Names no axis."""

from __future__ import annotations

import hashlib
import logging

import torch

from shardwright.observe.record import Meter
from shardwright.trainer.build import Run
from shardwright.trainer.guards import GracefulStop
from shardwright.trainer.measure import measure
from shardwright.trainer.saves import Saves
from shardwright.trainer.schedule import lr_factor

logger = logging.getLogger(__name__)


def train(run: Run) -> bool:
    """Train to the end, or to an agreed stop (collective). Returns whether the end was reached."""
    config, progress, num_steps = run.config, run.progress, run.config.train.num_steps
    meter, stop, stopping = Meter(), GracefulStop(), False
    saves = Saves(config.checkpoint, run.parts, run.memory, run.world.rank)
    if progress.step >= num_steps:
        logger.info(f"nothing to do: step {progress.step} of train.num_steps={num_steps} is done; raise it to go on")
    else:
        saves.prepare()
    while progress.step < num_steps and not stopping:
        with meter.waiting():
            batches = next(run.loader)
        torch.manual_seed(step_seed(config.train.seed, progress.step, run.stream))
        lr = config.optim.peak_lr * lr_factor(config.schedule, progress.step, num_steps)
        result = run.engine.train_step(batches, lr=lr, before_update=saves.wait_staged)
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
                saves.begin(progress.step)
            elif _is_due(progress.step, config.checkpoint.memory_every_steps):
                saves.begin(progress.step, in_memory=True)
            else:
                saves.look()
    stop.close()
    saves.close()
    if stopping:
        logger.info(f"stopped on a signal after step {progress.step}; the same command goes on from there")
    return progress.step >= num_steps


def step_seed(seed: int, step: int, stream: int) -> int:
    """Return the seed of torch's generators for one step: a resumed run draws what it would have drawn, unsaved.

    Args:
        seed: of the run.
        step: number of the step.
        stream: one per process; processes along the tensor axis share one.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=7).digest(), "little")


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0
