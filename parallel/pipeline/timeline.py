"""What a schedule costs in time: simulated, drawn, and written as a trace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shardwright.parallel.pipeline.schedule import (
    Action,
    Result,
    Schedule,
    ScheduleError,
    execution_order,
    peak_live_of,
)

KINDS = {  # kind -> what it is, its colour
    "F": ("forward", "#4878cf"),
    "B": ("backward", "#6aa84f"),
    "I": ("backward for the input", "#3aa6a0"),
    "W": ("backward for the weights", "#e39a3b"),
}


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds that one microbatch takes.

    Attributes:
        forward: of each stage.
        backward_input: of each stage, gradient of its input.
        backward_weight: of each stage, gradient of its weights; a whole backward costs the sum of both.
        transfer: of one activation or gradient from rank to rank.
    """

    forward: Sequence[float]
    backward_input: Sequence[float]
    backward_weight: Sequence[float]
    transfer: float = 0

    def __post_init__(self) -> None:
        times = (*self.forward, *self.backward_input, *self.backward_weight, self.transfer)
        if min(times) < 0 or max(times) == 0:
            raise ScheduleError(f"costs {self} have a negative time or none above 0; give seconds")

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        *,
        forward: float = 1,
        backward_input: float = 1,
        backward_weight: float = 1,
        transfer: float = 0,
    ) -> Costs:
        """Return the costs of stages that are all alike."""
        return cls(
            forward=(forward,) * num_stages,
            backward_input=(backward_input,) * num_stages,
            backward_weight=(backward_weight,) * num_stages,
            transfer=transfer,
        )

    def of(self, action: Action) -> float:
        """Return the seconds of an action."""
        if action.kind == "F":
            return self.forward[action.stage]
        for_input, for_weight = self.backward_input[action.stage], self.backward_weight[action.stage]
        return {"B": for_input + for_weight, "I": for_input, "W": for_weight}[action.kind]


