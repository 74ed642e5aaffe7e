// Sums and other reductions in an order that only the sizes fix: a run repeats bit for bit. No atomics.
//
// All threads of the warp (warp_*) or of the block (block_sum, fold_rows) call, outside of any branch on
// which they differ; a thread without data passes the neutral element.
#ifndef GPUNET_REDUCE
#define GPUNET_REDUCE

#include "common.cuh"

// Butterfly: a + b is b + a, so all 32 lanes end with the same bits.
template <class T>
DEVICE T warp_sum(T value) {
    UNROLL for (int offset = WARP / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// A maximum and where it is; index -1: nothing seen yet.
struct Best {
    wide value;
    int index;
};

// The better of two by `beats`, the earlier one where they are equal.
DEVICE Best better(Best a, Best b) {
    if (b.index < 0) return a;
    if (a.index < 0 || beats(b.value, a.value)) return b;
    if (beats(a.value, b.value)) return a;
    return a.index < b.index ? a : b;
}

DEVICE Best warp_best(Best best) {
    UNROLL for (int offset = WARP / 2; offset > 0; offset /= 2) {
        Best other;
        other.value = __shfl_xor_sync(0xffffffffu, best.value, offset);
        other.index = __shfl_xor_sync(0xffffffffu, best.index, offset);
        best = better(best, other);
    }
    return best;
}

// The sum over the block, given to all its threads.
template <class T>
DEVICE T block_sum(T value) {
    __shared__ T partial[THREADS / WARP];
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = value;
    __syncthreads();
    T sum = partial[0];
    UNROLL for (int w = 1; w < THREADS / WARP; w++) sum += partial[w];
    __syncthreads();  // `partial` serves the next call too
    return sum;
}

// A reduction down the columns of a row-major matrix with c columns. A block takes `lanes` neighbours
// (32, or the least power of two that holds c) and THREADS/lanes rows at a time, so that a warp reads
// neighbours. Launch blocks=parts*((c+31)//32): part p is rows p*rows/parts to (p+1)*rows/parts, and a block
// takes one tile of columns of one part.
//
//     const Tile tile(rows, c, parts);
//     T value = neutral;
//     if (tile.column < c)
//         for (long long row = tile.first; row < tile.stop; row += tile.step) value += x[...];
//     value = fold_rows(value, tile.lanes, add);
//     if (tile.writes) y[tile.part*c + tile.column] = value;
struct Tile {
    int lanes, part, column, step;
    long long first, stop;
    bool writes;  // this thread holds its column's result after fold_rows

    // block: the tile's number, where a launch has more blocks than one matrix needs
    __device__ Tile(long long rows, int c, int parts, int block = blockIdx.x) {
        const int across = (c + WARP - 1) / WARP, thread = threadIdx.x;
        lanes = WARP;
        while (lanes / 2 >= c) lanes /= 2;
        part = block / across;
        column = (block - part * across) * WARP + thread % lanes;
        step = THREADS / lanes;
        first = part * rows / parts + thread / lanes;
        stop = (part + 1) * rows / parts;
        writes = thread < lanes && column < c;
    }
};

// Merges the values of threads t, t + lanes, t + 2*lanes, ... by halving; threads below `lanes` get results.
template <class T, class Merge>
DEVICE T fold_rows(T value, int lanes, Merge merge) {
    __shared__ T values[THREADS];
    const int thread = threadIdx.x;
    values[thread] = value;
    for (int half = THREADS / 2; half >= lanes; half /= 2) {
        __syncthreads();
        if (thread < half) values[thread] = merge(values[thread], values[thread + half]);
    }
    value = values[thread];
    __syncthreads();  // `values` serves the next call too
    return value;
}

// The commonest one: sums of x down the columns of this block's part, zero in a thread without a column.
template <class T>
DEVICE wide column_tile_sum(const T* x, const Tile& tile, int c) {
    wide sum = 0;
    if (tile.column < c)
        for (long long row = tile.first; row < tile.stop; row += tile.step)
            sum += load(x + row * c + tile.column);
    return fold_rows(sum, tile.lanes, [](wide a, wide b) { return a + b; });
}

#endif
