"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from shardwright.conf.schema import CosineConfig, WarmupStableDecayConfig


def lr_factor(config: WarmupStableDecayConfig | CosineConfig, step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate that a step uses.

    Args:
        config: the schedule.
        step: steps done before this one; the first step is 0.
        num_steps: steps of the whole run.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_lr_ratio
    if isinstance(config, CosineConfig):
        share = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    decay_steps = round(config.decay_fraction * num_steps)
    left = num_steps - step
    return floor + (1 - floor) * min(1.0, left / max(decay_steps, 1))
