// Depthwise convolution: each channel has filters of its own, `multiplier` of them. Output channel o reads input
// channel o/multiplier; window places are those of conv.cu. x (n,h,w,c), y and dy (n,oh,ow,c*multiplier),
// weight (kh,kw,c*multiplier).
//
//   depthwise_forward   y[image, oy, ox, o] = sum over ky, kx of x[image, iy, ix, o/multiplier]*weight[ky, kx, o]
//                       iy = oy*stride_y - pad_y + ky*dilation_y, ix alike; x is 0 outside of the image
//   depthwise_backward  dx = the adjoint: a pixel gathers from the windows that hold it, in their order
//   depthwise_weight    sums[p, ky, kx, o] = sum of x*dy over lines p*lines//parts to (p+1)*lines//parts of the
//                       n*oh lines of output pixels; sum_parts adds the parts up
//
// Outputs: overwritten.
// Bytes:   each tensor once, where the cache serves the kh*kw reads of x, or of dy.
// Launch:  over, four channels of a pixel a thread; depthwise_weight a block a tap, part and 32 output channels.
#include "reduce.cuh"
#include "window.cuh"

// v = x[channel[j]] of a pixel for four output channels; with multiplier 1 these are neighbours.
DEVICE void load_inputs(const real* x, const int* channel, int multiplier, int count, wide* v) {
    if (multiplier == 1) {
        load_four(x + channel[0], count, v);
    } else {
        UNROLL for (int j = 0; j < 4; j++) v[j] = j < count ? load(x + channel[j]) : wide(0);
    }
}

// launch: over=n*oh*ow*((c*multiplier+3)//4)
KERNEL depthwise_forward(const real* x /*n*h*w*c*/, const wide* weight /*kh*kw*c*multiplier*/,
                         real* y /*n*oh*ow*c*multiplier*/, int n, int h, int w, int c, int oh, int ow, int kh,
                         int kw, int stride_y, int stride_x, int pad_y, int pad_x, int dilation_y,
                         int dilation_x, int multiplier) {
    const int outputs = c * multiplier, fours = (outputs + 3) / 4;
    OVER(i, (long long)n * oh * ow * fours) {
        const long long pixel = i / fours, line = pixel / ow, image = line / oh;
        const int o = 4 * (int)(i - pixel * fours), count = up_to_four(outputs - o);
        const int left = (int)(pixel - line * ow) * stride_x - pad_x;
        const int top = (int)(line - image * oh) * stride_y - pad_y;
        int channel[4];
        UNROLL for (int j = 0; j < 4; j++) channel[j] = (o + j) / multiplier;
        const real* from = x + image * h * w * c;
        wide sum[4] = {};
        for (int ky = 0; ky < kh; ky++) {
            const int iy = top + ky * dilation_y;
            if (iy < 0 || iy >= h) continue;
            for (int kx = 0; kx < kw; kx++) {
                const int ix = left + kx * dilation_x;
                if (ix < 0 || ix >= w) continue;
                wide v[4], f[4];
                load_inputs(from + ((long long)iy * w + ix) * c, channel, multiplier, count, v);
                load_four(weight + (long long)(ky * kw + kx) * outputs + o, count, f);
                UNROLL for (int j = 0; j < 4; j++) sum[j] += v[j] * f[j];
            }
        }
        store_four(y + pixel * outputs + o, count, sum);
    }
}

// launch: over=n*h*w*((c+3)//4)
KERNEL depthwise_backward(const real* dy /*n*oh*ow*c*multiplier*/, const wide* weight /*kh*kw*c*multiplier*/,
                          real* dx /*n*h*w*c*/, int n, int h, int w, int c, int oh, int ow, int kh, int kw,
                          int stride_y, int stride_x, int pad_y, int pad_x, int dilation_y, int dilation_x,
                          int multiplier) {
    const int outputs = c * multiplier, fours = (c + 3) / 4;
    const int reach_y = (kh - 1) * dilation_y, reach_x = (kw - 1) * dilation_x;
    OVER(i, (long long)n * h * w * fours) {
        const long long pixel = i / fours, line = pixel / w, image = line / h;
        const int channel = 4 * (int)(i - pixel * fours), count = up_to_four(c - channel);
        const int px = (int)(pixel - line * w) + pad_x, py = (int)(line - image * h) + pad_y;
        const int first_y = first_window(py, reach_y, stride_y), last_y = last_window(py, oh, stride_y);
        const int first_x = first_window(px, reach_x, stride_x), last_x = last_window(px, ow, stride_x);
        wide sum[4] = {};
        for (int oy = first_y; oy <= last_y; oy++) {
            const int ky = tap_at(py - oy * stride_y, dilation_y);
            if (ky < 0) continue;
            for (int ox = first_x; ox <= last_x; ox++) {
                const int kx = tap_at(px - ox * stride_x, dilation_x);
                if (kx < 0) continue;
                const real* d = dy + ((image * oh + oy) * ow + ox) * outputs + channel * multiplier;
                const wide* f = weight + (long long)(ky * kw + kx) * outputs + channel * multiplier;
                if (multiplier == 1) {
                    wide u[4], v[4];
                    load_four(d, count, u);
                    load_four(f, count, v);
                    UNROLL for (int j = 0; j < 4; j++) sum[j] += u[j] * v[j];
                } else {
                    UNROLL for (int j = 0; j < 4; j++)
                        for (int m = 0; m < multiplier && j < count; m++)
                            sum[j] += load(d + j * multiplier + m) * f[j * multiplier + m];
                }
            }
        }
        store_four(dx + pixel * c + channel, count, sum);
    }
}

// launch: blocks=kh*kw*parts*((c*multiplier+31)//32)
KERNEL depthwise_weight(const real* x /*n*h*w*c*/, const real* dy /*n*oh*ow*c*multiplier*/,
                        wide* sums /*parts*kh*kw*c*multiplier*/, int n, int h, int w, int c, int oh, int ow,
                        int kh, int kw, int stride_y, int stride_x, int pad_y, int pad_x, int dilation_y,
                        int dilation_x, int multiplier, int parts) {
    const int outputs = c * multiplier, tiles = parts * ((outputs + WARP - 1) / WARP);
    const int tap = blockIdx.x / tiles, ky = tap / kw, kx = tap - ky * kw;
    const Tile tile((long long)n * oh, outputs, parts, (int)blockIdx.x - tap * tiles);  // a row is a line
    const int shift_y = ky * dilation_y - pad_y, shift_x = kx * dilation_x - pad_x;
    wide sum = 0;
    if (tile.column < outputs)
        for (long long line = tile.first; line < tile.stop; line += tile.step) {
            const long long image = line / oh;
            const int iy = (int)(line - image * oh) * stride_y + shift_y;
            if (iy < 0 || iy >= h) continue;
            const real* from = x + (image * h + iy) * w * c + tile.column / multiplier;
            const real* d = dy + line * ow * outputs + tile.column;
            for (int ox = 0; ox < ow; ox++) {
                const int ix = ox * stride_x + shift_x;
                if (ix >= 0 && ix < w) sum += load(from + (long long)ix * c) * load(d + (long long)ox * outputs);
            }
        }
    sum = fold_rows(sum, tile.lanes, [](wide a, wide b) { return a + b; });
    if (tile.writes) sums[((long long)tile.part * kh * kw + tap) * outputs + tile.column] = sum;
}
