"""What parallelism needs to know of the Llama family, as data."""

from __future__ import annotations

from shardwright.conf.schema import LlamaConfig
from shardwright.parallel.plan import Constant, Normal, ParallelPlan


def plan(config: LlamaConfig) -> ParallelPlan:
    """Return the family's plan: its block modules and its initial values.

    Projections that write into the residual stream start smaller by sqrt(2 * layers), so that the stream's variance
    does not grow with depth (GPT-2).
    """
    std = 0.02
    return ParallelPlan(
        blocks=("layers.*",),
        initial_values={
            "*norm.weight": Constant(1.0),
            "*.attention.o.weight": Normal(std / (2 * config.num_layers) ** 0.5),
            "*.feed_forward.down.weight": Normal(std / (2 * config.num_layers) ** 0.5),
            "*.weight": Normal(std),
        },
    )
