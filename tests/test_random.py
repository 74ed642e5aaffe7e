"""The draws: against Philox in plain integers, uniform, bijective, the same in every thread."""

import threading
import zlib

import numpy as np
import pytest

from gpunet.core import random
from gpunet.core.state import STATE, new_state

MASK = 2**64 - 1


def philox4x64(counter, key):
    """Ten rounds of Philox4x64 (Salmon et al. 2011) on Python integers."""
    a, b, c, d = counter
    for r in range(10):
        k0, k1 = (key[0] + r * 0x9E3779B97F4A7C15) & MASK, (key[1] + r * 0xBB67AE8584CAA73B) & MASK
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (right >> 64) ^ b ^ k0, right & MASK, (left >> 64) ^ d ^ k1, left & MASK
    return a, b, c, d


def words(seed, site, time, block):
    return philox4x64(((block + 1) & MASK, site, time, 0), (seed, 0))


def feistel(index, seed, epoch, n, site=0x6F726465, block=0):
    half = 4
    while 4**half < n:
        half += 1
    keys = words(seed, site, epoch, block) + words(seed, site, epoch, block + 1)
    while True:
        left, right = index >> half, index & (2**half - 1)
        for key in keys:
            v = (right + key) & MASK
            v ^= v >> 29
            v = v * 0xBF58476D1CE4E5B9 & MASK
            v ^= v >> 32
            left, right = right, left ^ (v & (2**half - 1))
        index = left << half | right
        if index < n:
            return index


def chi_square(counts):
    """Standard deviations by which the counts are less (or more) even than chance makes them."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (statistic - (counts.size - 1)) / np.sqrt(2 * (counts.size - 1))


STREAMS = [(0, 0, 0, 0), (1, 2, 3, 4), (MASK, 2**32 - 1, 2**63 - 1, 2**40), (0x0123456789ABCDEF, 77, 5, 1000003)]


def test_plain_philox_gives_the_published_words():
    """The known answers of the authors' library, for all zeros and all ones."""
    zeros = 0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B
    ones = 0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0
    assert philox4x64((0,) * 4, (0, 0)) == zeros
    assert philox4x64((MASK,) * 4, (MASK, MASK)) == ones


@pytest.mark.parametrize("stream", STREAMS)
def test_philox_is_philox_on_integers(stream):
    seed, site, time, block = stream
    expected = [word for b in range(3) for word in words(seed, site, time, block + b)]
    assert random.philox(*stream, 3).tolist() == expected


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("first", "n"), [(0, 1), (0, 16), (15, 2), (31, 40), (5, 11), (2**33 + 7, 9), (3, 0)])
def test_lanes_are_slices_of_words(stream, first, n):
    seed, site, time, _ = stream
    expected = []
    for e in range(first, first + n):
        word = words(seed, site, time, e // 16)[e % 16 // 4]
        expected.append(word >> 16 * (e % 4) & 0xFFFF)
    lanes = random.lanes(seed, site, time, first, n)
    assert lanes.dtype == np.uint16
    assert lanes.tolist() == expected


def test_lanes_do_not_depend_on_the_cut():
    whole = random.lanes(3, 4, 5, 0, 1000)
    parts = [random.lanes(3, 4, 5, first, min(77, 1000 - first)) for first in range(0, 1000, 77)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_crops_are_words_of_their_place():
    y, x, flip = random.crops(9, 2, 5, 6, 4)
    for i in range(6):
        block = words(9, 0x61756721, 2, 5 + i)
        assert (y[i], x[i]) == ((block[0] >> 32) * 9 >> 32, (block[1] >> 32) * 9 >> 32)
        assert flip[i] == (block[2] >> 63 == 1)


def test_lanes_are_uniform_and_independent_of_their_neighbours():
    lanes = random.lanes(1, 2, 3, 0, 1 << 20)
    assert abs(chi_square(np.bincount(lanes >> 4, minlength=4096))) < 4
    assert abs(chi_square(np.bincount(lanes & 0xFFF, minlength=4096))) < 4
    pairs = (lanes[:-1].astype(int) >> 10) * 64 + (lanes[1:] >> 10)
    assert abs(chi_square(np.bincount(pairs, minlength=4096))) < 4


@pytest.mark.parametrize("change", ["seed", "site", "time"])
def test_streams_are_independent(change):
    """Lanes of two streams that differ in one bit agree as often as chance has it."""
    stream = {"seed": 1, "site": 2, "time": 3}
    a = random.lanes(*stream.values(), 0, 1 << 18) >> 10
    b = random.lanes(*(stream | {change: stream[change] ^ 1}).values(), 0, 1 << 18) >> 10
    assert abs(chi_square(np.bincount(a.astype(int) * 64 + b, minlength=4096))) < 4


def test_crops_are_uniform():
    y, x, flip = random.crops(1, 0, 0, 50000, 4)
    assert abs(chi_square(np.bincount(y * 9 + x, minlength=81))) < 4
    assert abs(flip.mean() - 0.5) < 4 * 0.5 / np.sqrt(50000)
    assert abs(np.corrcoef(flip, x)[0, 1]) < 4 / np.sqrt(50000)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 255, 256, 257, 50000])
