"""A pipeline schedule as a table of actions: made by name, read from YAML, checked before anything runs.

A stage is a consecutive part of the model, numbered from the input. A rank holds one or more stages (its chunks) and
runs its list of actions strictly in order.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from shardwright.conf.checks import CHUNKS
from shardwright.parallel.pipeline import generate

Kind = Literal["F", "B", "I", "W"]
Result = tuple[int, str, int]  # stage that made it, "activation" or "gradient", microbatch


class ScheduleError(Exception):
    """A schedule that cannot be made or cannot run. The text is value, rule and remedy."""


@dataclass(frozen=True, order=True, slots=True)
class Action:
    """One thing that a rank does; written `3F0`: stage 3, forward, microbatch 0.

    Attributes:
        stage: the stage it runs.
        kind: F forward; B whole backward; I backward for the input; W backward for the weights.
        microbatch: the microbatch it runs.
    """

    stage: int
    kind: Kind
    microbatch: int

    @classmethod
    def parse(cls, text: str) -> Action:
        """Return the action that is written as `text`.

        Raises:
            ScheduleError: the text is not stage, kind, microbatch.
        """
        match = re.fullmatch("([0-9]+)([FBIW])([0-9]+)", text)
        if not match:
            raise ScheduleError(f"{text!r} is no action; write stage, one of F B I W, microbatch, such as 3F0")
        return cls(int(match[1]), cast(Kind, match[2]), int(match[3]))

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    def result(self) -> Result | None:
        """Return what the action makes for other actions: an activation (F), a gradient (B, I), or nothing (W)."""
        if self.kind == "W":
            return None
        return self.stage, "activation" if self.kind == "F" else "gradient", self.microbatch

    def inputs(self, num_stages: int) -> list[Result]:
        """Return what has to be there before the action can run."""
        stage, microbatch = self.stage, self.microbatch
        if self.kind == "F":
            return [(stage - 1, "activation", microbatch)] if stage else []
        if self.kind == "W":
            return [(stage, "gradient", microbatch)]
        own: Result = (stage, "activation", microbatch)
        return [own] if stage == num_stages - 1 else [own, (stage + 1, "gradient", microbatch)]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The actions of every rank in one training step.

    Attributes:
        name: for messages and drawings.
        ranks: stage -> rank that holds it.
        num_microbatches: microbatches of the step.
        actions: rank -> its actions in order.
    """

    name: str
    ranks: tuple[int, ...]
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        """Number of stages of the model."""
        return len(self.ranks)

    @property
    def num_ranks(self) -> int:
        """Number of pipeline ranks."""
        return len(self.actions)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether some backward is split into input (I) and weights (W)."""
        return any(action.kind == "W" for actions in self.actions for action in actions)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages that a rank holds, ascending."""
        return tuple(stage for stage, holder in enumerate(self.ranks) if holder == rank)

    def to_yaml(self) -> str:
        """Return the schedule as the table that `load_schedule` reads."""
        rows = "".join(f"  - {' '.join(map(str, actions))}\n" for actions in self.actions)
        return f"stages: {list(self.ranks)}\nranks:\n{rows}"


def make_schedule(kind: str, *, num_ranks: int, num_chunks: int, num_microbatches: int) -> Schedule:
    """Return the schedule of a name, for any number of microbatches.

    Stage s lives on rank s % num_ranks; for zbv, rank r holds the stages r and 2 * num_ranks - 1 - r.

    Raises:
        ScheduleError: unknown kind, or a count that does not fit it.
    """
    _check_counts(kind, num_ranks, num_chunks, num_microbatches)
    P, V, M = num_ranks, num_chunks, num_microbatches
    if kind == "gpipe":
        orders = generate.gpipe(P, M)
    elif kind == "1f1b":
        orders = generate.one_f_one_b(P, M)
    elif kind == "interleaved_1f1b":
        orders = generate.interleaved(P, V, M)
    elif kind == "zb_h1":
        orders = generate.zb_h1(P, M)
    else:
        orders = generate.zbv(P, M)
    ranks = generate.v_stages(P) if kind == "zbv" else generate.looped_stages(P, V)
    actions = tuple(tuple(Action(stage, cast(Kind, name), m) for stage, name, m in order) for order in orders)
    return Schedule(name=kind, ranks=tuple(ranks), num_microbatches=M, actions=actions)


def live_bound(kind: str, num_ranks: int, num_chunks: int, num_microbatches: int) -> tuple[int, ...]:
    """Return for every rank the (stage, microbatch) pairs whose activations it holds at most at once.

    Raises:
        ScheduleError: unknown kind, or a count that does not fit it.
    """
    _check_counts(kind, num_ranks, num_chunks, num_microbatches)
    P, V, M = num_ranks, num_chunks, num_microbatches
    if kind == "gpipe":
        return (M,) * P
    if kind == "1f1b":
        return tuple(min(M, P - r) for r in range(P))
    if kind == "interleaved_1f1b":
        group = len(generate.microbatch_groups(P, M)[0])  # P, or more if P does not divide M
        return tuple(min(M * V, 2 * (P - 1 - r) + (V - 1) * group + 1) for r in range(P))
    return (min(M, P) * V,) * P  # zb_h1, zbv


