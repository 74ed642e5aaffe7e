"""Counter-based draws: a draw is a function of (seed, site, time, place), the same bits on every backend.

Philox4x64-10 with key (seed, 0) and counter words (block + 1, site, time, 0); a block is four 64-bit words.
(The + 1 is NumPy's: np.random.Philox increments its counter before it generates.) `site` says who draws,
`time` when (a batch or an epoch), `block` for which place. Nothing is stored: backward draws the same mask
again, and neither the batch size nor the number of replicas changes what a place draws.

Why 4x64 and not the 4x32 of most GPU libraries: NumPy holds 4x64 in C, which serves the CPU and is an oracle.
On one core of an AMD EPYC, NumPy 2.4, 65536 lanes of 16 bits at a time, median and range of 5 processes:
np.random.Philox (4x64) 1.1 ns a lane (1.1 to 1.9), Philox4x32-10 vectorised in NumPy 5.9 ns (5.6 to 8.9);
with 4096 lanes at a time 1.4 against 30 ns.
"""

import threading
import zlib

import numpy as np

FORMAT = 1  # of the draws; a checkpoint stores it, and a change of any bit below raises it

AUGMENT_SITE = 0x61756721  # "aug!"
ORDER_SITE = 0x6F726465  # "orde"
SAMPLE_SITE = 0x73616D70  # "samp"
ROUNDS = 8  # of the Feistel network behind `permutation`
LANES = 16  # 16-bit lanes in a block


def site_of(path: str) -> int:
    """CRC-32 of a call path such as "stage1.drop": the 32-bit site whose draws belong to that layer."""
    return zlib.crc32(path.encode())


