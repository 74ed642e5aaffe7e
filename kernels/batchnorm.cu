// Batch normalisation over the rows of a (rows, c) matrix: a row is a pixel of an image, a column a channel.
// Alone, with the ReLU behind it, or with the residual sum and the ReLU behind that.
// Part p is rows p*rows//parts to (p+1)*rows//parts; xhat = (x - mean)*inverse, z = xhat*gamma + beta.
//
//   batchnorm_moments        moments[p] = count, mean, M2 = sum of (x - mean)^2 of part p    rows*c reals in
//   batchnorm_combine        total = the moments of all parts together (Chan, Golub and LeVeque 1979)
//   batchnorm_statistics     mean; inverse = 1/sqrt(M2/count + eps); batch_mean (+)= mean;
//                            batch_variance (+)= M2/(count - 1), M2 where count is 1
//   batchnorm_inverse        inverse = 1/sqrt(variance + eps)
//   batchnorm_forward        y = z; y may be x                                       rows*c reals in and out
//   batchnorm_backward_sums  sums[p] = sum of dy, sum of dy*xhat over part p               2*rows*c reals in
//   batchnorm_gradient       dgamma (+)= sums[1], dbeta (+)= sums[0]
//   batchnorm_backward       dx = gamma*inverse*(dy - sums[0]/total - xhat*sums[1]/total), total: rows of the
//                            whole batch; dx may be dy or x                    2*rows*c reals in, rows*c out
//
//   batchnorm_relu_forward        y = max(z, 0); y may be x                          rows*c reals in and out
//   batchnorm_relu_backward_sums  as without relu, of dy where z > 0, else 0               2*rows*c reals in
//   batchnorm_relu_backward       as without relu, of dy where z > 0, else 0; dx may be dy or x
//                                                                              2*rows*c reals in, rows*c out
//   batchnorm_add_relu_forward    y = max(z + residual, 0); y may be x or residual
//                                                                              2*rows*c reals in, rows*c out
//
// The backward of the last is relu_backward, which gives the residual's gradient, and then the plain kernels
// on that. NaN stays NaN.
// Outputs: overwritten; (+)= adds where accumulate is 1.
// Bytes:   at the right; without a number, some multiple of c.
// Launch:  a block for each part and 32 columns where rows are summed; else over, four elements or one column
//          a thread.
#include "reduce.cuh"

struct Moments {
    wide count, mean, m2;
};

