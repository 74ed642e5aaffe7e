// Dropout: y = x*scale where a draw keeps it, else 0; forward and backward alike, and nothing is stored.
//
//   dropout_apply     element by element: element i is place e = first + i of the whole batch
//   dropout_channels  by whole channels of an image: e = (first + image)*c + channel
//   dropout_scale     y = x*scale, for what is not drawn
//
// Place e is kept where lane(e) >= threshold = rate*65536; lane(e) is 16-bit lane e%16, low bits first, of Philox
// block e//16 of the stream (site, state.batch).
//
// Outputs: overwritten; y may be x.
// Bytes:   all of x in, all of y out.
// Launch:  dropout_apply a block for each 4096 places that begin at a multiple of 16: each thread draws one Philox
//          block, all share the words, and elements are taken by four in memory order. dropout_channels four channels
//          of 16 pixels a thread, which draws once for them. dropout_scale four elements a thread.
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

#define PIXELS 16  // a thread, for one draw

// launch: over=n*((pixels+15)//16)*((c+3)//4)
KERNEL dropout_channels(const real* x /*n*pixels*c*/, real* y /*n*pixels*c*/, const State* state /*1*/,
                        unsigned long long seed, unsigned int site, unsigned int threshold, wide scale,
                        long long first, int n, int pixels, int c) {
    const int fours = (c + 3) / 4, runs = (pixels + PIXELS - 1) / PIXELS;
    OVER(i, (long long)n * runs * fours) {
        const long long run = i / fours, image = run / runs;
        const int channel = 4 * (int)(i - run * fours), count = up_to_four(c - channel);
        const int begin = (int)(run - image * runs) * PIXELS, end = min(begin + PIXELS, pixels);
        unsigned int lane[4];
        four_lanes<16>(seed, site, state->batch, (first + image) * c + channel, lane);
        for (int p = begin; p < end; p++) {
            const long long at = (image * pixels + p) * c + channel;
            wide v[4];
            load_four(x + at, count, v);
            UNROLL for (int j = 0; j < 4; j++) v[j] = lane[j] >= threshold ? v[j] * scale : wide(0);
            store_four(y + at, count, v);
        }
    }
}

// launch: over=(n+3)//4
KERNEL dropout_scale(const real* x /*n*/, real* y /*n*/, wide scale, long long n) {
    each(x, y, n, [scale](wide v) { return v * scale; });
}
