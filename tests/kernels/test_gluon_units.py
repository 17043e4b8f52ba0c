"""The order in which persistent programs take tiles."""

from itertools import pairwise

import pytest
import torch
from support_attention import bounds_of

from shardwright.kernels.gluon.units import HEADER, longest_first
from shardwright.kernels.triton.attention_forward import Documents

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (300, 0, 130, 1, 128, 64 * 128 + 5, 257)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [128, 192])
def test_tiles_with_most_to_do_come_first_and_none_is_missing(block, causal):
    bounds = bounds_of(LENGTHS).to(DEVICE)
    table, num_tiles = longest_first(Documents(bounds=bounds, longest=max(LENGTHS), tokens=sum(LENGTHS)), block, causal)
    assert table.numel() == HEADER.value + 3 * num_tiles and table[0] == 0
    rows = table[HEADER.value :].view(num_tiles, 3).tolist()
    wanted = [[begin, start, end] for start, end in pairwise(bounds.tolist()) for begin in range(start, end, block)]
    assert sorted(row for row in rows if row[0] < row[2]) == sorted(wanted)
    assert all(row == [0, 0, 0] for row in rows[len(wanted) :])
    work = [(min(begin + block, end) if causal else end) - start for begin, start, end in rows[: len(wanted)]]
    assert all(-(-a // block) >= -(-b // block) for a, b in pairwise(work))
