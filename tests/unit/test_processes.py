"""What runs the equivalence tests: a group of processes that fails or hangs is told, and costs no other its result."""

import time

import torch.distributed as dist
from support import fork_each, started_world


def meet(name):
    rank = started_world().rank
    if rank == 1 and name == "raises":
        raise ValueError("rank 1 has had enough")
    if rank == 1 and name == "hangs":
        time.sleep(60)
    dist.barrier()
    return rank, name


def test_one_that_fails_or_hangs_is_told_and_the_others_go_on(capfd):
    names = ["first", "raises", "second", "hangs", "last"]
    found = fork_each(2, meet, {name: [name] for name in names}, timeout_seconds=4)
    for name in ("first", "second", "last"):
        assert found[name] == [(0, name), (1, name)]
    assert "ValueError: rank 1 has had enough" in found["raises"]
    assert "rank 1: ended with status 1" in found["hangs"]
    told = capfd.readouterr().err
    assert "Timeout" in told and "in meet" in told
