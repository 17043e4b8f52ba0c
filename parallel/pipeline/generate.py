"""The orders of actions that the papers define, as plain arithmetic.

Letters: P ranks, V chunks (stages of one rank), M microbatches, r a rank. An order is the list of one rank's steps.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from itertools import pairwise, zip_longest

Step = tuple[int, str, int]  # stage, kind (F, B, I or W), microbatch
Order = list[Step]


def looped_stages(P: int, V: int) -> list[int]:
    """Return the rank of every stage when the stages go round the ranks: 0 1 .. P-1 0 1 .. P-1."""
    return [stage % P for stage in range(P * V)]


def v_stages(P: int) -> list[int]:
    """Return the rank of every stage when the stages go down the ranks and back up: 0 1 .. P-1 P-1 .. 1 0."""
    return [*range(P), *reversed(range(P))]


def microbatch_groups(P: int, M: int) -> list[range]:
    """Return the groups that interleaved 1F1B takes through a rank's chunks one after the other.

    Groups of fewer than P microbatches leave holes in the pipeline, so M is spread evenly over M // P groups of at
    least P, the larger ones first. If P divides M, these are the groups of P of the paper; if M < P, there is one.
    """
    num_groups = max(1, M // P)
    size, num_larger = divmod(M, num_groups)
    starts = [index * size + min(index, num_larger) for index in range(num_groups + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


def gpipe(P: int, M: int) -> list[Order]:
    """Return all forwards, then all backwards. Source: GPipe, arXiv 1811.06965."""
    return [_alternate(_steps(r, "F", M), _steps(r, "B", M), num_ahead=M) for r in range(P)]


def one_f_one_b(P: int, M: int, backward: str = "B") -> list[Order]:
    """Return 1F1B with a flush: each rank runs ahead by its distance from the last. Source: arXiv 2006.09503."""
    return [_alternate(_steps(r, "F", M), _steps(r, backward, M), num_ahead=P - 1 - r) for r in range(P)]


def interleaved(P: int, V: int, M: int) -> list[Order]:
    """Return interleaved 1F1B: a rank's chunks take turns, a group of microbatches each. Source: arXiv 2104.04473."""
    groups = microbatch_groups(P, M)
    turns = [(chunk, microbatch) for group in groups for chunk in range(V) for microbatch in group]
    orders = []
    for r in range(P):
        forwards = [(chunk * P + r, "F", microbatch) for chunk, microbatch in turns]
        backwards = [((V - 1 - chunk) * P + r, "B", microbatch) for chunk, microbatch in turns]
        orders.append(_alternate(forwards, backwards, num_ahead=2 * (P - 1 - r) + (V - 1) * len(groups[0])))
    return orders


def zb_h1(P: int, M: int) -> list[Order]:
    """Return ZB-H1: 1F1B whose weight gradients wait for idle time, at 1F1B's peak. Source: arXiv 2401.10241."""
    return fill_weights(one_f_one_b(P, M, backward="I"), looped_stages(P, 1), max_live=P)


def zbv(P: int, M: int) -> list[Order]:
    """Return ZB-V: two chunks per rank in a V, zero bubble when F, I and W cost the same. Source: arXiv 2401.10241."""
    return fill_weights([_v_order(P, M, r) for r in range(P)], v_stages(P), max_live=2 * P)


def fill_weights(orders: Sequence[Order], stage_ranks: Sequence[int], max_live: int) -> list[Order]:
    """Return orders of F and I with a W for every I, put where the rank would otherwise stand still.

    Runs all ranks in steps of one unit. A rank runs its next F or I if its inputs are there and the F does not hold
    more than `max_live` microbatches (counted from F to W); else the oldest W that it owes.
    """
    last_stage = len(stage_ranks) - 1
    todo = [deque(order) for order in orders]
    owed: list[deque[Step]] = [deque() for _ in orders]
    live = [0] * len(orders)
    done: set[Step] = set()
    filled: list[Order] = [[] for _ in orders]

    def choose(rank: int) -> Step | None:
        if todo[rank]:
            stage, kind, microbatch = todo[rank][0]
            if kind == "F":
                ready = live[rank] < max_live and (stage == 0 or (stage - 1, "F", microbatch) in done)
            else:
                ready = stage == last_stage or (stage + 1, "I", microbatch) in done
            if ready:
                return todo[rank].popleft()
        return owed[rank].popleft() if owed[rank] else None

    while any(todo) or any(owed):
        steps = [choose(rank) for rank in range(len(orders))]
        assert any(steps), "an order of F and I that cannot run"
        for rank, step in enumerate(steps):
            if step is None:
                continue
            stage, kind, microbatch = step
            filled[rank].append(step)
            done.add(step)
            live[rank] += {"F": 1, "I": 0, "W": -1}[kind]
            if kind == "I":
                owed[rank].append((stage, "W", microbatch))
    return filled


def _steps(stage: int, kind: str, M: int) -> Order:
    return [(stage, kind, microbatch) for microbatch in range(M)]


def _alternate(forwards: Order, backwards: Order, num_ahead: int) -> Order:
    """Return `num_ahead` forwards, then one forward and one backward in turn, then the backwards that are left."""
    order = forwards[:num_ahead]
    for forward, backward in zip_longest(forwards[num_ahead:], backwards):
        order += [forward, backward] if forward else [backward]
    return order


def _v_order(P: int, M: int, r: int) -> Order:
    """Return the F and I of one rank in ZB-V.

    The paper's phases need 2P-1 microbatches; of fewer, the absent ones are left out of the order for 2P-1.
    """
    first, second, to_last = r, 2 * P - 1 - r, P - r
    num_full = max(M, 2 * P - 1)
    phases = (
        [(first, "F")] * (2 * to_last - 1)
        + [(second, "F"), (first, "F")] * r
        + [(second, "F"), (second, "I")] * to_last
        + [(first, "F"), (first, "I"), (second, "F"), (second, "I")] * (num_full - 2 * P + 1 + r)
        + [(first, "I"), (second, "F"), (second, "I")] * (to_last - 1)
        + [(first, "I"), (second, "I")] * r
        + [(first, "I")] * to_last
    )
    order: Order = []
    count: Counter[tuple[int, str]] = Counter()
    for stage, kind in phases:
        microbatch = count[stage, kind]
        count[stage, kind] += 1
        if microbatch < M:
            order.append((stage, kind, microbatch))
    return order
