// Rules that look at a whole layer: LARS, vSGD, and the matrices of Muon.
//
// Arenas, table and rows as in optim.cu; d = g*gradient_scale. Where state.apply is 0, weights and what a rule keeps
// stay as they are. Sums over a layer are made of sums over its blocks of 256 elements, in a fixed order.
//
//   layer_squares     sums[b] = {sum of w^2, sum of d^2} of block b                                    2n wides in
//   lars_rates        of each row: ratios = rate * trust*|w|/(|d| + decay*|w|), rate where a norm is 0 or scaled = 0
//   vsgd_averages     e = (shifted - g)*gradient_scale; with memory t >= 1: mean += (d - mean)/t,
//                     square += (d^2 - square)/t, bend += (d*e - bend)/t; update 0: mean = d,
//                     square = caution*d^2, bend = caution*d*e; sums[b]: of mean^2, square, bend       6n in, 3n out
//   vsgd_fold         totals[row] = sums over its blocks
//   vsgd_total        every row of total = the sum of m triples
//   vsgd_update       with {a, v, b} = totals[row], or where single = 1 {mean^2, square, bend}: w -= lr*a/c*d,
//                     c = max(b, floor*v); memory = memory*(1 - a/v) + 1, update 0: 2; neither where v = 0
//                                                                                                      6n in, 2n out
//   muon_momentum     v = momentum*v + d; direction = nesterov ? d + momentum*v : v, 0 where apply is 0;
//                     norms[p] = {sum of direction^2, sum of w^2} over part p                          3n in, 2n out
//   muon_normalize    x = direction/max(|direction|, 1e-7), by the sums of `parts`                     n in, n reals out
//   muon_polynomial   of each matrix: y = b*y + c*z, and a more on its diagonal                        2n in, n out
//   muon_update       w = w*shrink - lr*scale*x, shrink = 1 - lr*decay, or length/|w| where length > 0 2n in, n out
//
// Outputs: overwritten, but muon_polynomial's y, which is read first.
// Launch:  sums a block for one of the arena or a row, 1 for all; muon_momentum a block a part; the others over.
#include "reduce.cuh"
#include "state.cuh"

// launch: blocks=n//256
KERNEL layer_squares(const wide* w /*n*/, const wide* g /*n*/, const State* state /*1*/, wide* sums /*n//256*2*/,
                     long long n) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    const wide x = i < n ? w[i] : wide(0), d = i < n ? g[i] * (wide)state->gradient_scale : wide(0);
    const wide weights = block_sum(x * x), directions = block_sum(d * d);
    if (threadIdx.x == 0 && i < n) {
        sums[2 * blockIdx.x] = weights;
        sums[2 * blockIdx.x + 1] = directions;
    }
}

// launch: blocks=rows
KERNEL lars_rates(const wide* sums /*n//256*2*/, const int* table /*n//256*/, const wide* rate /*rows*/,
                  const wide* decay /*rows*/, const int* scaled /*rows*/, wide* ratios /*rows*/, wide trust, int rows,
                  long long n) {
    const int row = blockIdx.x;
    wide weights = 0, directions = 0;
    for (long long b = threadIdx.x; b < n / 256; b += THREADS)
        if (table[b] == row) {
            weights += sums[2 * b];
            directions += sums[2 * b + 1];
        }
    const wide length = sqrt(block_sum(weights)), pull = sqrt(block_sum(directions));
    const bool known = scaled[row] && length > 0 && pull > 0;
    if (threadIdx.x == 0) ratios[row] = rate[row] * (known ? trust * length / (pull + decay[row] * length) : wide(1));
}

// launch: blocks=n//256
KERNEL vsgd_averages(const wide* g /*n*/, const wide* shifted /*n*/, const wide* memory /*n*/,
                     const State* state /*1*/, wide* mean /*n*/, wide* square /*n*/, wide* bend /*n*/,
                     wide* sums /*n//256*3*/, wide caution, long long n) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    wide m = 0, s = 0, b = 0;
    if (i < n) {
        m = mean[i];
        s = square[i];
        b = bend[i];
        if (state->apply != 0) {
            const wide scale = (wide)state->gradient_scale, d = g[i] * scale, e = (shifted[i] - g[i]) * scale;
            if (state->update == 0) {
                m = d;
                s = caution * d * d;
                b = caution * d * e;
            } else {
                const wide t = max(memory[i], wide(1));  // 0 behind a parameter's end, in memory that no file has
                m += (d - m) / t;
                s += (d * d - s) / t;
                b += (d * e - b) / t;
            }
            mean[i] = m;
            square[i] = s;
            bend[i] = b;
        }
    }
    const wide means = block_sum(m * m), squares = block_sum(s), bends = block_sum(b);
    if (threadIdx.x == 0 && i < n) {
        sums[3 * blockIdx.x] = means;
        sums[3 * blockIdx.x + 1] = squares;
        sums[3 * blockIdx.x + 2] = bends;
    }
}

