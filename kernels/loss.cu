// Losses with their gradients, a row an image. Targets are dense rows of k; a row of padding has none.
//
//   softmax_cross_entropy  losses = -sum of t*log(softmax(z))
//                          dlogits = (softmax(z)*sum(t) - t)*state.loss_scale          padding: all t are 0
//   mean_squared_error     losses = mean over k of (p - t)^2
//                          dprediction = 2*(p - t)/k*state.loss_scale                  padding: all t are NaN
//   metrics_sum            sums (+)= sum of losses, rows with hit 1, rows with hit >= 0, 1 (one gradient)
//
// hits: 1 where the largest z (k > 1) stands where the largest t does, the first of several; else 0; -1 in a
// row of padding, whose loss and gradient are 0. Nothing is a mean over rows: the update divides by count.
//
// Outputs: overwritten; (+)= adds where accumulate is 1. A gradient may lie over logits or prediction.
// Bytes:   2*n*k reals in, n*k out.
// Launch:  a warp a row, eight rows a block; metrics_sum one block, so that its order is fixed.
#include "reduce.cuh"
#include "state.cuh"

#define ROWS (THREADS / WARP)  // a block

// launch: blocks=(n+7)//8
KERNEL softmax_cross_entropy(const real* logits /*n*k*/, const real* targets /*n*k*/, real* dlogits /*n*k*/,
                             wide* losses /*n*/, int* hits /*n*/, const State* state /*1*/, int n, int k) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int width = row < n ? k : 0;  // a warp without a row keeps the others company in the shuffles
    const long long base = (long long)row * k;
    const real *z = logits + base, *t = targets + base;

    Best logit = {0, -1}, label = {0, -1};
    wide mass = 0;
    int given = 0;
    for (int j = lane; j < width; j += WARP) {
        const wide target = load(t + j);
        logit = better(logit, {load(z + j), j});
        label = better(label, {target, j});
        mass += target;
        given += target != 0;
    }
    logit = warp_best(logit);
    label = warp_best(label);
    mass = warp_sum(mass);
    given = warp_sum(given);

    wide sum = 0, product = 0;  // of exp(z - top) and of t*(z - top)
    for (int j = lane; j < width; j += WARP) {
        const wide target = load(t + j), v = load(z + j) - logit.value;
        sum += exp(v);
        product += target != 0 ? target * v : wide(0);
    }
    sum = warp_sum(sum);
    product = warp_sum(product);

    const wide factor = mass / sum, scale = (wide)state->loss_scale;
    for (int j = lane; j < width; j += WARP) {
        const wide d = exp(load(z + j) - logit.value) * factor - load(t + j);
        store(dlogits + base + j, given ? d * scale : wide(0));
    }
    if (lane == 0 && row < n) {
        losses[row] = given ? log(sum) * mass - product : wide(0);
        hits[row] = given ? logit.index == label.index : -1;
    }
}

// launch: blocks=(n+7)//8
KERNEL mean_squared_error(const real* prediction /*n*k*/, const real* targets /*n*k*/,
                          real* dprediction /*n*k*/, wide* losses /*n*/, int* hits /*n*/,
                          const State* state /*1*/, int n, int k) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int width = row < n ? k : 0;
    const long long base = (long long)row * k;

    Best largest = {0, -1}, label = {0, -1};
    wide sum = 0;
    int given = 0;
    for (int j = lane; j < width; j += WARP) {
        const wide target = load(targets + base + j), p = load(prediction + base + j), d = p - target;
        largest = better(largest, {p, j});
        label = better(label, {target, j});
        sum += d * d;
        given += !is_nan(target);
    }
    largest = warp_best(largest);
    label = warp_best(label);
    sum = warp_sum(sum);
    given = warp_sum(given);

    const wide scale = 2 / (wide)k * (wide)state->loss_scale;
    for (int j = lane; j < width; j += WARP) {
        const wide d = load(prediction + base + j) - load(targets + base + j);
        store(dprediction + base + j, given ? d * scale : wide(0));
    }
    if (lane == 0 && row < n) {
        losses[row] = given ? sum / (wide)k : wide(0);
        hits[row] = given ? k > 1 && largest.index == label.index : -1;
    }
}

// launch: blocks=1
KERNEL metrics_sum(const wide* losses /*n*/, const int* hits /*n*/, double* sums /*4*/, int accumulate,
                   int n) {
    double loss = 0, hit = 0, count = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        loss += losses[i];
        hit += hits[i] == 1;
        count += hits[i] >= 0;
    }
    loss = block_sum(loss);
    hit = block_sum(hit);
    count = block_sum(count);
    if (threadIdx.x == 0) {
        sums[0] = (accumulate ? sums[0] : 0) + loss;
        sums[1] = (accumulate ? sums[1] : 0) + hit;
        sums[2] = (accumulate ? sums[2] : 0) + count;
        sums[3] = (accumulate ? sums[3] : 0) + 1;
    }
}
