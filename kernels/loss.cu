// Losses with their gradients, a row an image. Targets are dense rows of k; a row of padding has none.
//
//   softmax_cross_entropy  losses = -sum of t*log(softmax(z))
//                          dlogits = (softmax(z)*sum(t) - t)*state.loss_scale
//   mean_squared_error     losses = mean over k of (p - t)^2
//                          dprediction = 2*(p - t)/k*state.loss_scale
//   sigmoid_cross_entropy  losses = sum of positive*t*(1-p)^gamma*-log(p) + negative*(1-t)*p^gamma*-log(1-p),
//                          p = 1/(1 + exp(-z)); dlogits = its derivative*state.loss_scale
//   multiclass_hinge       losses = sum over j != y of v[j], or of v[j]^2 if squared; v[j] = max(0, z[j] - z[y] +
//                          margin), y: the largest t; of the largest v[j] alone if single
//                          dscores = its derivative*state.loss_scale
//   metrics_sum            sums (+)= sum of losses, rows with hit 1, rows with hit >= 0, 1 (one gradient)
//
// A row of padding, whose t are all NaN, has loss and gradient 0 and hit -1; where t are shares of the classes
// (softmax, hinge), a row of zeros has no class and is padding too. Elsewhere a NaN among numbers makes the loss of
// its row NaN, and its own gradient. Nothing is a mean over rows: the update divides by count.
// hits: 1 where the largest z (mean_squared_error: if k > 1) stands where the largest t does, the first of several;
// else 0. sigmoid_cross_entropy: where any of the largest t does; with k = 1, z > 0 as t > 1/2; where no t is above
// 0, no z either.
//
// Outputs: overwritten; (+)= adds where accumulate is 1. A gradient may lie over logits or prediction.
// Bytes:   2*n*k reals in, n*k out.
// Launch:  a warp a row, eight rows a block; metrics_sum one block, so that its order is fixed.
#include "reduce.cuh"
#include "state.cuh"

#define ROWS (THREADS / WARP)  // a block

// What the lanes of a warp find in a row of outputs z and targets t.
struct Row {
    Best output, label;  // the first largest
    bool given;          // whether any target is a number; of shares: other than 0. Else the row is padding.
};

DEVICE Row search(const real* z, const real* t, int width, int lane, bool shares) {
    Best output = {0, -1}, label = {0, -1};
    int given = 0;
    for (int j = lane; j < width; j += WARP) {
        const wide target = load(t + j);
        output = better(output, {load(z + j), j});
        label = better(label, {target, j});
        given += shares ? target < 0 || target > 0 : !is_nan(target);
    }
    return {warp_best(output), warp_best(label), warp_sum(given) > 0};
}

// launch: blocks=(n+7)//8
KERNEL softmax_cross_entropy(const real* logits /*n*k*/, const real* targets /*n*k*/, real* dlogits /*n*k*/,
                             wide* losses /*n*/, int* hits /*n*/, const State* state /*1*/, int n, int k) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int width = row < n ? k : 0;  // a warp without a row keeps the others company in the shuffles
    const long long base = (long long)row * k;
    const real *z = logits + base, *t = targets + base;

    const Row found = search(z, t, width, lane, true);

    wide mass = 0, sum = 0, product = 0;  // of t, of exp(z - top), of t*(z - top)
    for (int j = lane; j < width; j += WARP) {
        const wide target = load(t + j), v = load(z + j) - found.output.value;
        mass += target;
        sum += exp(v);
        product += target != 0 ? target * v : wide(0);
    }
    mass = warp_sum(mass);
    sum = warp_sum(sum);
    product = warp_sum(product);

    const wide factor = mass / sum, scale = (wide)state->loss_scale;
    for (int j = lane; j < width; j += WARP) {
        const wide d = exp(load(z + j) - found.output.value) * factor - load(t + j);
        store(dlogits + base + j, found.given ? d * scale : wide(0));
    }
    if (lane == 0 && row < n) {
        losses[row] = found.given ? log(sum) * mass - product : wide(0);
        hits[row] = found.given ? found.output.index == found.label.index : -1;
    }
}

