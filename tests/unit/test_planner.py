"""Who writes and who reads what: every box once, evenly; and the messages that agree on it."""

import importlib
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import fork, started_world
from support_saves import SHAPES, Part, load_seed, own_part, part_of, seed_of, shrink
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, DamagedError, FlatSlice, LoadOptions, exchange
from shardwright.checkpoint.archive import split
from shardwright.checkpoint.box import Box, decompose, pieces_of
from shardwright.checkpoint.exchange import Absent, Tree
from shardwright.checkpoint.files import Entry
from shardwright.checkpoint.manifest import TensorInfo
from shardwright.checkpoint.planner import Held, assign, cut

# -------------------------------------------------------------------------------------------------------- who writes


def entry(name, shape, dtype=torch.float32, offsets=None, sizes=None):
    box = Box(tuple(offsets or (0,) * len(shape)), tuple(sizes or shape))
    return Entry(name, TensorInfo(dtype, tuple(shape)), box)


def written(entries_of_ranks, balance=True):
    """By rank: the boxes that it writes."""
    chosen = assign([Held.of(entries) for entries in entries_of_ranks], balance=balance)
    parts = []
    for entries, rows in zip(entries_of_ranks, chosen, strict=True):
        parts.append([])
        for row, share, num_shares in rows:
            own = entries[row]
            boxes = [own.box] if num_shares == 1 else cut(own, num_shares)[share : share + 1]
            parts[-1] += [Entry(own.name, own.info, box) for box in boxes]
    return parts


def assert_every_box_once(entries_of_ranks, parts):
    """Each element of each tensor is written once, by a process that holds it."""
    infos = {e.name: e.info for entries in entries_of_ranks for e in entries}
    for name, info in infos.items():
        counts, held = np.zeros(info.shape, int), np.zeros(info.shape, bool)
        whole = Box((0,) * len(info.shape), info.shape)
        for entries, own in zip(entries_of_ranks, parts, strict=True):
            mine = np.zeros(info.shape, bool)
            for e in entries:
                if e.name == name:
                    mine[e.box.within(whole)] = True
            for part in own:
                if part.name == name:
                    assert mine[part.box.within(whole)].all(), f"{name}: written by one that does not hold it"
                    counts[part.box.within(whole)] += 1
            held |= mine
        assert (counts == held).all(), name


def imbalance(parts):
    loads = [sum(part.num_bytes for part in own) for own in parts]
    return max(loads) / (sum(loads) / len(loads))


@pytest.mark.parametrize("seed", range(8))
def test_every_box_is_written_once_by_one_that_holds_it(seed, monkeypatch):
    shrink(monkeypatch, shared=64)
    rng = random.Random(seed)
    num_ranks = rng.randint(1, 7)
    entries_of_ranks = [[] for _ in range(num_ranks)]
    for number in range(rng.randint(1, 30)):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 3)))
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.int64, torch.uint8])
        info = TensorInfo(dtype, shape)
        for box in split(Box((0,) * len(shape), shape), rng.randint(1, 40)):
            for rank in rng.sample(range(num_ranks), rng.randint(1, num_ranks)):
                entries_of_ranks[rank].append(Entry(f"t{number}", info, box))
    for entries in entries_of_ranks:
        rng.shuffle(entries)
    for balance in (True, False):
        assert_every_box_once(entries_of_ranks, written(entries_of_ranks, balance))


def test_empty_and_scalar_tensors_are_written_once():
    entries = [entry("scalar", ()), entry("empty", (0, 4)), entry("one", (1,))]
    parts = written([entries] * 3)
    assert sorted(part.name for own in parts for part in own) == ["empty", "one", "scalar"]
    assert written([[], []]) == [[], []]


def test_replicated_states_are_dealt_out_by_bytes():
    rng = random.Random(1)
    many = [entry(f"t{i}", (rng.randint(1, 3000),), rng.choice([torch.float32, torch.bfloat16])) for i in range(400)]
    parts = written([many] * 8)
    assert_every_box_once([many] * 8, parts)
    assert imbalance(parts) < 1.01
    assert imbalance(written([many] * 8, balance=False)) == 8  # the first writes all


def test_a_large_replicated_tensor_is_shared(monkeypatch):
    shrink(monkeypatch, shared=2**12)
    large = [entry("large", (1000, 64)), entry("long", (1, 1, 50_000), torch.bfloat16)]
    parts = written([large] * 6)
    assert_every_box_once([large] * 6, parts)
    assert imbalance(parts) < 1.05


def test_shares_fill_up_those_who_have_little_else(monkeypatch):
    """Rank 0 alone holds 40 KB: the others write more of the 80 KB that all hold."""
    shrink(monkeypatch, shared=2**11)
    common = [entry(f"common{i}", (20, 100)) for i in range(10)]
    ranks = [[*common, entry("own", (100, 100))], common, common]
    parts = written(ranks)
    assert_every_box_once(ranks, parts)
    assert imbalance(parts) < 1.05