def test_permutation_is_a_bijection(n):
    order = random.permutation(7, 1, n)
    assert order.dtype == np.int32
    assert np.array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("n", [10, 257, 1025])
def test_permutation_is_the_network_on_integers(n):
    assert random.permutation(MASK, 3, n).tolist() == [feistel(i, MASK, 3, n) for i in range(n)]


def test_permutations_of_epochs_and_seeds_differ():
    """Two of them share as many fixed places as chance has it: one on average."""
    orders = [random.permutation(seed, epoch, 50000) for seed in (0, 1, 2) for epoch in (0, 1, 2, 2**31 - 1)]
    for i, a in enumerate(orders):
        assert all((a == b).sum() < 10 for b in orders[:i])


@pytest.mark.parametrize("n", [257, 50000])
def test_permutation_has_no_structure(n):
    """Neither position and index nor neighbours correlate, and few steps repeat."""
    place = np.arange(n)
    for epoch in range(5):
        order = random.permutation(1, epoch, n).astype(int)
        assert abs(np.corrcoef(place, order)[0, 1]) < 4 / np.sqrt(n)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / np.sqrt(n)
        assert np.unique(np.diff(order)).size > n / 2


def test_every_place_of_a_small_permutation_is_uniform():
    n, epochs = 30, 150
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), random.permutation(5, epoch, n)] += 1
    freedom = (n - 1) ** 2  # the sums of rows and columns are fixed
    deviation = ((counts - epochs / n) ** 2 / (epochs / n)).sum() - freedom
    assert abs(deviation) < 4 * np.sqrt(2 * freedom)


def test_threads_draw_the_same():
    def draw(seen):
        for time in range(200):
            seen.append(random.lanes(1, 2, time, 3, 20).tolist())

    results = [[] for _ in range(3)]
    threads = [threading.Thread(target=draw, args=(seen,)) for seen in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = []
    draw(expected)
    assert results == [expected] * 3


def test_the_format_is_frozen():
    """These bits are a promise to checkpoints: if they change, FORMAT must."""
    assert random.FORMAT == 1
    drawn = [random.lanes(1, random.site_of("stage1.drop"), 2, 3, 40), *random.crops(1, 2, 3, 10, 4)]
    drawn.append(random.permutation(1, 2, 300))
    assert zlib.crc32(b"".join(a.astype("<i4").tobytes() for a in drawn)) == 195191991


def test_the_state_is_laid_out_as_in_c():
    offsets = {name: STATE.fields[name][1] for name in STATE.names}
    assert offsets == {
        "batch": 0, "update": 8, "halt": 16, "epoch": 24, "count": 28, "apply": 32, "good": 36,
        "loss_scale": 40, "gradient_scale": 48, "lr_scale": 56,
    }  # fmt: skip
    assert STATE.itemsize == 184
    state = new_state()
    assert (int(state["halt"]), int(state["batch"]), float(state["loss_scale"])) == (-1, 0, 1.0)
    assert (state["lr_scale"] == 1).all()