// launch: blocks=(n+7)//8
KERNEL mean_squared_error(const real* prediction /*n*k*/, const real* targets /*n*k*/,
                          real* dprediction /*n*k*/, wide* losses /*n*/, int* hits /*n*/,
                          const State* state /*1*/, int n, int k) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int width = row < n ? k : 0;
    const long long base = (long long)row * k;
    const Row found = search(prediction + base, targets + base, width, lane, false);

    const wide scale = 2 / (wide)k * (wide)state->loss_scale;
    wide sum = 0;
    for (int j = lane; j < width; j += WARP) {
        const wide d = load(prediction + base + j) - load(targets + base + j);
        sum += d * d;
        store(dprediction + base + j, found.given ? d * scale : wide(0));
    }
    sum = warp_sum(sum);
    if (lane == 0 && row < n) {
        losses[row] = found.given ? sum / (wide)k : wide(0);
        hits[row] = found.given ? k > 1 && found.output.index == found.label.index : -1;
    }
}

// log(1 + exp(z)) is max(z, 0) + l and log(1 + exp(-z)) is max(-z, 0) + l, which cannot overflow; the powers are
// exponentials of them: (1-p)^gamma = exp(-gamma*log(1 + exp(z))).

// launch: blocks=(n+7)//8
KERNEL sigmoid_cross_entropy(const real* logits /*n*k*/, const real* targets /*n*k*/, real* dlogits /*n*k*/,
                             wide* losses /*n*/, int* hits /*n*/, const State* state /*1*/, wide positive,
                             wide negative, wide gamma, int n, int k) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int width = row < n ? k : 0;
    const long long base = (long long)row * k;
    const Row found = search(logits + base, targets + base, width, lane, false);

    const wide scale = (wide)state->loss_scale;
    wide sum = 0;
    for (int j = lane; j < width; j += WARP) {
        const wide z = load(logits + base + j), t = load(targets + base + j);
        const wide e = exp(z < 0 ? z : -z), l = log(1 + e), large = 1 / (1 + e);
        const wide up = max(z, wide(0)) + l, down = max(-z, wide(0)) + l;  // -log(1 - p), -log(p)
        const wide p = z < 0 ? e * large : large, q = z < 0 ? large : e * large;
        const wide here = positive * t * exp(-gamma * up), away = negative * (1 - t) * exp(-gamma * down);
        sum += here * down + away * up;
        const wide d = away * (p + gamma * q * up) - here * (q + gamma * p * down);
        store(dlogits + base + j, found.given ? d * scale : wide(0));
    }
    sum = warp_sum(sum);
    if (lane == 0 && row < n) {
        const wide output = found.output.value, label = found.label.value;
        int hit = -1;
        if (found.given && label <= 0)
            hit = output <= 0;
        else if (found.given && k == 1)
            hit = (output > 0) == (label > wide(0.5));
        else if (found.given)
            hit = load(targets + base + found.output.index) == label;
        losses[row] = found.given ? sum : wide(0);
        hits[row] = hit;
    }
}

// launch: blocks=(n+7)//8
KERNEL multiclass_hinge(const real* scores /*n*k*/, const real* targets /*n*k*/, real* dscores /*n*k*/,
                        wide* losses /*n*/, int* hits /*n*/, const State* state /*1*/, wide margin,
                        int squared, int single, int n, int k) {
    const int row = blockIdx.x * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int width = row < n ? k : 0;
    const long long base = (long long)row * k;
    const Row found = search(scores + base, targets + base, width, lane, true);
    const int label = found.label.index;

    const wide own = found.given ? load(scores + base + label) : wide(0);
    Best rival = {0, -1};
    for (int j = lane; j < width; j += WARP)
        if (j != label) rival = better(rival, {load(scores + base + j), j});
    rival = warp_best(rival);

    wide sum = 0, slopes = 0;
    for (int j = lane; j < width; j += WARP) {
        const wide v = load(scores + base + j) - own + margin;
        if (j != label && (!single || j == rival.index) && !(v <= 0)) {
            sum += squared ? v * v : v;
            slopes += squared ? 2 * v : wide(1);
        }
    }
    sum = warp_sum(sum);
    slopes = warp_sum(slopes);

    const wide scale = (wide)state->loss_scale;
    for (int j = lane; j < width; j += WARP) {
        const wide v = load(scores + base + j) - own + margin;
        const bool counts = (!single || j == rival.index) && !(v <= 0);
        const wide other = counts ? (squared ? 2 * v : wide(1)) : wide(0);
        const wide d = j == label ? -slopes : other;
        store(dscores + base + j, found.given ? d * scale : wide(0));
    }
    if (lane == 0 && row < n) {
        losses[row] = found.given ? sum : wide(0);
        hits[row] = found.given ? found.output.index == label : -1;
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
