// Dropout: y = x*scale where an element is kept, else 0; forward and backward alike, and nothing is stored.
//
// Element i is place e = first + i of the whole batch. It is kept where lane(e) >= threshold = rate*65536;
// lane(e) is 16-bit lane e%16, low bits first, of Philox block e//16 of the stream (site, state.batch).
//
// Outputs: overwritten; y may be x.
// Bytes:   n reals in, n out.
// Launch:  a block for each 4096 places that begin at a multiple of 16: each thread draws one Philox block,
//          all share the words, and elements are taken by four in memory order.
#include "philox.cuh"
#include "state.cuh"

// launch: blocks=(n+15+4095)//4096
KERNEL dropout_apply(const real* x /*n*/, real* y /*n*/, const State* state /*1*/, unsigned long long seed,
                     unsigned int site, unsigned int threshold, wide scale, long long first, long long n) {
    __shared__ word words[4 * THREADS];  // each holds the lanes of four elements
    const int thread = threadIdx.x;
    const Draw draw = philox(seed, site, state->batch, first / 16 + (long long)blockIdx.x * THREADS + thread);
    UNROLL for (int j = 0; j < 4; j++) words[4 * thread + j] = draw.at[j];
    __syncthreads();
    const long long begin = (long long)blockIdx.x * 16 * THREADS - first % 16;  // of the tile: an element
    for (int q = thread; q < 4 * THREADS; q += THREADS) {
        const long long at = begin + 4 * q;
        const word lanes = words[q];
        if (at >= 0) {
            const int count = at < n ? up_to_four(n - at) : 0;
            wide v[4];
            load_four(x + at, count, v);
            UNROLL for (int j = 0; j < 4; j++)
                v[j] = (lanes >> 16 * j & 0xffff) >= threshold ? v[j] * scale : wide(0);
            store_four(y + at, count, v);
        } else {  // places before the first
            for (int j = (int)min(-at, 4ll); j < 4 && at + j < n; j++)
                store(y + at + j,
                      (lanes >> 16 * j & 0xffff) >= threshold ? load(x + at + j) * scale : wide(0));
        }
    }
}
