import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from shardwright.conf.checks import CHUNKS
from shardwright.parallel.pipeline.schedule import (
    Action,
    Schedule,
    ScheduleError,
    check,
    execution_order,
    live_bound,
    load_schedule,
    make_schedule,
    peak_live,
)
from shardwright.parallel.pipeline.timeline import Costs, draw, simulate, write_trace
from shardwright.scripts import schedule as command


def make(kind: str, P: int, M: int, V: int | None = None) -> Schedule:
    chunks = V or (2 if kind in ("interleaved_1f1b", "zbv") else 1)
    return make_schedule(kind, num_ranks=P, num_chunks=chunks, num_microbatches=M)


def table(stages: str, *rows: str) -> Schedule:
    actions = tuple(tuple(Action.parse(word) for word in row.split()) for row in rows)
    ranks = tuple(int(digit) for digit in stages)
    count = 1 + max(action.microbatch for row in actions for action in row)
    return Schedule(name="test", ranks=ranks, num_microbatches=count, actions=actions)


def timeline(schedule: Schedule, **costs: float):
    return simulate(schedule, Costs.uniform(schedule.num_stages, **costs))


# ---- every table runs, within its bound


@pytest.mark.parametrize("kind", CHUNKS)
def test_random_tables_pass(kind):
    rng = random.Random(kind)
    for _ in range(60):
        P, M = rng.randint(1, 16), rng.randint(1, 64)
        V = rng.randint(2, 4) if kind == "interleaved_1f1b" else CHUNKS[kind][0]
        schedule = make(kind, P, M, V)
        check(schedule, live_bound(kind, P, V, M))
        assert schedule.splits_backward == kind.startswith("z")


@pytest.mark.parametrize("kind", CHUNKS)
@pytest.mark.parametrize("P", range(1, 8))
def test_every_small_table_passes(kind, P):
    for M in range(1, 2 * P + 3):
        for V in (2, 3) if kind == "interleaved_1f1b" else (CHUNKS[kind][0],):
            check(make(kind, P, M, V), live_bound(kind, P, V, M))


@pytest.mark.parametrize("kind", CHUNKS)
def test_bound_is_reached(kind):
    V = 2 if kind in ("interleaved_1f1b", "zbv") else 1
    for P, M in ((1, 3), (2, 2), (4, 3), (4, 8), (4, 11), (8, 32)):
        peak, bound = peak_live(make(kind, P, M, V)), live_bound(kind, P, V, M)
        assert peak[0] == bound[0] and max(peak) == max(bound)


def test_stages_of_a_v():
    schedule = make("zbv", 3, 4)
    assert schedule.ranks == (0, 1, 2, 2, 1, 0)
    assert schedule.stages_of(0) == (0, 5) and schedule.stages_of(2) == (2, 3)
    assert (schedule.num_stages, schedule.num_ranks) == (6, 3)


def test_small_tables_by_hand():
    assert make("1f1b", 2, 3).to_yaml().split("ranks:\n")[1] == (
        "  - 0F0 0F1 0B0 0F2 0B1 0B2\n"  #
        "  - 1F0 1B0 1F1 1B1 1F2 1B2\n"
    )
    assert " ".join(map(str, make("gpipe", 1, 2).actions[0])) == "0F0 0F1 0B0 0B1"
    assert " ".join(map(str, make("interleaved_1f1b", 1, 2).actions[0])) == "0F0 1F0 1B0 0F1 0B0 1F1 1B1 0B1"
    assert " ".join(map(str, make("zbv", 1, 1).actions[0])) == "0F0 1F0 1I0 0I0 1W0 0W0"


# ---- bubbles