@dataclass(frozen=True)
class Span:
    """When a rank runs an action, in seconds from the start of the step."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One step of a schedule in time: the spans by rank, each rank's in the order of its actions."""

    spans: tuple[Span, ...]
    num_ranks: int

    @cached_property
    def total_seconds(self) -> float:
        """Seconds from the first action's start to the last one's end, over all ranks."""
        return max(span.end for span in self.spans)

    @cached_property
    def bubble_fraction(self) -> float:
        """The part of the ranks' time in which they stand idle."""
        busy = sum(span.end - span.start for span in self.spans)
        return 1 - busy / (self.num_ranks * self.total_seconds)

    @cached_property
    def peak_live(self) -> tuple[int, ...]:
        """Per rank, the most (stage, microbatch) pairs whose activations it holds at once."""
        return tuple(
            peak_live_of(span.action for span in self.spans if span.rank == rank) for rank in range(self.num_ranks)
        )


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Return when each action runs if every rank starts its next action as soon as its inputs are there.

    A message travels once it is made and its receive is posted, which happens when the receiver's preceding action
    starts; sends hold up nobody. Two messages never share a channel: the second receive is posted after the first
    message has been used.

    Raises:
        ScheduleError: the schedule deadlocks, or the costs are for another number of stages.
    """
    for times in (costs.forward, costs.backward_input, costs.backward_weight):
        if len(times) != schedule.num_stages:
            raise ScheduleError(f"costs of {len(times)} stages for a schedule of {schedule.num_stages}; give one each")
    made: dict[Result, float] = {}
    free = [0.0] * schedule.num_ranks
    posted = [0.0] * schedule.num_ranks  # when the rank's latest action started
    spans = []
    for action in execution_order(schedule):
        rank = schedule.ranks[action.stage]
        start = free[rank]
        for source in action.inputs(schedule.num_stages):
            if schedule.ranks[source[0]] == rank:
                start = max(start, made[source])
            else:
                start = max(start, max(made[source], posted[rank]) + costs.transfer)
        end = start + costs.of(action)
        free[rank], posted[rank] = end, start
        result = action.result()
        if result:
            made[result] = end
        spans.append(Span(rank, action, start, end))
    return Timeline(tuple(sorted(spans, key=lambda span: span.rank)), schedule.num_ranks)


def draw(timelines: Mapping[str, Timeline], path: str | Path) -> None:
    """Draw timelines into a PNG, one panel each under its title, all on one time axis.

    Later chunks of a rank are paler; microbatch numbers appear where they can be read.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height = sum(0.9 + 0.26 * timeline.num_ranks for timeline in timelines.values())
    figure = Figure(figsize=(14, 0.8 + height), layout="constrained")
    ratios = [0.9 + 0.26 * timeline.num_ranks for timeline in timelines.values()]
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    longest = max(timeline.total_seconds for timeline in timelines.values())
    for panel, (title, timeline) in zip(panels, timelines.items(), strict=True):
        _draw_panel(panel, timeline, seconds_per_inch=longest / 13)
        panel.set_title(
            f"{title}: {timeline.total_seconds:.4g} s, bubble {timeline.bubble_fraction:.1%}, "
            f"at most {max(timeline.peak_live)} (stage, microbatch) live",
            loc="left",
            fontsize=10,
        )
    panels[-1].set(xlabel="seconds", xlim=(0, longest))
    kinds = {span.action.kind for timeline in timelines.values() for span in timeline.spans}
    figure.legend(
        handles=[Patch(color=colour, label=name) for kind, (name, colour) in KINDS.items() if kind in kinds],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.savefig(path, format="png", dpi=110)


def write_trace(timeline: Timeline, path: str | Path) -> None:
    """Write a timeline as Chrome trace JSON, which Perfetto opens: one track per rank, times in microseconds."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(timeline.num_ranks)
    ]
    for span in timeline.spans:
        action = span.action
        events.append(
            {
                "ph": "X",
                "name": str(action),
                "cat": KINDS[action.kind][0],
                "pid": 0,
                "tid": span.rank,
                "ts": span.start * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"stage": action.stage, "microbatch": action.microbatch},
            }
        )
    Path(path).write_text(json.dumps({"traceEvents": events}), "utf-8")


def _draw_panel(panel: Any, timeline: Timeline, seconds_per_inch: float) -> None:
    stages: dict[int, set[int]] = {rank: set() for rank in range(timeline.num_ranks)}
    for span in timeline.spans:
        stages[span.rank].add(span.action.stage)
    chunk_of = {stage: i for held in stages.values() for i, stage in enumerate(sorted(held))}
    bars: dict[tuple[int, str, int], list[tuple[float, float]]] = {}
    for span in timeline.spans:
        action, width = span.action, span.end - span.start
        bars.setdefault((span.rank, action.kind, chunk_of[action.stage]), []).append((span.start, width))
        label = str(action.microbatch)
        if width / seconds_per_inch > 0.07 * len(label) + 0.03:  # inches that 8-point digits take
            panel.text(span.start + width / 2, span.rank, label, ha="center", va="center_baseline", fontsize=8)
    typical = sum(span.end - span.start for span in timeline.spans) / len(timeline.spans)
    edge = 0.4 if typical / seconds_per_inch > 0.05 else 0  # narrower bars would be all edge
    for (rank, kind, chunk), extents in bars.items():
        colour = _paler(KINDS[kind][1], chunk / len(stages[rank]))
        panel.broken_barh(extents, (rank - 0.45, 0.9), facecolors=colour, edgecolors="white", linewidth=edge)
    panel.set(yticks=range(timeline.num_ranks), ylabel="rank", ylim=(timeline.num_ranks - 0.5, -0.5))
    panel.spines[["top", "right"]].set_visible(False)


def _paler(colour: str, amount: float) -> tuple[float, ...]:
    """Return a colour `#rrggbb` mixed with white, as fractions."""
    return tuple(1 - (1 - int(colour[i : i + 2], 16) / 255) * (1 - amount) for i in (1, 3, 5))
