// Local response normalisation: a value is divided by a power of the squares around it.
//
//   lrn_across_forward   scale[i] = k + share * sum of x[j]^2, j: the `size` channels around i, at its pixel
//   lrn_within_forward   the same, j: the size x size pixels around i, in its channel
//                        y = x * scale^-beta
//   lrn_across_backward, lrn_within_backward
//                        dx[i] = dy[i]*scale[i]^-beta - 2*beta*share * x[i] * sum of dy[j]*y[j]/scale[j]
//                        over the same neighbours: j has i around it where i has j, because size is odd
//
// share is alpha/size, or alpha/size^2: a mean's divisor counts all places, and what is none adds zero.
// Outputs: overwritten; none may be an input.
// Bytes:   each tensor once, where windows overlap, the cache serves; scale is wide.
// Launch:  over, four channels of a pixel a thread.
#include "common.cuh"

// The sums of f over the channels first - half .. first + 3 + half of a pixel, of each of four its own `size`.
template <class F>
DEVICE void sum_across(int first, int count, int c, int half, wide* sum, F f) {
    const int stop = min(c, first + count + half);
    for (int j = max(0, first - half); j < stop; j++) {
        const wide v = f(j);
        UNROLL for (int i = 0; i < 4; i++)
            if (j >= first + i - half && j <= first + i + half) sum[i] += v;
    }
}

// The sums of f over the pixels around (y, x) that lie in the image; f(offset, v) gives four channels' values at a
// distance in elements.
template <class F>
DEVICE void sum_within(int y, int x, int h, int w, int c, int half, wide* sum, F f) {
    const int y1 = min(h - 1, y + half), x1 = min(w - 1, x + half);
    for (int ny = max(0, y - half); ny <= y1; ny++)
        for (int nx = max(0, x - half); nx <= x1; nx++) {
            wide v[4];
            f(((long long)(ny - y) * w + nx - x) * c, v);
            UNROLL for (int j = 0; j < 4; j++) sum[j] += v[j];
        }
}

// y = x * scale^-beta with scale = k + share * sum, of four.
DEVICE void normalise(const real* x, real* y, wide* scale, int count, const wide* sum, wide share, wide beta, wide k) {
    wide v[4], s[4];
    load_four(x, count, v);
    UNROLL for (int j = 0; j < 4; j++) {
        s[j] = k + share * sum[j];
        v[j] *= pow(s[j], -beta);
    }
    store_four(scale, count, s);
    store_four(y, count, v);
}

// dx = dy * scale^-beta - factor * x * sum, of four.
DEVICE void spread(const real* dy, const real* x, const wide* scale, real* dx, int count, const wide* sum,
                   wide factor, wide beta) {
    wide d[4], v[4], s[4];
    load_four(dy, count, d);
    load_four(x, count, v);
    load_four(scale, count, s);
    UNROLL for (int j = 0; j < 4; j++) d[j] = d[j] * pow(s[j], -beta) - factor * v[j] * sum[j];
    store_four(dx, count, d);
}

// launch: over=rows*((c+3)//4)
KERNEL lrn_across_forward(const real* x /*rows*c*/, real* y /*rows*c*/, wide* scale /*rows*c*/, wide share,
                          wide beta, wide k, long long rows, int c, int size) {
    const int fours = (c + 3) / 4;
    OVER(i, rows * fours) {
        const long long row = i / fours;
        const int first = 4 * (int)(i - row * fours), count = up_to_four(c - first);
        const real* from = x + row * c;
        wide sum[4] = {};
        sum_across(first, count, c, size / 2, sum, [=](int j) {
            const wide v = load(from + j);
            return v * v;
        });
        const long long at = row * c + first;
        normalise(x + at, y + at, scale + at, count, sum, share, beta, k);
    }
}

// launch: over=rows*((c+3)//4)
KERNEL lrn_across_backward(const real* dy /*rows*c*/, const real* x /*rows*c*/, const real* y /*rows*c*/,
                           const wide* scale /*rows*c*/, real* dx /*rows*c*/, wide share, wide beta, long long rows,
                           int c, int size) {
    const int fours = (c + 3) / 4;
    OVER(i, rows * fours) {
        const long long row = i / fours, start = row * c;
        const int first = 4 * (int)(i - row * fours), count = up_to_four(c - first);
        wide sum[4] = {};
        sum_across(first, count, c, size / 2, sum, [=](int j) {
            return load(dy + start + j) * load(y + start + j) / scale[start + j];
        });
        const long long at = start + first;
        spread(dy + at, x + at, scale + at, dx + at, count, sum, 2 * beta * share, beta);
    }
}

// launch: over=n*h*w*((c+3)//4)
KERNEL lrn_within_forward(const real* x /*n*h*w*c*/, real* y /*n*h*w*c*/, wide* scale /*n*h*w*c*/, wide share,
                          wide beta, wide k, int n, int h, int w, int c, int size) {
    const int fours = (c + 3) / 4;
    OVER(i, (long long)n * h * w * fours) {
        const long long pixel = i / fours, line = pixel / w;
        const int first = 4 * (int)(i - pixel * fours), count = up_to_four(c - first);
        const long long at = pixel * c + first;
        wide sum[4] = {};
        sum_within((int)(line % h), (int)(pixel - line * w), h, w, c, size / 2, sum, [=](long long offset, wide* v) {
            load_four(x + at + offset, count, v);
            UNROLL for (int j = 0; j < 4; j++) v[j] *= v[j];
        });
        normalise(x + at, y + at, scale + at, count, sum, share, beta, k);
    }
}

// launch: over=n*h*w*((c+3)//4)
KERNEL lrn_within_backward(const real* dy /*n*h*w*c*/, const real* x /*n*h*w*c*/, const real* y /*n*h*w*c*/,
                           const wide* scale /*n*h*w*c*/, real* dx /*n*h*w*c*/, wide share, wide beta, int n, int h,
                           int w, int c, int size) {
    const int fours = (c + 3) / 4;
    OVER(i, (long long)n * h * w * fours) {
        const long long pixel = i / fours, line = pixel / w;
        const int first = 4 * (int)(i - pixel * fours), count = up_to_four(c - first);
        const long long at = pixel * c + first;
        wide sum[4] = {};
        sum_within((int)(line % h), (int)(pixel - line * w), h, w, c, size / 2, sum, [=](long long offset, wide* v) {
            wide u[4], s[4];
            load_four(dy + at + offset, count, v);
            load_four(y + at + offset, count, u);
            load_four(scale + at + offset, count, s);
            UNROLL for (int j = 0; j < 4; j++) v[j] = v[j] * u[j] / s[j];
        });
        spread(dy + at, x + at, scale + at, dx + at, count, sum, 2 * beta * share, beta);
    }
}
