// The order of an epoch's images, drawn on the device: no sort, and the same bits everywhere.
//
//   order_draw         order[i] = E(i), a permutation of 0 .. n-1 for each (seed, state.epoch): i is encrypted,
//                      again and again until it is below n, by a Feistel network on 2*half bits, half >= 4 the
//                      least with 4^half >= n. Round r = 0 .. 7: (L, R) -> (R, L ^ F(R + K_r)),
//                      i = L << half | R; F(v): v ^= v >> 29; v *= 0xBF58476D1CE4E5B9; v ^= v >> 32; the low
//                      half bits; K_r = word r%4 of Philox block r//4 of the stream (ORDER_SITE, time = epoch).
//   order_replacement  order[i] = word i%4 of block i//4 of the stream (SAMPLE_SITE, epoch), times n >> 64
//   order_balanced     members are the images by class, those of class c from starts[c] to starts[c+1]; no class
//                      is empty. Slot s = E(i) is turn s//k of class c = (s + epoch*(n%k)) % k:
//                      order[i] = members[starts[c] + E_c(turn % size of c)], E_c as E, its keys from blocks 2c
//                      and 2c + 1 of the stream (SAMPLE_SITE, epoch). So classes have n/k places each, give or
//                      take one, and within a class images are used as often as each other, give or take one.
//   order_stored       order[i] = i
//
// Outputs: overwritten.
// Bytes:   n ints out; balanced n ints in.
// Launch:  over, an index a thread; as 4^half < 4n from n = 65 on, less than four encryptions are expected.
#include "philox.cuh"
#include "state.cuh"

struct Keys {
    Draw of[2];
};

DEVICE Keys keys_of(word seed, unsigned int site, int epoch, word block) {
    return {{philox(seed, site, epoch, block), philox(seed, site, epoch, block + 1)}};
}

DEVICE int half_of(int n) {
    int half = 4;
    while ((1ull << (2 * half)) < (word)n) half++;
    return half;
}

DEVICE int encrypted(word index, const Keys& keys, int half, int n) {
    const word mask = (1ull << half) - 1;
    do {
        word left = index >> half, right = index & mask;
        UNROLL for (int r = 0; r < 8; r++) {
            word v = right + keys.of[r / 4].at[r % 4];
            v ^= v >> 29;
            v *= 0xBF58476D1CE4E5B9ull;
            v ^= v >> 32;
            const word mixed = left ^ (v & mask);
            left = right;
            right = mixed;
        }
        index = left << half | right;
    } while (index >= (word)n);
    return (int)index;
}

// launch: over=n
KERNEL order_draw(int* order /*n*/, const State* state /*1*/, unsigned long long seed, int n) {
    const Keys keys = keys_of(seed, ORDER_SITE, state->epoch, 0);
    const int half = half_of(n);
    OVER(i, n) order[i] = encrypted(i, keys, half, n);
}

// launch: over=n
KERNEL order_replacement(int* order /*n*/, const State* state /*1*/, unsigned long long seed, int n) {
    OVER(i, n) {
        const Draw draw = philox(seed, SAMPLE_SITE, state->epoch, i / 4);
        const word drawn = i % 2 ? (i & 2 ? draw.at[3] : draw.at[1]) : (i & 2 ? draw.at[2] : draw.at[0]);
        order[i] = (int)high_product(drawn, (word)n);
    }
}

// launch: over=n
KERNEL order_balanced(const int* members /*n*/, const int* starts /*k+1*/, int* order /*n*/,
                      const State* state /*1*/, unsigned long long seed, int n, int k) {
    const int epoch = state->epoch, half = half_of(n);
    const Keys keys = keys_of(seed, ORDER_SITE, epoch, 0);
    const long long shift = (long long)epoch * (n % k);
    OVER(i, n) {
        const int slot = encrypted(i, keys, half, n), c = (int)((slot + shift) % k);
        const int first = starts[c], size = starts[c + 1] - first, turn = slot / k % size;
        const Keys own = keys_of(seed, SAMPLE_SITE, epoch, 2ull * c);
        order[i] = members[first + encrypted(turn, own, half_of(size), size)];
    }
}

// launch: over=n
KERNEL order_stored(int* order /*n*/, int n) {
    OVER(i, n) order[i] = (int)i;
}
