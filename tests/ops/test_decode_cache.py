"""Buffers of rows that decode together: what they hold when they grow and rows move, and the memory they take up."""

import os
import sys
from pathlib import Path

import pytest
import torch

from temper.ops.decode_cache import STRIDE, SlotCache

CPU = torch.device("cpu")


def states(length, seed, heads=2, size=8):
    return torch.randn(heads, length, size, generator=torch.Generator().manual_seed(seed))


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_rows_keep_their_columns_when_buffers_grow_and_rows_move():
    cache = SlotCache(1, 3)
    rows = [states(length, length) for length in (5, 3, 2)]
    for slot, row in enumerate(rows):
        cache.load(slot, [row], [-row])
    cache.begin_pass([[5], [3], [2]], CPU)
    new = states(3, 9)
    cache.slots[0].update(new.transpose(0, 1)[:, :, None], -new.transpose(0, 1)[:, :, None])
    cache.move(2, 0, 3)
    longer = states(2 * STRIDE, 7)
    cache.load(2, [longer], [-longer])
    keys, values = cache.slots[0].keys, cache.slots[0].values
    assert torch.equal(keys[0, :, :3], torch.cat([rows[2], new[:, 2:]], 1))
    assert torch.equal(keys[1, :, :4], torch.cat([rows[1], new[:, 1:2]], 1))
    assert torch.equal(keys[2, :, : 2 * STRIDE], longer)
    assert torch.equal(values, -keys)
    assert not keys[1, :, 4:].any(), "junk times weight 0 must be 0"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's account of memory")
def test_a_short_row_beside_a_long_one_takes_up_its_own_length():
    cache = SlotCache(1, 64)
    long, short = states(4096, 0, size=64), states(16, 1, size=64)
    before = resident_bytes()
    cache.load(0, [long], [long])
    for slot in range(1, 64):
        cache.load(slot, [short], [short])
    whole = 2 * cache.slots[0].keys.nbytes
    assert resident_bytes() - before < whole // 10
