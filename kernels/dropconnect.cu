// DropConnect (Wan et al. 2013): y = x @ (W where a draw keeps it), W (inputs, outputs); a mask on weights, one for the
// batch or one for each example. Nothing is stored: whoever needs a mask draws it again.
//
//   dropconnect_weights          masked = W where kept, else 0: the mask of example 0, for plain products
//   dropconnect_gradient         dW (+)= d where kept, else nothing: the same mask
//   dropconnect_forward          y[e,o] = sum over i of x[e,i]*W[i,o] where example e keeps (i, o)
//   dropconnect_backward_input   dx[e,i] = sum over o of dy[e,o]*W[i,o] where kept
//   dropconnect_backward_weight  dW[i,o] (+)= sum over e of x[e,i]*dy[e,o] where kept
//   dropconnect_relu             y = E[max(u, 0)] for u ~ N(mean, keep*(1 - keep) * sum over i of x^2*W^2), which
//                                is mean*P(z) + s*p(z), z = mean/s; y may be mean
//
// Example e = first + its number in the batch keeps (i, o) where lane(place) >= threshold = rate*65536,
// place = (e*inputs + i)*width + o, width the outputs rounded up to a multiple of 16; lane(place) is 16-bit lane
// place%16, low bits first, of Philox block place//16 of the stream (site, state.batch): a block draws for 16 outputs
// of one input.
//
// Outputs: overwritten; (+)= adds where accumulate is 1.
// Bytes:   x, W, dy and results once, but W once an example, from the cache, where masks are the examples' own; these
//          are bound by their draws, n*inputs*outputs/16 blocks of Philox.
// Launch:  over, sixteen weights of a row a thread; dropconnect_forward a block an example and sixteen outputs;
//          dropconnect_backward_input an input of an example a thread, dropconnect_relu an output.
#include "normal.cuh"
#include "philox.cuh"
#include "reduce.cuh"
#include "state.cuh"

#define SIXTEEN 16  // lanes of a block of draws

// Whose mask: all that a draw depends on but the place.
struct Mask {
    word seed, time;
    unsigned int site, threshold;
    int inputs, tiles;

    __device__ Mask(word seed, unsigned int site, word time, unsigned int threshold, int inputs, int outputs)
        : seed(seed), time(time), site(site), threshold(threshold), inputs(inputs),
          tiles((outputs + SIXTEEN - 1) / SIXTEEN) {}

    // Bit j: whether the example keeps the weight from this input to output 16*tile + j.
    __device__ unsigned int kept(long long example, int input, int tile) const {
        const Draw draw = philox(seed, site, time, (example * inputs + input) * tiles + tile);
        unsigned int bits = 0;
        UNROLL for (int j = 0; j < SIXTEEN; j++)
            bits |= (unsigned int)((draw.at[j / 4] >> 16 * (j % 4) & 0xffff) >= threshold) << j;
        return bits;
    }
};

// v[j] = p[j] where bit j is set and j < count, else 0, for sixteen neighbours.
template <class T>
DEVICE void load_kept(const T* p, int count, unsigned int bits, wide* v) {
    UNROLL for (int q = 0; q < SIXTEEN; q += 4) {
        load_four(p + q, min(count - q, 4), v + q);
        UNROLL for (int j = q; j < q + 4; j++) v[j] = bits >> j & 1 ? v[j] : wide(0);
    }
}

template <class T>
DEVICE void store_sixteen(T* p, int count, const wide* v) {
    UNROLL for (int q = 0; q < SIXTEEN; q += 4) store_four(p + q, min(count - q, 4), v + q);
}

// dw (+)= v
DEVICE void put_sixteen(wide* dw, int count, int accumulate, wide* v) {
    UNROLL for (int q = 0; q < SIXTEEN; q += 4) {
        wide old[4] = {};
        if (accumulate) load_four(dw + q, min(count - q, 4), old);
        UNROLL for (int j = 0; j < 4; j++) v[q + j] += old[j];
    }
    store_sixteen(dw, count, v);
}

// launch: over=inputs*((outputs+15)//16)
KERNEL dropconnect_weights(const wide* w /*inputs*outputs*/, real* masked /*inputs*outputs*/,
                           const State* state /*1*/, unsigned long long seed, unsigned int site,
                           unsigned int threshold, int inputs, int outputs) {
    const Mask mask(seed, site, state->batch, threshold, inputs, outputs);
    OVER(i, (long long)inputs * mask.tiles) {
        const int input = (int)(i / mask.tiles), tile = (int)(i - (long long)input * mask.tiles);
        const int count = outputs - SIXTEEN * tile;
        const long long at = (long long)input * outputs + SIXTEEN * tile;
        wide v[SIXTEEN];
        load_kept(w + at, count, mask.kept(0, input, tile), v);
        store_sixteen(masked + at, count, v);
    }
}