def load_schedule(path: str | Path, *, num_ranks: int, num_microbatches: int) -> Schedule:
    """Return the schedule of a YAML table (format: docs/pipeline.md), checked.

    Raises:
        ScheduleError: the file cannot be read, is no table, has other counts than asked for, or cannot run.
    """
    path = Path(path)
    try:
        table = yaml.safe_load(path.read_text("utf-8"))
        schedule = _parse_table(table, path.stem)
        if schedule.num_ranks != num_ranks:
            raise ScheduleError(
                f"the table has {schedule.num_ranks} ranks, {num_ranks} are asked for; run it on "
                f"{schedule.num_ranks} ranks or write {num_ranks} lines under ranks"
            )
        if schedule.num_microbatches != num_microbatches:
            raise ScheduleError(
                f"the table has {schedule.num_microbatches} microbatches, {num_microbatches} are asked for; a table "
                f"fits one number only: run it with {schedule.num_microbatches} or write one for {num_microbatches}"
            )
        check(schedule)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ScheduleError(f"{path} cannot be read as a YAML table ({error}); see docs/pipeline.md") from error
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from error
    return schedule


def check(schedule: Schedule, max_live: Sequence[int] | None = None) -> None:
    """Prove that a schedule can run, or say what is wrong with it.

    Every action is there once, on the rank that holds its stage; no rank waits for ever; every channel's messages are
    made in the order in which they are used. One channel leads from rank to rank for activations and one for
    gradients; its k-th send meets its k-th receive, and a receive is posted in the order of the receiver's actions.
    Sends do not hold up their rank. So equal orders on every channel and an execution that ends are all it takes.

    Args:
        schedule: the schedule.
        max_live: per rank, the (stage, microbatch) pairs that it may hold at once; None: no limit.

    Raises:
        ScheduleError: the first fault found, naming rank and action.
    """
    _check_stages(schedule)
    _check_complete(schedule)
    execution_order(schedule)
    _check_channels(schedule)
    if max_live is None:
        return
    for rank, (actions, limit) in enumerate(zip(schedule.actions, max_live, strict=True)):
        live = 0
        for action in actions:
            live += _live_change(action)
            if live > limit:
                raise ScheduleError(
                    f"rank {rank} holds {live} microbatches of its stages at {action}, {limit} is the limit; "
                    f"put a B or W before {action}"
                )


def execution_order(schedule: Schedule) -> list[Action]:
    """Return all actions in an order in which they can run: every rank by its list, every input made before its use.

    Raises:
        ScheduleError: ranks wait for each other for ever.
    """
    num_stages = schedule.num_stages
    position = [0] * schedule.num_ranks
    made: set[Result] = set()
    order: list[Action] = []
    before = -1
    while len(order) > before:
        before = len(order)
        for rank, actions in enumerate(schedule.actions):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                if not made.issuperset(action.inputs(num_stages)):
                    break
                result = action.result()
                if result:
                    made.add(result)
                order.append(action)
                position[rank] += 1
    stuck = {r: actions[position[r] :] for r, actions in enumerate(schedule.actions) if position[r] < len(actions)}
    if stuck:
        raise ScheduleError(_deadlock_text(schedule, stuck, made))
    return order


def peak_live(schedule: Schedule) -> tuple[int, ...]:
    """Return per rank the most (stage, microbatch) pairs whose F has run and whose B or W has not."""
    return tuple(peak_live_of(actions) for actions in schedule.actions)


def live_at_peak(schedule: Schedule, rank: int) -> dict[int, int]:
    """Return stage -> microbatches between forward and backward, at the moment when the rank has most of them."""
    live = dict.fromkeys(schedule.stages_of(rank), 0)
    peak = live
    for action in schedule.actions[rank]:
        live = {**live, action.stage: live[action.stage] + _live_change(action)}
        peak = max(peak, live, key=lambda counts: sum(counts.values()))
    return peak


def peak_live_of(actions: Iterable[Action]) -> int:
    """Return the same for the actions of one rank in order."""
    live = peak = 0
    for action in actions:
        live += _live_change(action)
        peak = max(peak, live)
    return peak


def _live_change(action: Action) -> int:
    return {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]


def _check_counts(kind: str, num_ranks: int, num_chunks: int, num_microbatches: int) -> None:
    if kind not in CHUNKS:
        raise ScheduleError(f"schedule {kind!r} is unknown; use one of {', '.join(CHUNKS)} or a .yaml table")
    for name, count in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches)):
        if count < 1:
            raise ScheduleError(f"{name}={count} is less than 1; use 1 or more")
    least, most = CHUNKS[kind]
    if not least <= num_chunks <= most:
        fitting = least if least == most else f"{least} or more"
        raise ScheduleError(f"num_chunks={num_chunks} does not fit {kind}, whose ranks hold {fitting}; use {fitting}")