class Philox:
    """np.random.Philox with its whole state set before every call; an instance belongs to one thread."""

    def __init__(self):
        self._bits = np.random.Philox(0)
        self._state = self._bits.state
        self._state.update(buffer_pos=4, has_uint32=0)
        self._counter, self._key = self._state["state"]["counter"], self._state["state"]["key"]

    def words(self, seed: int, site: int, time: int, block: int, count: int) -> np.ndarray:
        """uint64 (count * 4): blocks block .. block + count of the stream (site, time)."""
        self._counter[:] = block, site, time, 0
        self._key[:] = seed, 0
        self._bits.state = self._state
        return self._bits.random_raw(count * 4)

    def lanes(self, seed: int, site: int, time: int, first: int, n: int) -> np.ndarray:
        """uint16 (n): lanes first .. first + n; e is lane e % 16 of block e // 16, low bits first."""
        block = first // LANES
        count = -(-(first + n) // LANES) - block
        words = self.words(seed, site, time, block, count).astype("<u8", copy=False)
        return words.view("<u2")[first - block * LANES :][:n]


_mine = threading.local()


def _philox() -> Philox:
    """This thread's generator; it carries nothing from one call to the next."""
    if not hasattr(_mine, "philox"):
        _mine.philox = Philox()
    return _mine.philox


def philox(seed: int, site: int, time: int, block: int, count: int) -> np.ndarray:
    """uint64 (count * 4): blocks block .. block + count of the stream (site, time)."""
    return _philox().words(seed, site, time, block, count)


def lanes(seed: int, site: int, time: int, first: int, n: int) -> np.ndarray:
    """uint16 (n): the lanes of places first .. first + n, uniform on 0 .. 65535."""
    return _philox().lanes(seed, site, time, first, n)


def uniforms(seed: int, site: int, time: int, first: int, n: int) -> np.ndarray:
    """float32 (n): uniform on [0, 1), multiples of 2^-24, by the upper 24 bits of places first .. first + n.

    Place e has the 32 bits of lane e % 8 of block e // 8, low bits first.
    """
    block = first // 8
    words = philox(seed, site, time, block, -(-(first + n) // 8) - block).astype("<u8", copy=False)
    bits = words.view("<u4")[first - block * 8 :][:n]
    return (bits >> 8).astype(np.float32) * np.float32(2**-24)


def crops(seed: int, epoch: int, first: int, n: int, pad: int):
    """(y, x, flip) for places first .. first + n of an epoch: crop corners in 0 .. 2*pad, flips as bool.

    Block p of the augmentation stream belongs to place p: words 0 and 1 give y and x, bit 63 of word 2 flips.
    """
    words = philox(seed, AUGMENT_SITE, epoch, first, n).reshape(n, 4)
    corners = ((words[:, :2] >> 32) * (2 * pad + 1) >> 32).astype(np.int64)
    return corners[:, 0], corners[:, 1], words[:, 2] >> 63 != 0


def blocks(seed: int, site: int, time: int, places: np.ndarray, width: int = 1) -> np.ndarray:
    """uint64 (len(places), 4 * width): blocks place * width .. place * width + width of the stream (site, time)."""
    m = len(places)
    if m and (np.diff(places) == 1).all():
        return philox(seed, site, time, int(places[0]) * width, m * width).reshape(m, 4 * width)
    words = [philox(seed, site, time, int(place) * width, width) for place in places]
    return np.array(words, np.uint64).reshape(m, 4 * width)


def alternating(seed: int, epoch: int, images: np.ndarray) -> np.ndarray:
    """bool (n): whether images by number are flipped in an epoch: drawn once for each, then by turns."""
    return (blocks(seed, AUGMENT_SITE + 1, 0, images)[:, 0] >> 63 != 0) ^ bool(epoch % 2)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """int32 (n): a bijection of 0 .. n-1 for each (seed, epoch), computable one index at a time.

    Cycle walking: a keyed Feistel network permutes 0 .. 4**half - 1, and an index is encrypted until it falls
    below n. No sort and no state, so a GPU thread finds its own entry.
    """
    return _bijection(n, philox(seed, ORDER_SITE, epoch, 0, ROUNDS // 4))


def replacement(seed: int, epoch: int, n: int) -> np.ndarray:
    """int32 (n): independent draws from 0 .. n-1 for each (seed, epoch).

    Place i draws word i % 4 of block i // 4 of the stream (SAMPLE_SITE, epoch): word * n >> 64, n below 2^31.
    """
    words = philox(seed, SAMPLE_SITE, epoch, 0, -(-n // 4))[:n]
    high, low = words >> 32, words & 0xFFFFFFFF
    return ((high * n + (low * n >> 32)) >> 32).astype(np.int32)


def balanced(seed: int, epoch: int, members: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int32 (n): as many places for each class, give or take one, in an order for each (seed, epoch).

    members: the images (n) by class, those of class c from starts[c] to starts[c + 1], of k classes. Place i gets slot
    s = permutation[i]; that is turn s // k of class (s + epoch * (n % k)) % k, so that the classes with one more place
    change from epoch to epoch. A class takes its images in turn, in an order of its own: a bijection keyed by
    blocks 2c and 2c + 1 of the stream (SAMPLE_SITE, epoch).
    """
    n, k = len(members), len(starts) - 1
    slots = np.empty(n, np.int32)
    for c in range(k):
        own = members[starts[c] : starts[c + 1]]
        own = own[_bijection(len(own), philox(seed, SAMPLE_SITE, epoch, 2 * c, ROUNDS // 4))]
        turns = slots[(c - epoch * (n % k)) % k :: k]
        turns[:] = np.resize(own, len(turns))
    return slots[permutation(seed, epoch, n)]


def _bijection(n: int, keys: np.ndarray) -> np.ndarray:
    """int32 (n): 0 .. n-1 by a Feistel network with these keys, each index encrypted until it falls below n."""
    half = 4
    while 4**half < n:
        half += 1
    order = _encrypt(np.arange(n, dtype=np.uint64), keys, half)
    while (outside := np.flatnonzero(order >= n)).size:
        order[outside] = _encrypt(order[outside], keys, half)
    return order.astype(np.int32)


def _encrypt(index: np.ndarray, keys: np.ndarray, half: int) -> np.ndarray:
    """Rounds (L, R) -> (R, L ^ F(R + key)) over index = L << half | R; F is one multiply-and-shift mix."""
    mask = (1 << half) - 1
    left, right = index >> half, index & mask
    for key in keys:
        v = right + key
        v ^= v >> 29
        v *= 0xBF58476D1CE4E5B9
        v ^= v >> 32
        left, right = right, left ^ (v & mask)
    return left << half | right