def test_groups_that_share_each_their_own_part():
    """As hybrid sharding has it: half of a tensor on ranks 0 and 2, the other half on 1 and 3."""
    halves = [[entry(f"t{i}", (40, 9), offsets=(20 * half, 0), sizes=(20, 9)) for i in range(50)] for half in range(2)]
    ranks = [halves[0], halves[1], halves[0], halves[1]]
    parts = written(ranks)
    assert_every_box_once(ranks, parts)
    assert imbalance(parts) == 1


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (entry("w", (4, 2), torch.bfloat16), "w is .*bfloat16.* on rank 1, and .*float32"),
        (entry("w", (2, 4)), r"w is .*\(2, 4\).* on rank 1, and .*\(4, 2\)"),
    ],
)
def test_what_differs_under_one_name_is_named(other, words):
    with pytest.raises(CheckpointError, match=words):
        written([[entry("w", (4, 2))], [other]])


def test_no_plan_without_an_answer_of_all():
    with pytest.raises(CheckpointError, match="no plan of what to save: rank 1 went home; see what that rank does"):
        assign([Held.of([entry("w", (4, 2))]), Absent("rank 1 went home")], balance=True)


def save_states_that_differ(path):
    """Ranks that disagree are told so, all of them, and save well afterwards."""
    rank = started_world().rank
    part = own_part(1)
    part.state["copied"] = part.state["copied"].to([torch.bfloat16, torch.float16][rank])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(path, {"part": part})
    checkpoint.save(path, {"part": own_part(2)})
    return str(caught.value), load_seed(path)


def test_ranks_that_disagree_are_told_and_go_on(tmp_path):
    for told, seed in fork(2, save_states_that_differ, tmp_path / "c"):
        assert "part.copied is" in told and "float16" in told and "on rank 1" in told
        assert seed == 2


# ------------------------------------------------------------------------------------------------------- flat slices


def test_runs_of_elements_decompose_into_few_boxes():
    rng = random.Random(0)
    for _ in range(300):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 5)))
        numel = int(np.prod(shape))
        start = rng.randint(0, numel)
        stop = rng.randint(start, numel)
        boxes, indices = list(decompose(shape, start, stop)), np.arange(numel).reshape(shape)
        whole = Box((0,) * len(shape), shape)
        assert len(boxes) <= 2 * len(shape) - 1
        found = [i for box in boxes for i in indices[box.within(whole)].reshape(-1).tolist()]
        assert found == list(range(start, stop)), f"{shape} [{start}, {stop})"
        assert all(box.numel for box in boxes)


def test_a_flat_slice_shares_memory_with_its_owner():
    flat = torch.zeros(11)
    for piece in pieces_of(FlatSlice((3, 2, 4), 6, flat)):
        piece.tensor.fill_(piece.box.offsets[0] + 1)
    assert flat.tolist() == [1] * 2 + [2] * 8 + [3]
    (scalar,) = pieces_of(FlatSlice((), 0, torch.ones(1)))
    assert scalar.box == Box((), ())
    assert pieces_of(FlatSlice((3, 4), 7, torch.ones(0))) == []


# ---------------------------------------------------------------------------------------------------------- messages


def talk():
    """A tree of three levels: 0 - (1, 2), 1 - (3, 4), 2 - (5)."""
    rank = started_world().rank
    tree = Tree(20)
    gathered = tree.gather({"from": rank, "data": bytes(rank * 1000)})
    expected = [{"from": r, "data": bytes(r * 1000)} for r in range(6)]
    assert gathered == (expected if rank == 0 else None)
    assert tree.scatter([f"for {r}" for r in range(6)] if rank == 0 else None) == f"for {rank}"
    assert tree.broadcast("for all" if rank == 0 else "ignored") == "for all"
    assert tree.agree(rank) == list(range(6))
    for rank_of_error, kind in ((4, CheckpointError), (5, DamagedError)):
        with pytest.raises(kind, match=f"it was {rank_of_error}"):
            tree.run(lambda r=rank_of_error, k=kind: raise_if(rank == r, k(f"it was {r}")))
    with pytest.raises(CheckpointError, match=r"\[rank 3\] OSError\('disk'\)"):
        tree.run(lambda: raise_if(rank == 3, OSError("disk")))
    with pytest.raises(CheckpointError, match="it was 2") as caught:  # what one must not pass over comes first
        tree.run(lambda: raise_if(rank > 0, (CheckpointError if rank == 2 else DamagedError)(f"it was {rank}")))
    assert not isinstance(caught.value, DamagedError) and not tree.broken
    assert tree.run(lambda: None) is None
    return "understood"


def raise_if(condition, error):
    if condition:
        raise error


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(exchange, "FAN_OUT", 2)


def test_messages_along_a_tree_of_three_levels(narrow):
    assert fork(6, talk) == ["understood"] * 6