@pytest.mark.parametrize("P", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("factor", [1, 2, 5])
def test_bubbles_equal_the_formulas(P, factor):
    M = factor * P
    for kind in ("gpipe", "1f1b"):
        assert timeline(make(kind, P, M)).bubble_fraction == pytest.approx((P - 1) / (M + P - 1))
    for V in (2, 3, 4):
        bubble = timeline(make("interleaved_1f1b", P, M, V)).bubble_fraction
        assert bubble == pytest.approx((P - 1) / (V * M + P - 1))


@pytest.mark.parametrize("P", [2, 3, 4, 8])
def test_bubbles_of_ragged_and_zero_bubble_schedules(P):
    for M in [*range(P, 2 * P + 3), 4 * P + 1]:
        one, h1, v = (timeline(make(kind, P, M)) for kind in ("1f1b", "zb_h1", "zbv"))
        looped = timeline(make("interleaved_1f1b", P, M))
        # groups that P does not divide cost memory, never time
        assert looped.bubble_fraction == pytest.approx((P - 1) / (2 * M + P - 1))
        # the first action of the last rank waits for P - 1 forwards: no schedule idles less than zb_h1 and zbv
        assert h1.total_seconds == 3 * M + P - 1 < one.total_seconds
        assert v.total_seconds == 6 * M + P - 1 < looped.total_seconds
        assert max(h1.peak_live) == max(one.peak_live)
        assert max(v.peak_live) <= max(looped.peak_live)
        assert max(v.peak_live) <= 2 * max(one.peak_live)  # of chunks half as large


def test_transfers_are_charged_between_ranks_only():
    alone = make("zbv", 1, 3)
    assert timeline(alone, transfer=7).total_seconds == timeline(alone).total_seconds
    # one microbatch down three ranks and back: four messages
    assert timeline(make("1f1b", 3, 1), transfer=0.5).total_seconds == 3 * 3 + 4 * 0.5


def test_a_message_waits_for_its_receive():
    # 1F1's activation is made at 2 but posted only when 1B0 starts; with 1F1 late, the transfer starts late too
    schedule = table("01", "0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1")
    spans = {str(span.action): span for span in timeline(schedule, transfer=3).spans}
    assert spans["1F0"].start == 4  # made at 1, posted at 0
    assert spans["1B0"].start == 5
    assert spans["1F1"].start == 8  # made at 2, posted at 5


def test_costs_are_per_stage():
    schedule = make("1f1b", 2, 1)
    costs = Costs(forward=(1, 2), backward_input=(3, 4), backward_weight=(5, 6))
    assert simulate(schedule, costs).total_seconds == 1 + 2 + 10 + 8
    assert simulate(schedule, costs).peak_live == (1, 1)
    with pytest.raises(ScheduleError, match="costs of 3 stages for a schedule of 2"):
        simulate(schedule, Costs.uniform(3))
    with pytest.raises(ScheduleError, match="negative"):
        Costs.uniform(2, transfer=-1)


# ---- torch's tables


def torch_rows(order) -> list[list[Action]]:
    """Return the compute actions of torch's rows, which also hold idle slots and gradient reductions."""
    rows = ([str(action) for action in row if action is not None] for row in order)
    return [[Action.parse(word) for word in row if re.fullmatch("[0-9]+[FBIW][0-9]+", word)] for row in rows]


def torch_local_rows(kind: str, P: int, V: int, M: int) -> list[list[Action]]:
    """Return the rows that a schedule class of torch works out rank by rank, without processes."""
    rounds = max(1, M // P)
    stand_in = SimpleNamespace(
        pp_group_size=P, n_local_stages=V, num_stages=P * V, _n_microbatches=M, microbatches_per_round=M // rounds
    )
    rank_row = getattr(torch_schedules, kind)._calculate_single_rank_operations
    return torch_rows(rank_row(stand_in, rank) for rank in range(P))


@pytest.mark.parametrize("P", [1, 2, 4, 7])
def test_gpipe_and_1f1b_equal_torch(P):
    for M in (P, P + 1, 3 * P):
        stand_in = SimpleNamespace(_num_stages=P, _n_microbatches=M)
        gpipe = torch_schedules.ScheduleGPipe._get_pipeline_order(stand_in)
        assert torch_rows(gpipe.values()) == [list(row) for row in make("gpipe", P, M).actions]
        one = torch_rows(torch_schedules.Schedule1F1B._get_pipeline_order(stand_in).values())
        ours = [list(row) for row in make("1f1b", P, M).actions]
        assert one[:-1] == ours[:-1]
        # torch numbers the last rank's forwards from 1
        fixed = [replace(action, microbatch=action.microbatch - (action.kind == "F")) for action in one[-1]]
        assert ours[-1] in (fixed, one[-1])


@pytest.mark.parametrize("P", [1, 2, 4, 7])
def test_interleaved_equals_torch(P):
    compared = 0
    for M in range(1, 4 * P + 1):
        if M % max(1, M // P):
            continue  # torch has no such table
        for V in (2, 3, 4):
            ours = [list(row) for row in make("interleaved_1f1b", P, M, V).actions]
            assert torch_local_rows("ScheduleInterleaved1F1B", P, V, M) == ours
            compared += 1
    assert compared >= 3 * (P + 3)


@pytest.mark.parametrize("P", [1, 2, 3, 5])
def test_zero_bubble_beside_torch(P):
    for M in range(1, 4 * P + 1):
        ours, theirs = make("zbv", P, M), torch_local_rows("ScheduleZBVZeroBubble", P, 2, M)
        # the same F and I; weights go elsewhere, never slower, in no more memory
        for row, other in zip(ours.actions, theirs, strict=True):
            assert [a for a in row if a.kind != "W"] == [a for a in other if a.kind != "W"]
        theirs = replace(ours, actions=tuple(map(tuple, theirs)))
        check(theirs, live_bound("zbv", P, 2, M))
        assert timeline(ours).total_seconds <= timeline(theirs).total_seconds
        if M >= P:
            h1 = [list(row) for row in make("zb_h1", P, M).actions]
            assert h1 == torch_local_rows("ScheduleInterleavedZeroBubble", P, 1, M)


# ---- faults


@pytest.mark.parametrize(
    ("stages", "rows", "message"),
    [
        ("01", ["0F0 0B0", "1F0"], "rank 1 lacks 1B0 (or 1I0 and 1W0)"),
        ("01", ["0F0 0I0", "1F0 1B0"], "rank 0 lacks 0W0"),
        ("01", ["0F0 0B0 0B1", "1F0 1B0 1F1 1B1"], "rank 0 lacks 0F1"),
        ("01", ["0F0 0F0 0B0", "1F0 1B0"], "rank 0 runs 0F0 twice"),
        ("01", ["0F0 0B0 0W0", "1F0 1B0"], "rank 0 runs 0B0 beside 0W0"),
        ("01", ["0F0 0B0 1F0", "1B0"], "rank 0 runs 1F0, but rank 1 holds the stage"),
        ("01", ["0F0 0B0 2F0", "1F0 1B0"], "rank 0 runs 2F0, but there are 2 stages"),
        ("02", ["0F0 0B0", "1F0 1B0"], "stage 1 is on rank 2, but the ranks are 0 to 1"),
        ("00", ["0F0 1F0 1B0 0B0", ""], "rank 1 holds no stage"),
        ("0", ["0B0 0F0"], "deadlock: rank 0 waits at 0B0 for 0F0 of rank 0"),
        ("0", ["0F0 0W0 0I0"], "deadlock: rank 0 waits at 0W0 for 0I0 of rank 0"),
        (
            "01",
            ["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"],
            "deadlock: rank 0 waits at 0B0 for 1B0 of rank 1, rank 1 waits at 1F1 for 0F1 of rank 0;",
        ),
        (
            "01",
            ["0F0 0F1 0B0 0B1", "1F1 1F0 1B0 1B1"],
            "rank 0 sends the activation of 0F0 where rank 1 receives for 1F1",
        ),
        (
            "01",
            ["0F0 0F1 0B1 0B0", "1F0 1F1 1B0 1B1"],
            "rank 1 sends the gradient of 1B0 where rank 0 receives for 0B1",
        ),
        (
            "01",
            ["0F0 0F1 0I1 0B0 0W1", "1F0 1F1 1B0 1B1"],
            "rank 1 sends the gradient of 1B0 where rank 0 receives for 0I1",
        ),
    ],
)
def test_faults_are_found(stages, rows, message):
    with pytest.raises(ScheduleError, match=re.escape(message)):
        check(table(stages, *rows))


def test_live_limit():
    schedule = make("gpipe", 2, 4)
    check(schedule, (4, 4))
    with pytest.raises(ScheduleError, match="rank 1 holds 4 microbatches of its stages at 1F3, 3 is the limit"):
        check(schedule, (4, 3))


def test_one_change_of_a_good_table_is_found():
    rng = random.Random(0)
    for _ in range(150):
        schedule = make(rng.choice(list(CHUNKS)), rng.randint(1, 5), rng.randint(1, 8))
        rows = [list(row) for row in schedule.actions]
        rank = rng.randrange(len(rows))
        place = rng.randrange(len(rows[rank]))
        action = rows[rank].pop(place)
        change = rng.choice(["missing", "twice", "elsewhere", "before its input"])
        if change == "twice":
            rows[rank] += [action, action]
        elif change == "elsewhere":
            rows.append([action])
        elif change == "before its input":
            if action.kind == "F":
                action = rows[rank].pop(next(i for i, a in enumerate(rows[rank]) if a.kind in "BI"))
            rows[rank].insert(0, action)
        with pytest.raises(ScheduleError, match=r"rank \d"):
            check(replace(schedule, actions=tuple(map(tuple, rows))))


def test_incomplete_table_stops_the_simulator():
    with pytest.raises(ScheduleError, match="rank 0 waits at 0B1 for the activation of stage 0, which nobody makes"):
        execution_order(table("01", "0B1", "1F0 1B0"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 2, 1, 4), "schedule '2f2b' is unknown; use one of gpipe, 1f1b"),
        (("1f1b", 2, 2, 4), "num_chunks=2 does not fit 1f1b, whose ranks hold 1; use 1"),
        (("interleaved_1f1b", 2, 1, 4), "num_chunks=1 does not fit interleaved_1f1b, whose ranks hold 2 or more"),
        (("zbv", 2, 3, 4), "num_chunks=3 does not fit zbv"),
        (("zbv", 0, 2, 4), "num_ranks=0 is less than 1"),
        (("gpipe", 2, 1, 0), "num_microbatches=0 is less than 1"),
    ],
)
def test_wrong_counts_are_refused(arguments, message):
    kind, P, V, M = arguments
    with pytest.raises(ScheduleError, match=re.escape(message)):
        make_schedule(kind, num_ranks=P, num_chunks=V, num_microbatches=M)
    with pytest.raises(ScheduleError, match=re.escape(message)):
        live_bound(*arguments)


# ---- files


@pytest.mark.parametrize("kind", CHUNKS)
def test_yaml_round_trip(kind, tmp_path):
    path = tmp_path / f"{kind}.yaml"
    schedule = make(kind, 3, 7)
    path.write_text(schedule.to_yaml())
    assert load_schedule(path, num_ranks=3, num_microbatches=7) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [0, 1]\nranks: [0F0 0B0, 1F0 1X0]", "rank 1: '1X0' is no action"),
        ("stages: [0, 1]\nranks: [0F0 0B0, 1F0]", "rank 1 lacks 1B0"),
        ("stages: [0, 1]\nranks: [0F0 0B0 0F1 0B1, 1F0 1B0 1F1 1B1]", "the table has 2 microbatches, 1 are asked for"),
        ("stages: [0]\nranks: [0F0 0B0]", "the table has 1 ranks, 2 are asked for"),
        ("stages: [0, one]\nranks: [0F0 0B0, 1F0 1B0]", "stages is [0, 'one']; write the rank of every stage"),
        ("stages: [0, 1]\nranks: [[0F0, 0B0], [1F0, 1B0]]", "ranks is no list of lines"),
        ("stages: [0, 1]", "a table has the two keys stages and ranks"),
        ("stages: [0, 1]\nranks: [0F0 0B0, 1F0 1B0]\nrank: 2", "a table has the two keys stages and ranks"),
        ("stages: [0", "cannot be read as a YAML table"),
    ],
)
def test_wrong_files_are_refused(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        load_schedule(path, num_ranks=2, num_microbatches=1)
    assert str(path) in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ScheduleError, match=re.escape(f"{tmp_path / 'none.yaml'} cannot be read")):
        load_schedule(tmp_path / "none.yaml", num_ranks=2, num_microbatches=1)


