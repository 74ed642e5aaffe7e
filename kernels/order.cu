// The order of an epoch's images, drawn on the device: no sort, and the same bits everywhere.
//
//   order_draw    order[i] = E(i), a permutation of 0 .. n-1 for each (seed, state.epoch): i is encrypted,
//                 again and again until it is below n, by a Feistel network on 2*half bits, half >= 4 the
//                 least with 4^half >= n. Round r = 0 .. 7: (L, R) -> (R, L ^ F(R + K_r)), i = L << half | R;
//                 F(v): v ^= v >> 29; v *= 0xBF58476D1CE4E5B9; v ^= v >> 32; the low half bits;
//                 K_r = word r%4 of Philox block r//4 of the stream (ORDER_SITE, time = epoch).
//   order_stored  order[i] = i
//
// Outputs: overwritten.
// Bytes:   n ints out.
// Launch:  over, an index a thread; as 4^half < 4n from n = 65 on, less than four encryptions are expected.
#include "philox.cuh"
#include "state.cuh"

// launch: over=n
KERNEL order_draw(int* order /*n*/, const State* state /*1*/, unsigned long long seed, int n) {
    int half = 4;
    while ((1ull << (2 * half)) < (word)n) half++;
    const word mask = (1ull << half) - 1;
    const Draw keys[2] = {philox(seed, ORDER_SITE, state->epoch, 0),
                          philox(seed, ORDER_SITE, state->epoch, 1)};
    OVER(i, n) {
        word index = i;
        do {
            word left = index >> half, right = index & mask;
            UNROLL for (int r = 0; r < 8; r++) {
                word v = right + keys[r / 4].at[r % 4];
                v ^= v >> 29;
                v *= 0xBF58476D1CE4E5B9ull;
                v ^= v >> 32;
                const word mixed = left ^ (v & mask);
                left = right;
                right = mixed;
            }
            index = left << half | right;
        } while (index >= (word)n);
        order[i] = (int)index;
    }
}

// launch: over=n
KERNEL order_stored(int* order /*n*/, int n) {
    OVER(i, n) order[i] = (int)i;
}