// launch: over=inputs*((outputs+15)//16)
KERNEL dropconnect_gradient(const wide* d /*inputs*outputs*/, wide* dw /*inputs*outputs*/,
                            const State* state /*1*/, unsigned long long seed, unsigned int site,
                            unsigned int threshold, int accumulate, int inputs, int outputs) {
    const Mask mask(seed, site, state->batch, threshold, inputs, outputs);
    OVER(i, (long long)inputs * mask.tiles) {
        const int input = (int)(i / mask.tiles), tile = (int)(i - (long long)input * mask.tiles);
        const int count = outputs - SIXTEEN * tile;
        const long long at = (long long)input * outputs + SIXTEEN * tile;
        wide v[SIXTEEN];
        load_kept(d + at, count, mask.kept(0, input, tile), v);
        put_sixteen(dw + at, count, accumulate, v);
    }
}

// launch: blocks=n*((outputs+15)//16)
KERNEL dropconnect_forward(const real* x /*n*inputs*/, const wide* w /*inputs*outputs*/, real* y /*n*outputs*/,
                           const State* state /*1*/, unsigned long long seed, unsigned int site,
                           unsigned int threshold, long long first, int n, int inputs, int outputs) {
    const Mask mask(seed, site, state->batch, threshold, inputs, outputs);
    const int image = blockIdx.x / mask.tiles, tile = (int)blockIdx.x - image * mask.tiles;
    const int count = outputs - SIXTEEN * tile;
    wide sum[SIXTEEN] = {};
    for (int i = threadIdx.x; i < inputs; i += THREADS) {
        const wide v = load(x + (long long)image * inputs + i);
        const unsigned int bits = mask.kept(first + image, i, tile);
        wide row[SIXTEEN];
        load_kept(w + (long long)i * outputs + SIXTEEN * tile, count, bits, row);
        UNROLL for (int j = 0; j < SIXTEEN; j++) sum[j] += v * row[j];
    }
    UNROLL for (int j = 0; j < SIXTEEN; j++) sum[j] = block_sum(sum[j]);
    if (threadIdx.x == 0) store_sixteen(y + (long long)image * outputs + SIXTEEN * tile, count, sum);
}

// launch: over=n*inputs
KERNEL dropconnect_backward_input(const real* dy /*n*outputs*/, const wide* w /*inputs*outputs*/,
                                  real* dx /*n*inputs*/, const State* state /*1*/, unsigned long long seed,
                                  unsigned int site, unsigned int threshold, long long first, int n, int inputs,
                                  int outputs) {
    const Mask mask(seed, site, state->batch, threshold, inputs, outputs);
    OVER(at, (long long)n * inputs) {
        const int image = (int)(at / inputs), i = (int)(at - (long long)image * inputs);
        wide sum = 0;
        for (int tile = 0; tile < mask.tiles; tile++) {
            const int from = SIXTEEN * tile, count = outputs - from;
            const unsigned int bits = mask.kept(first + image, i, tile);
            wide row[SIXTEEN], d[SIXTEEN];
            load_kept(w + (long long)i * outputs + from, count, bits, row);
            load_kept(dy + (long long)image * outputs + from, count, bits, d);
            UNROLL for (int j = 0; j < SIXTEEN; j++) sum += d[j] * row[j];
        }
        store(dx + at, sum);
    }
}

// launch: over=inputs*((outputs+15)//16)
KERNEL dropconnect_backward_weight(const real* x /*n*inputs*/, const real* dy /*n*outputs*/,
                                   wide* dw /*inputs*outputs*/, const State* state /*1*/, unsigned long long seed,
                                   unsigned int site, unsigned int threshold, long long first, int accumulate,
                                   int n, int inputs, int outputs) {
    const Mask mask(seed, site, state->batch, threshold, inputs, outputs);
    OVER(at, (long long)inputs * mask.tiles) {
        const int i = (int)(at / mask.tiles), tile = (int)(at - (long long)i * mask.tiles);
        const int from = SIXTEEN * tile, count = outputs - from;
        wide sum[SIXTEEN] = {};
        for (int image = 0; image < n; image++) {
            const wide v = load(x + (long long)image * inputs + i);
            wide d[SIXTEEN];
            load_kept(dy + (long long)image * outputs + from, count, mask.kept(first + image, i, tile), d);
            UNROLL for (int j = 0; j < SIXTEEN; j++) sum[j] += v * d[j];
        }
        put_sixteen(dw + (long long)i * outputs + from, count, accumulate, sum);
    }
}

// launch: over=n*outputs
KERNEL dropconnect_relu(const real* x /*n*inputs*/, const wide* w /*inputs*outputs*/,
                        const real* mean /*n*outputs*/, real* y /*n*outputs*/, wide keep, int n, int inputs,
                        int outputs) {
    OVER(at, (long long)n * outputs) {
        const long long image = at / outputs;
        const real* row = x + image * inputs;
        const wide* column = w + (at - image * outputs);
        wide squares = 0;
        for (int i = 0; i < inputs; i++) {
            const wide product = load(row + i) * column[(long long)i * outputs];
            squares += product * product;
        }
        const wide m = load(mean + at), s = sqrt(keep * (1 - keep) * squares);
        const wide v = s > 0 ? m * normal_distribution(m / s) + s * normal_density(m / s) : m;
        store(y + at, v < 0 ? wide(0) : v);
    }
}