def _parse_table(table: Any, name: str) -> Schedule:
    if not isinstance(table, dict) or set(table) != {"stages", "ranks"}:
        raise ScheduleError("a table has the two keys stages and ranks; see docs/pipeline.md")
    stages, rows = table["stages"], table["ranks"]
    if not isinstance(stages, list) or not stages or not all(type(rank) is int for rank in stages):
        raise ScheduleError(f"stages is {stages!r}; write the rank of every stage, such as [0, 1, 1, 0]")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, str) for row in rows):
        raise ScheduleError("ranks is no list of lines; write one line of actions per rank, such as - 0F0 0B0")
    actions = []
    for rank, row in enumerate(rows):
        try:
            actions.append(tuple(Action.parse(word) for word in row.split()))
        except ScheduleError as error:
            raise ScheduleError(f"rank {rank}: {error}") from error
    num_microbatches = 1 + max((action.microbatch for row in actions for action in row), default=0)
    return Schedule(name=name, ranks=tuple(stages), num_microbatches=num_microbatches, actions=tuple(actions))


def _check_stages(schedule: Schedule) -> None:
    for stage, rank in enumerate(schedule.ranks):
        if not 0 <= rank < schedule.num_ranks:
            last = schedule.num_ranks - 1
            raise ScheduleError(f"stage {stage} is on rank {rank}, but the ranks are 0 to {last}; use one of these")
    for rank in range(schedule.num_ranks):
        if not schedule.stages_of(rank):
            raise ScheduleError(f"rank {rank} holds no stage; give it one or use {schedule.num_ranks - 1} ranks")


def _check_complete(schedule: Schedule) -> None:
    num_stages = schedule.num_stages
    kinds: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action.stage >= num_stages or action.microbatch >= schedule.num_microbatches:
                raise ScheduleError(
                    f"rank {rank} runs {action}, but there are {num_stages} stages and "
                    f"{schedule.num_microbatches} microbatches, counted from 0; drop it"
                )
            holder = schedule.ranks[action.stage]
            if holder != rank:
                raise ScheduleError(f"rank {rank} runs {action}, but rank {holder} holds the stage; move it there")
            known = kinds[action.stage, action.microbatch]
            if action.kind in known:
                raise ScheduleError(f"rank {rank} runs {action} twice; an action runs once: drop one")
            known.add(action.kind)
    for stage, rank in enumerate(schedule.ranks):
        for microbatch in range(schedule.num_microbatches):
            _check_kinds(rank, stage, microbatch, kinds[stage, microbatch])


def _check_kinds(rank: int, stage: int, microbatch: int, kinds: set[str]) -> None:
    whole, split = {"F", "B"}, {"F", "I", "W"}
    if kinds in (whole, split):
        return
    if "B" in kinds and kinds - whole:
        raise ScheduleError(
            f"rank {rank} runs {stage}B{microbatch} beside {stage}{min(kinds - whole)}{microbatch}; "
            "a backward is either whole (B) or split (I and W): drop one of both"
        )
    missing = min((split if kinds & {"I", "W"} else whole) - kinds)
    hint = f" (or {stage}I{microbatch} and {stage}W{microbatch})" if missing == "B" else ""
    raise ScheduleError(f"rank {rank} lacks {stage}{missing}{microbatch}{hint}; every action runs once: add it")


def _check_channels(schedule: Schedule) -> None:
    """Compare, channel by channel, the order in which messages are made with the order in which they are used."""
    received: defaultdict[tuple[int, int, str], list[tuple[Action, Result]]] = defaultdict(list)
    channel_of = {}
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            for result in action.inputs(schedule.num_stages):
                source = schedule.ranks[result[0]]
                if source != rank:
                    channel_of[result] = (source, rank, result[1])
                    received[source, rank, result[1]].append((action, result))
    num_sent: Counter[tuple[int, int, str]] = Counter()
    for action in (action for actions in schedule.actions for action in actions):
        channel = channel_of.get(action.result())
        if channel is None:
            continue
        user, awaited = received[channel][num_sent[channel]]
        num_sent[channel] += 1
        if awaited != action.result():
            source, target, what = channel
            raise ScheduleError(
                f"rank {source} sends the {what} of {action} where rank {target} receives for {user}; "
                "messages arrive in the order sent: put both in the same order on both ranks"
            )


def _deadlock_text(schedule: Schedule, stuck: dict[int, tuple[Action, ...]], made: set[Result]) -> str:
    """Describe the ring of ranks that wait for each other."""
    ring: dict[int, str] = {}
    rank = min(stuck)
    while rank not in ring:
        action = stuck[rank][0]
        awaited = next(result for result in action.inputs(schedule.num_stages) if result not in made)
        holder = schedule.ranks[awaited[0]]
        maker = next((a for a in stuck.get(holder, ()) if a.result() == awaited), None)
        if maker is None:
            return (
                f"rank {rank} waits at {action} for the {awaited[1]} of stage {awaited[0]}, which nobody makes; add it"
            )
        ring[rank] = f"rank {rank} waits at {action} for {maker} of rank {holder}"
        rank = holder
    waits = list(ring.values())[list(ring).index(rank) :]
    return f"deadlock: {', '.join(waits)}; run an awaited action before the action that its rank waits at"
