"""A finished step as the record that is reported."""

from __future__ import annotations

from shardwright.models.registry import FAMILIES
from shardwright.observe.hardware import peak_flops, peak_memory_gib
from shardwright.observe.record import Meter, StepRecord
from shardwright.trainer.build import Run
from shardwright.trainer.engine import StepResult


def measure(run: Run, meter: Meter, result: StepResult, lr: float) -> StepRecord:
    """Read the device once and turn the time since the last reading into rates (collective)."""
    train, progress, world = run.config.train, run.progress, run.world
    values = run.engine.read(result)
    step_seconds, wait_seconds = meter.read()
    rate = train.tokens_per_step / step_seconds / world.num_processes
    peak = None if train.precision == "fp32" else peak_flops(world.device)  # a bf16 peak

    def mfu(attention: str) -> float | None:
        count = FAMILIES[run.config.model.kind].flops_per_token(run.config.model, train.sequence_length, attention)
        return rate * count / peak if peak else None

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
        mfu_full=mfu("full"),
        mfu_causal=mfu("causal"),
        skipped_steps=values.num_skipped,
        eta_seconds=(train.num_steps - progress.step) * step_seconds,
    )