def answer_late(late_rank):
    """One process is late: what all others hear of it; then a new tree works."""
    rank = started_world().rank
    dist.barrier()
    tree = Tree(0.6)
    if rank == late_rank:
        time.sleep(1.4)
    try:
        heard = tree.agree(rank)
    except CheckpointError as error:
        heard = str(error)
    assert tree.broken
    dist.barrier()
    return heard, Tree(20).agree(rank)


@pytest.mark.parametrize(("late_rank", "lost"), [(5, [5]), pytest.param(1, [1, 3, 4], marks=pytest.mark.slow)])
def test_a_late_process_is_named(narrow, late_rank, lost):
    for rank, (heard, again) in enumerate(fork(6, answer_late, late_rank)):
        assert again == list(range(6))
        if rank in lost:
            assert "cannot be reached" in heard or "heard nothing" in heard
            continue
        told = {value.reason for value in heard if isinstance(value, Absent)}
        assert len(told) == 1 and told.pop().startswith(f"rank {late_rank} did not arrive within 0.")
        assert [value for value in heard if not isinstance(value, Absent)] == [r for r in range(6) if r not in lost]


def answer_dead():
    rank = started_world().rank
    dist.barrier()
    tree = Tree(0.6)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        return tree.agree(rank)
    except CheckpointError as error:
        return str(error)


def test_a_dead_process_is_named(narrow):
    answers = fork(6, answer_dead)
    assert answers[2] == -signal.SIGKILL and "rank 2" in answers[5] and "cannot be reached" in answers[5]
    for rank in (0, 1, 3, 4):
        told = {value.reason for value in answers[rank] if isinstance(value, Absent)}
        assert len(told) == 1 and told.pop().startswith("rank 2 did not arrive within")


# --------------------------------------------------------------------------------------------------------- who reads


@pytest.fixture
def shrunk(monkeypatch):
    shrink(monkeypatch, chunk=2**15)


def load_half(path):
    """One process wants a quarter of one of three tensors."""
    shape = SHAPES["sharded"][0]
    wanted = FlatSlice(shape, 0, torch.zeros(shape[0] * shape[1] // 4))
    report = checkpoint.load(path, {"part": Part(sharded=wanted)})
    assert torch.equal(wanted.tensor, part_of(1).state["sharded"].tensor[: wanted.tensor.numel()])
    return report


def test_only_what_is_needed_is_read(tmp_path, shrunk):
    fork(2, save_first, tmp_path / "c")
    size = sum(checkpoint.open(tmp_path / "c").manifest.files.values())
    report = load_half(tmp_path / "c")
    assert report.needed_bytes <= report.read_bytes <= report.needed_bytes + 3 * 4096 < size / 2
    assert report.received_bytes == 0
    part = own_part(0)
    report = checkpoint.load(tmp_path / "c", {"part": part})
    assert seed_of(part) == 1 and size - 2 * 4096 <= report.read_bytes <= size  # all but the headers


def save_first(path):
    started_world()
    checkpoint.save(path, {"part": own_part(1)})


GRID = {
    "rows": [Shard(0), Replicate()],
    "columns": [Replicate(), Shard(1)],
    "both": [Shard(1), Shard(0)],
    "copies": [Replicate(), Replicate()],
}


def make(scale, rows):
    started_world()
    mesh = init_device_mesh("cpu", (2, 2))
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(rows, 70, generator=generator) * scale for name in GRID}
    return Part(**{name: distribute_tensor(values[name], mesh, p) for name, p in GRID.items()})


def load_both_ways(path, rows=48):
    """Save, load with and without exchange; return the reports, after comparing bits."""
    expected, reports = make(1, rows), []
    checkpoint.save(path, {"part": expected})
    for choice in (False, True):
        part = make(0, rows)
        reports.append(checkpoint.load(path, {"part": part}, options=LoadOptions(exchange=choice)))
        for name, tensor in part.state.items():
            assert isinstance(tensor, DTensor)
            assert torch.equal(tensor.to_local(), expected.state[name].to_local()), f"{name}, exchange={choice}"
    return reports


def test_with_exchange_bytes_are_counted_rightly_while_threads_take_turns(tmp_path, monkeypatch):
    shrink(monkeypatch)
    module = importlib.import_module("shardwright.checkpoint.load")
    inner = module.copy_common
    monkeypatch.setattr(module, "copy_common", lambda *boxes: time.sleep(0.0005) or inner(*boxes))
    fork(4, load_both_ways, tmp_path / "c", 300)


def test_with_exchange_every_byte_is_read_once_and_the_bits_are_the_same(tmp_path, shrunk):
    reports = fork(4, load_both_ways, tmp_path / "c")
    size = sum(checkpoint.open(tmp_path / "c").manifest.files.values())
    alone, together = zip(*reports, strict=True)
    assert sum(report.read_bytes for report in alone) > 2 * size
    read = [report.read_bytes for report in together]
    assert size - 4 * 4096 <= sum(read) < 1.1 * size
    assert max(read) < 1.5 * sum(read) / 4
    assert all(report.received_bytes > 0 for report in together)
    for one, other in reports:
        assert one.needed_bytes == other.needed_bytes and one.received_bytes == 0
