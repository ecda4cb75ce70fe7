"""The simulated cache, on cases whose traffic is known, and what the simulation says of the chosen order of accesses."""

import pytest

from bench.l2_simulation import DEVICES, FIRST, LAST, PLAIN, Access, Cache, known_divisor, sum_weight
from fused_dm._launch import Device

H100 = DEVICES["H100"]


def touch(cache, block, write=False, rank=PLAIN):
    before = cache.traffic
    cache.touch(Access((0, 0, block), write, rank), 1)
    return cache.traffic - before


def test_least_recently_used_leaves_first():
    cache = Cache(2)
    assert [touch(cache, block) for block in (1, 2, 1, 3, 1, 2)] == [1, 1, 0, 1, 0, 1]


def test_hints_come_before_recency():
    cache = Cache(2)
    touch(cache, 1, rank=LAST)
    touch(cache, 2, rank=FIRST)
    assert touch(cache, 3) == 1
    assert touch(cache, 1, rank=FIRST) == 0
    # Now that it has been read again, it is the first to leave.
    assert touch(cache, 4) == 1
    assert touch(cache, 3) == 0
    assert touch(cache, 1) == 1


def test_every_write_reaches_memory_once():
    cache = Cache(2)
    assert [touch(cache, block, write=True) for block in (1, 2, 3)] == [1, 1, 1]
    assert touch(cache, 3) == 0


def test_without_a_cache_every_access_is_traffic():
    none = Device(132, 1 << 15, fewer=0)
    # 2 of 8 blocks stay in registers.
    assert known_divisor(none, 128256, 264) == pytest.approx(3 - 2 / 8)
    assert known_divisor(none, 128256, 264, kept=0) == pytest.approx(3)
    assert known_divisor(none, 32000, 264) == pytest.approx(2)
    assert sum_weight(none, 128256, 264) == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("name", DEVICES)
def test_a_known_divisor_is_two_passes_where_rows_in_flight_fit(name):
    device = DEVICES[name]
    assert known_divisor(device, 32000, 264) == 2
    assert known_divisor(device, 128256, 264) == 2
    # More than fits; each of the choices helps, and the limit of three passes holds.
    chosen = known_divisor(device, 262144, 264)
    assert 2 < chosen < known_divisor(device, 262144, 264, hints=False) < 3
    assert chosen < known_divisor(device, 262144, 264, kept=0)
    assert known_divisor(device, 262144, 264, hints=False) < known_divisor(device, 262144, 264, hints=False, backwards=False)
    assert known_divisor(device, 262144, 528, crowd=2) > known_divisor(device, 262144, 528)


def test_the_gradient_finds_what_the_forward_pass_read_last():
    small = Device(4, 8 << 20)
    chosen = sum_weight(small, 128256, 264)
    assert chosen == pytest.approx(3 - (8 << 20) / (264 * 128256 * 2), abs=0.02)
    assert chosen < sum_weight(small, 128256, 264, backwards=False)