// The moments of two sets together: exact where one is empty, and never a difference of large squares.
DEVICE Moments together(Moments a, Moments b) {
    const wide count = a.count + b.count, share = count > 0 ? b.count / count : wide(0),
               delta = b.mean - a.mean;
    return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// launch: blocks=parts*((c+31)//32)
KERNEL batchnorm_moments(const real* x /*rows*c*/, wide* moments /*parts*3*c*/, long long rows, int c,
                         int parts) {
    const int chunk = 8;  // rows in registers: their moments in two passes, then one merge and one division
    const Tile tile(rows, c, parts);
    Moments sum = {0, 0, 0};
    if (tile.column < c)
        for (long long row = tile.first; row < tile.stop; row += chunk * tile.step) {
            wide v[chunk], mean = 0, m2 = 0;
            int count = 0;
            UNROLL for (int j = 0; j < chunk; j++) {
                const long long r = row + j * tile.step;
                const bool here = r < tile.stop;
                v[j] = here ? load(x + r * c + tile.column) : wide(0);
                mean += v[j];
                count += here;
            }
            mean /= (wide)count;
            UNROLL for (int j = 0; j < chunk; j++) m2 += j < count ? (v[j] - mean) * (v[j] - mean) : wide(0);
            sum = together(sum, {(wide)count, mean, m2});
        }
    sum = fold_rows(sum, tile.lanes, together);
    if (tile.writes) {
        wide* to = moments + (long long)tile.part * 3 * c + tile.column;
        to[0] = sum.count;
        to[c] = sum.mean;
        to[2 * c] = sum.m2;
    }
}

// launch: blocks=(c+31)//32
KERNEL batchnorm_combine(const wide* moments /*parts*3*c*/, wide* total /*3*c*/, int parts, int c) {
    const Tile tile(parts, c, 1);
    Moments sum = {0, 0, 0};
    if (tile.column < c)
        for (long long part = tile.first; part < tile.stop; part += tile.step) {
            const wide* from = moments + part * 3 * c + tile.column;
            sum = together(sum, {from[0], from[c], from[2 * c]});
        }
    sum = fold_rows(sum, tile.lanes, together);
    if (tile.writes) {
        total[tile.column] = sum.count;
        total[c + tile.column] = sum.mean;
        total[2 * c + tile.column] = sum.m2;
    }
}

// launch: over=c
KERNEL batchnorm_statistics(const wide* total /*3*c*/, wide* mean /*c*/, wide* inverse /*c*/,
                            wide* batch_mean /*c*/, wide* batch_variance /*c*/, wide eps, int accumulate,
                            int c) {
    OVER(j, c) {
        const wide count = total[j], center = total[c + j], m2 = total[2 * c + j];
        const wide unbiased = count > 1 ? m2 / (count - 1) : m2;
        mean[j] = center;
        inverse[j] = 1 / sqrt(m2 / count + eps);
        batch_mean[j] = accumulate ? batch_mean[j] + center : center;
        batch_variance[j] = accumulate ? batch_variance[j] + unbiased : unbiased;
    }
}

// launch: over=c
KERNEL batchnorm_inverse(const wide* variance /*c*/, wide* inverse /*c*/, wide eps, int c) {
    OVER(j, c) inverse[j] = 1 / sqrt(variance[j] + eps);
}

// z, in these very operations wherever it is needed: backward must find the sign that forward saw.
DEVICE wide affine(wide x, wide mean, wide inverse, wide gamma, wide beta) {
    return (x - mean) * (inverse * gamma) + beta;
}

// y = what `after(v, at, count)` makes of v, the z of the `count` neighbours from element `at` on.
template <class After>
DEVICE void normalise(const real* x, const wide* mean, const wide* inverse, const wide* gamma,
                      const wide* beta, real* y, long long rows, int c, After after) {
    OVER(i, (rows * c + 3) / 4) {
        const int count = up_to_four(rows * c - 4 * i), column = (int)(4 * i % c);
        wide v[4], m[4], s[4], g[4], b[4];
        load_four(x + 4 * i, count, v);
        load_columns(mean, column, c, m);
        load_columns(inverse, column, c, s);
        load_columns(gamma, column, c, g);
        load_columns(beta, column, c, b);
        UNROLL for (int j = 0; j < 4; j++) v[j] = affine(v[j], m[j], s[j], g[j], b[j]);
        after(v, 4 * i, count);
        store_four(y + 4 * i, count, v);
    }
}

DEVICE wide relu(wide v) { return v < 0 ? wide(0) : v; }

// launch: over=(rows*c+3)//4
KERNEL batchnorm_forward(const real* x /*rows*c*/, const wide* mean /*c*/, const wide* inverse /*c*/,
                         const wide* gamma /*c*/, const wide* beta /*c*/, real* y /*rows*c*/, long long rows,
                         int c) {
    normalise(x, mean, inverse, gamma, beta, y, rows, c, [](wide*, long long, int) {});
}

// launch: over=(rows*c+3)//4
KERNEL batchnorm_relu_forward(const real* x /*rows*c*/, const wide* mean /*c*/, const wide* inverse /*c*/,
                              const wide* gamma /*c*/, const wide* beta /*c*/, real* y /*rows*c*/,
                              long long rows, int c) {
    normalise(x, mean, inverse, gamma, beta, y, rows, c, [](wide* v, long long, int) {
        UNROLL for (int j = 0; j < 4; j++) v[j] = relu(v[j]);
    });
}

// launch: over=(rows*c+3)//4
KERNEL batchnorm_add_relu_forward(const real* x /*rows*c*/, const wide* mean /*c*/, const wide* inverse /*c*/,
                                  const wide* gamma /*c*/, const wide* beta /*c*/,
                                  const real* residual /*rows*c*/, real* y /*rows*c*/, long long rows,
                                  int c) {
    normalise(x, mean, inverse, gamma, beta, y, rows, c, [residual](wide* v, long long at, int count) {
        wide r[4];
        load_four(residual + at, count, r);
        UNROLL for (int j = 0; j < 4; j++) v[j] = relu(v[j] + r[j]);
    });
}

struct Pair {
    wide dy, product;
};

// Without RELU neither gamma nor beta is read.
template <bool RELU>
DEVICE void backward_sums(const real* dy, const real* x, const wide* mean, const wide* inverse,
                          const wide* gamma, const wide* beta, wide* sums, long long rows, int c, int parts) {
    const Tile tile(rows, c, parts);
    Pair sum = {0, 0};
    if (tile.column < c) {
        const wide center = mean[tile.column], spread = inverse[tile.column],
                   slope = RELU ? gamma[tile.column] : wide(1), shift = RELU ? beta[tile.column] : wide(0);
        for (long long row = tile.first; row < tile.stop; row += tile.step) {
            const long long at = row * c + tile.column;
            const wide v = load(x + at);
            wide d = load(dy + at);
            if (RELU) d = affine(v, center, spread, slope, shift) > 0 ? d : wide(0);
            sum.dy += d;
            sum.product += d * (v - center);
        }
        sum.product *= spread;
    }
    sum = fold_rows(sum, tile.lanes, [](Pair a, Pair b) { return Pair{a.dy + b.dy, a.product + b.product}; });
    if (tile.writes) {
        sums[(long long)tile.part * 2 * c + tile.column] = sum.dy;
        sums[(long long)tile.part * 2 * c + c + tile.column] = sum.product;
    }
}

// launch: blocks=parts*((c+31)//32)
KERNEL batchnorm_backward_sums(const real* dy /*rows*c*/, const real* x /*rows*c*/, const wide* mean /*c*/,
                               const wide* inverse /*c*/, wide* sums /*parts*2*c*/, long long rows, int c,
                               int parts) {
    backward_sums<false>(dy, x, mean, inverse, nullptr, nullptr, sums, rows, c, parts);
}

// launch: blocks=parts*((c+31)//32)
KERNEL batchnorm_relu_backward_sums(const real* dy /*rows*c*/, const real* x /*rows*c*/,
                                    const wide* mean /*c*/, const wide* inverse /*c*/,
                                    const wide* gamma /*c*/, const wide* beta /*c*/,
                                    wide* sums /*parts*2*c*/, long long rows, int c, int parts) {
    backward_sums<true>(dy, x, mean, inverse, gamma, beta, sums, rows, c, parts);
}

// launch: over=c
KERNEL batchnorm_gradient(const wide* sums /*2*c*/, wide* dgamma /*c*/, wide* dbeta /*c*/, int accumulate,
                          int c) {
    OVER(j, c) {
        dgamma[j] = accumulate ? dgamma[j] + sums[c + j] : sums[c + j];
        dbeta[j] = accumulate ? dbeta[j] + sums[j] : sums[j];
    }
}

// Without RELU beta is not read.
template <bool RELU>
DEVICE void backward(const real* dy, const real* x, const wide* mean, const wide* inverse, const wide* gamma,
                     const wide* beta, const wide* sums, real* dx, long long total, long long rows, int c) {
    const wide part = 1 / (wide)total;
    OVER(i, (rows * c + 3) / 4) {
        const int count = up_to_four(rows * c - 4 * i), column = (int)(4 * i % c);
        wide v[4], d[4], m[4], s[4], g[4], b[4], sum_dy[4], sum_product[4];
        load_four(dy + 4 * i, count, d);
        load_four(x + 4 * i, count, v);
        load_columns(mean, column, c, m);
        load_columns(inverse, column, c, s);
        load_columns(gamma, column, c, g);
        if (RELU) load_columns(beta, column, c, b);
        load_columns(sums, column, c, sum_dy);
        load_columns(sums + c, column, c, sum_product);
        UNROLL for (int j = 0; j < 4; j++) {
            const wide xhat = (v[j] - m[j]) * s[j];
            if (RELU) d[j] = affine(v[j], m[j], s[j], g[j], b[j]) > 0 ? d[j] : wide(0);
            d[j] = g[j] * s[j] * (d[j] - part * sum_dy[j] - xhat * (part * sum_product[j]));
        }
        store_four(dx + 4 * i, count, d);
    }
}

// launch: over=(rows*c+3)//4
KERNEL batchnorm_backward(const real* dy /*rows*c*/, const real* x /*rows*c*/, const wide* mean /*c*/,
                          const wide* inverse /*c*/, const wide* gamma /*c*/, const wide* sums /*2*c*/,
                          real* dx /*rows*c*/, long long total, long long rows, int c) {
    backward<false>(dy, x, mean, inverse, gamma, nullptr, sums, dx, total, rows, c);
}

// launch: over=(rows*c+3)//4
KERNEL batchnorm_relu_backward(const real* dy /*rows*c*/, const real* x /*rows*c*/, const wide* mean /*c*/,
                               const wide* inverse /*c*/, const wide* gamma /*c*/, const wide* beta /*c*/,
                               const wide* sums /*2*c*/, real* dx /*rows*c*/, long long total, long long rows,
                               int c) {
    backward<true>(dy, x, mean, inverse, gamma, beta, sums, dx, total, rows, c);
}
