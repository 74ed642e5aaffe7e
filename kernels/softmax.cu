// The softmax of the rows of a (rows, c) matrix.
//
//   softmax_forward   y = exp(x - top)/sum of exp(x - top) over the row, top its largest    y may be x
//   softmax_backward  dx = y*(dy - sum of dy*y over the row)                               dx may be dy or y
//
// NaN, inf and a row of -inf give rows of NaN.
// Outputs: overwritten.
// Bytes:   forward rows*c reals in, rows*c out; backward 2*rows*c in, rows*c out; what is read again is cached.
// Launch:  a warp a row, eight rows a block.
#include "reduce.cuh"

#define ROWS (THREADS / WARP)  // a block

// launch: blocks=(rows+7)//8
KERNEL softmax_forward(const real* x /*rows*c*/, real* y /*rows*c*/, long long rows, int c) {
    const long long row = (long long)blockIdx.x * ROWS + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP, width = row < rows ? c : 0;  // without a row: company in the shuffles
    const real* from = x + row * c;
    real* to = y + row * c;
    Best top = {0, -1};
    for (int j = lane; j < width; j += WARP) top = better(top, {load(from + j), j});
    top = warp_best(top);
    wide sum = 0;
    for (int j = lane; j < width; j += WARP) sum += exp(load(from + j) - top.value);
    sum = warp_sum(sum);
    for (int j = lane; j < width; j += WARP) store(to + j, exp(load(from + j) - top.value) / sum);
}

// launch: blocks=(rows+7)//8
KERNEL softmax_backward(const real* dy /*rows*c*/, const real* y /*rows*c*/, real* dx /*rows*c*/,
                        long long rows, int c) {
    const long long row = (long long)blockIdx.x * ROWS + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP, width = row < rows ? c : 0;
    const long long base = row * c;
    wide sum = 0;
    for (int j = lane; j < width; j += WARP) sum += load(dy + base + j) * load(y + base + j);
    sum = warp_sum(sum);
    for (int j = lane; j < width; j += WARP)
        store(dx + base + j, load(y + base + j) * (load(dy + base + j) - sum));
}