// launch: blocks=rows
KERNEL vsgd_fold(const wide* sums /*n//256*3*/, const int* table /*n//256*/, wide* totals /*rows*3*/, int rows,
                 long long n) {
    const int row = blockIdx.x;
    wide means = 0, squares = 0, bends = 0;
    for (long long b = threadIdx.x; b < n / 256; b += THREADS)
        if (table[b] == row) {
            means += sums[3 * b];
            squares += sums[3 * b + 1];
            bends += sums[3 * b + 2];
        }
    means = block_sum(means);
    squares = block_sum(squares);
    bends = block_sum(bends);
    if (threadIdx.x == 0) {
        totals[3 * row] = means;
        totals[3 * row + 1] = squares;
        totals[3 * row + 2] = bends;
    }
}

// launch: blocks=1
KERNEL vsgd_total(const wide* triples /*m*3*/, wide* total /*rows*3*/, int rows, int m) {
    wide means = 0, squares = 0, bends = 0;
    for (int k = threadIdx.x; k < m; k += THREADS) {
        means += triples[3 * k];
        squares += triples[3 * k + 1];
        bends += triples[3 * k + 2];
    }
    means = block_sum(means);
    squares = block_sum(squares);
    bends = block_sum(bends);
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        total[3 * row] = means;
        total[3 * row + 1] = squares;
        total[3 * row + 2] = bends;
    }
}

// launch: over=n
KERNEL vsgd_update(wide* w /*n*/, const wide* g /*n*/, const wide* mean /*n*/, const wide* square /*n*/,
                   const wide* bend /*n*/, wide* memory /*n*/, const wide* totals /*rows*3*/,
                   const int* table /*n//256*/, const wide* rate /*rows*/, const int* group /*rows*/,
                   const wide* rates /*steps*/, const State* state /*1*/, wide floor, int single, int rows, int steps,
                   long long n) {
    if (state->apply == 0) return;
    const wide scale = (wide)state->gradient_scale, now = rates[min(state->update, steps - 1ll)];
    OVER(i, n) {
        const int row = table[i / 256];
        const wide lr = now * (wide)state->lr_scale[group[row]] * rate[row];
        const wide a = single ? mean[i] * mean[i] : totals[3 * row];
        const wide v = single ? square[i] : totals[3 * row + 1];
        const wide b = single ? bend[i] : totals[3 * row + 2];
        const wide t = state->update == 0 ? wide(2) : memory[i];
        if (v > 0) w[i] -= lr * (a / max(b, floor * v)) * (g[i] * scale);
        memory[i] = v > 0 && state->update > 0 ? t * (1 - a / v) + 1 : t;
    }
}

// launch: blocks=parts
KERNEL muon_momentum(const wide* w /*n*/, const wide* g /*n*/, wide* velocity /*n*/, const State* state /*1*/,
                     wide* direction /*n*/, wide* norms /*parts*2*/, wide momentum, int nesterov, long long n,
                     int parts) {
    const long long stop = (blockIdx.x + 1) * n / parts;
    const wide scale = (wide)state->gradient_scale;
    const bool apply = state->apply != 0;
    wide directions = 0, weights = 0;
    for (long long i = blockIdx.x * n / parts + threadIdx.x; i < stop; i += THREADS) {
        wide u = 0;
        if (apply) {
            const wide d = g[i] * scale, v = momentum * velocity[i] + d;
            velocity[i] = v;
            u = nesterov ? d + momentum * v : v;
        }
        direction[i] = u;
        directions += u * u;
        weights += w[i] * w[i];
    }
    directions = block_sum(directions);
    weights = block_sum(weights);
    if (threadIdx.x == 0) {
        norms[2 * blockIdx.x] = directions;
        norms[2 * blockIdx.x + 1] = weights;
    }
}

// launch: over=n
KERNEL muon_normalize(const wide* direction /*n*/, const wide* norms /*parts*2*/, real* x /*n*/, long long n,
                      int parts) {
    wide squares = 0;
    for (int p = threadIdx.x; p < parts; p += THREADS) squares += norms[2 * p];
    const wide length = max(sqrt(block_sum(squares)), wide(1e-7));
    OVER(i, n) store(x + i, direction[i] / length);
}

// launch: over=matrices*side*side
KERNEL muon_polynomial(const real* z /*matrices*side*side*/, real* y /*matrices*side*side*/, wide a, wide b, wide c,
                       int matrices, int side) {
    const int square = side * side;
    OVER(i, (long long)matrices * square) {
        const int place = (int)(i % square);
        const wide diagonal = place / side == place % side ? a : wide(0);
        store(y + i, b * load(y + i) + c * load(z + i) + diagonal);
    }
}

// launch: over=n
KERNEL muon_update(wide* w /*n*/, const real* x /*n*/, const wide* norms /*parts*2*/, const wide* rate /*rows*/,
                   const wide* decay /*rows*/, const int* group /*rows*/, const wide* rates /*steps*/,
                   const State* state /*1*/, wide scale, wide length, int row, int rows, int steps, long long n,
                   int parts) {
    wide squares = 0;
    for (int p = threadIdx.x; p < parts; p += THREADS) squares += norms[2 * p + 1];
    const wide size = sqrt(block_sum(squares)), now = rates[min(state->update, steps - 1ll)];
    const wide lr = now * (wide)state->lr_scale[group[row]] * rate[row];
    const wide shrink = length > 0 && size > 0 ? length / size : 1 - lr * decay[row];
    if (state->apply != 0) OVER(i, n) w[i] = w[i] * shrink - lr * scale * load(x + i);
}
