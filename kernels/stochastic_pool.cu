// Stochastic pooling (Zeiler and Fergus 2013) over windows of kh x kw: a place of the window is drawn with
// probability a/sum of a, where a = max(x, 0) inside of the image and 0 in the padding.
//
//   stochastic_pool_forward   y = x at the place drawn, index = ky*kw + kx of it (kh*kw <= 255); y = 0, index = 255
//                             where no x of the window is above 0. Backward is maxpool_backward with this index.
//   stochastic_pool_expected  y = sum of a*a / sum of a, the mean of what is drawn; 0 where no x is above 0
//
// The draw of element e = first*oh*ow*c + i of the whole batch's output is u = (bits >> 8) * 2^-24, bits the 32-bit
// lane e%8, low bits first, of Philox block e//8 of the stream (site, state.batch). Drawn is the first place in
// reading order at which the running sum of a is above u * the whole sum. All of that is additions in one order and
// one product, which round in one way: for the same x the same index everywhere, but for a denormal, which a GPU takes
// for 0. A NaN or infinity is drawn for certain, the first one, so that it is not hidden.
//
// Outputs: overwritten.
// Bytes:   each tensor once; where windows overlap, and the second time, the cache serves.
// Launch:  over, four channels of a pixel a thread.
#include "philox.cuh"
#include "state.cuh"
#include "window.cuh"

#define NOWHERE 255

// What counts of x: 0 where it is negative; NaN stays.
DEVICE wide activity(wide x) { return x < 0 ? wide(0) : x; }

// f(tap, the four activities) for each place of the window inside of the image, in reading order.
template <class F>
DEVICE void taps(const real* x, const Place& out, int h, int w, int c, int kh, int kw, int top, int left, F f) {
    const int y0 = max(0, -top), y1 = min(kh, h - top), x0 = max(0, -left), x1 = min(kw, w - left);
    const real* from = x + (long long)out.image * h * w * c + out.channel;
    for (int ky = y0; ky < y1; ky++)
        for (int kx = x0; kx < x1; kx++) {
            wide v[4];
            load_four(from + ((long long)(top + ky) * w + left + kx) * c, out.count, v);
            UNROLL for (int j = 0; j < 4; j++) v[j] = activity(v[j]);
            f(ky * kw + kx, v);
        }
}

// launch: over=n*oh*ow*((c+3)//4)
KERNEL stochastic_pool_forward(const real* x /*n*h*w*c*/, real* y /*n*oh*ow*c*/,
                               unsigned char* index /*n*oh*ow*c*/, const State* state /*1*/,
                               unsigned long long seed, unsigned int site, long long first, int n, int h, int w,
                               int c, int oh, int ow, int kh, int kw, int stride_y, int stride_x, int pad_y,
                               int pad_x) {
    OVER(i, (long long)n * oh * ow * ((c + 3) / 4)) {
        const Place out(i, oh, ow, c);
        const int top = out.y * stride_y - pad_y, left = out.x * stride_x - pad_x;
        wide goal[4] = {}, sum[4] = {}, value[4] = {};
        taps(x, out, h, w, c, kh, kw, top, left, [&](int, const wide* v) {
            UNROLL for (int j = 0; j < 4; j++) goal[j] += v[j];
        });
        unsigned int bits[4];
        four_lanes<32>(seed, site, state->batch, first * oh * ow * c + out.at, bits);
        UNROLL for (int j = 0; j < 4; j++) goal[j] *= (wide)(bits[j] >> 8) * wide(5.9604644775390625e-8);
        unsigned char tap[4] = {NOWHERE, NOWHERE, NOWHERE, NOWHERE};
        bool found[4] = {};
        taps(x, out, h, w, c, kh, kw, top, left, [&](int here, const wide* v) {
            UNROLL for (int j = 0; j < 4; j++)
                if (!found[j] && v[j] != 0) {  // the last of these, should the sum have overflowed
                    sum[j] += v[j];
                    value[j] = v[j];
                    tap[j] = (unsigned char)here;
                    found[j] = sum[j] > goal[j] || !is_finite(v[j]);
                }
        });
        store_four(y + out.at, out.count, value);
        write_four(index + out.at, out.count, tap);
    }
}

// launch: over=n*oh*ow*((c+3)//4)
KERNEL stochastic_pool_expected(const real* x /*n*h*w*c*/, real* y /*n*oh*ow*c*/, int n, int h, int w, int c,
                                int oh, int ow, int kh, int kw, int stride_y, int stride_x, int pad_y,
                                int pad_x) {
    OVER(i, (long long)n * oh * ow * ((c + 3) / 4)) {
        const Place out(i, oh, ow, c);
        const int top = out.y * stride_y - pad_y, left = out.x * stride_x - pad_x;
        wide sum[4] = {}, squares[4] = {};
        taps(x, out, h, w, c, kh, kw, top, left, [&](int, const wide* v) {
            UNROLL for (int j = 0; j < 4; j++) {
                sum[j] += v[j];
                squares[j] += v[j] * v[j];
            }
        });
        UNROLL for (int j = 0; j < 4; j++) squares[j] = sum[j] == 0 ? wide(0) : squares[j] / sum[j];
        store_four(y + out.at, out.count, squares);
    }
}