def test_picture_and_trace(tmp_path):
    timelines = {kind: timeline(make(kind, 4, 6)) for kind in ("1f1b", "zbv")}
    draw(timelines, tmp_path / "picture.png")
    picture = (tmp_path / "picture.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 20_000

    write_trace(timelines["zbv"], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    actions = [event for event in events if event["ph"] == "X"]
    assert len(actions) == 4 * 6 * 6
    assert {event["tid"] for event in actions} == {0, 1, 2, 3}
    last = max(event["ts"] + event["dur"] for event in actions)
    assert last == pytest.approx(timelines["zbv"].total_seconds * 1e6)
    first = next(event for event in actions if event["name"] == "1F0")
    assert (first["tid"], first["ts"], first["dur"], first["cat"]) == (1, 1e6, 1e6, "forward")


def test_command(tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["schedule.py", *arguments])
        command.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    counts = ("--ranks", "4", "--microbatches", "8")
    Path("mine.yaml").write_text(run("zbv", *counts, "--table"))
    shown = run("mine.yaml", *counts, "--png", "out.png", "--trace", "out.json")
    assert "5.88%" in shown and "25.5 s" in shown
    assert Path("out.png").is_file() and Path("out.json").is_file()
    for wrong in (("mine.yaml", "--ranks", "3", "--microbatches", "8"), ("mine.yaml", *counts, "--chunks", "2")):
        with pytest.raises(SystemExit) as stopped:
            run(*wrong)
        assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert "mine.yaml: the table has 4 ranks, 3 are asked for" in errors and "--chunks 2 has no meaning" in errors
