// Pooling over windows of kh x kw, and over whole images.
//
//   maxpool_forward   y = largest x of the window, index = ky*kw + kx of the first largest in reading order
//                     (kh*kw <= 256). Padding never wins; NaN does.
//   maxpool_backward  dx[i] = sum of dy[o] over the windows o whose index points at i
//   avgpool_forward   y = sum of the window's x inside the image / divisor
//   avgpool_backward  dx[i] = sum of dy[o]/divisor[o] over the windows o that hold i
//                     divisor: taps of the window inside the padded image (include_pad 1) or the image (0)
//   global_average_forward   y[image] = mean of x[image] over its pixels
//   global_average_backward  dx[image, pixel] = dy[image]/pixels
//
// Outputs: overwritten; every backward gathers, so there are no atomics.
// Bytes:   each tensor once; where windows overlap, the cache serves.
// Launch:  over, four channels of a pixel a thread; global_average_forward a block an image and 32 channels.
#include "reduce.cuh"
#include "window.cuh"

// launch: over=n*oh*ow*((c+3)//4)
KERNEL maxpool_forward(const real* x /*n*h*w*c*/, real* y /*n*oh*ow*c*/, unsigned char* index /*n*oh*ow*c*/,
                       int n, int h, int w, int c, int oh, int ow, int kh, int kw, int stride_y, int stride_x,
                       int pad_y, int pad_x) {
    OVER(i, (long long)n * oh * ow * ((c + 3) / 4)) {
        const Place out(i, oh, ow, c);
        const int top = out.y * stride_y - pad_y, left = out.x * stride_x - pad_x;
        const int y0 = max(0, -top), y1 = min(kh, h - top), x0 = max(0, -left), x1 = min(kw, w - left);
        const real* from = x + (long long)out.image * h * w * c + out.channel;
        wide best[4] = {};
        unsigned char tap[4] = {};
        for (int ky = y0; ky < y1; ky++)
            for (int kx = x0; kx < x1; kx++) {
                const bool first = ky == y0 && kx == x0;
                wide v[4];
                load_four(from + ((long long)(top + ky) * w + left + kx) * c, out.count, v);
                UNROLL for (int j = 0; j < 4; j++)
                    if (first || beats(v[j], best[j])) {
                        best[j] = v[j];
                        tap[j] = (unsigned char)(ky * kw + kx);
                    }
            }
        store_four(y + out.at, out.count, best);
        write_four(index + out.at, out.count, tap);
    }
}

// launch: over=n*h*w*((c+3)//4)
KERNEL maxpool_backward(const real* dy /*n*oh*ow*c*/, const unsigned char* index /*n*oh*ow*c*/,
                        real* dx /*n*h*w*c*/, int n, int h, int w, int c, int oh, int ow, int kh, int kw,
                        int stride_y, int stride_x, int pad_y, int pad_x) {
    OVER(i, (long long)n * h * w * ((c + 3) / 4)) {
        const Place in(i, h, w, c);
        const int py = in.y + pad_y, px = in.x + pad_x;
        const int first_y = first_window(py, kh - 1, stride_y), last_y = last_window(py, oh, stride_y);
        const int first_x = first_window(px, kw - 1, stride_x), last_x = last_window(px, ow, stride_x);
        wide sum[4] = {};
        for (int oy = first_y; oy <= last_y; oy++)
            for (int ox = first_x; ox <= last_x; ox++) {
                const int here = (py - oy * stride_y) * kw + px - ox * stride_x;
                const long long at = (((long long)in.image * oh + oy) * ow + ox) * c + in.channel;
                wide v[4];
                unsigned char tap[4];
                load_four(dy + at, in.count, v);
                read_four(index + at, in.count, tap);
                UNROLL for (int j = 0; j < 4; j++) sum[j] += tap[j] == here ? v[j] : wide(0);
            }
        store_four(dx + in.at, in.count, sum);
    }
}

// launch: over=n*oh*ow*((c+3)//4)
KERNEL avgpool_forward(const real* x /*n*h*w*c*/, real* y /*n*oh*ow*c*/, int n, int h, int w, int c, int oh,
                       int ow, int kh, int kw, int stride_y, int stride_x, int pad_y, int pad_x,
                       int include_pad) {
    const int border_y = include_pad ? pad_y : 0, border_x = include_pad ? pad_x : 0;
    OVER(i, (long long)n * oh * ow * ((c + 3) / 4)) {
        const Place out(i, oh, ow, c);
        const int top = out.y * stride_y - pad_y, left = out.x * stride_x - pad_x;
        const int y0 = max(0, top), y1 = min(h, top + kh), x0 = max(0, left), x1 = min(w, left + kw);
        const wide divisor = (wide)(clipped(top, kh, h, border_y) * clipped(left, kw, w, border_x));
        const real* from = x + (long long)out.image * h * w * c + out.channel;
        wide sum[4] = {};
        for (int iy = y0; iy < y1; iy++)
            for (int ix = x0; ix < x1; ix++) {
                wide v[4];
                load_four(from + ((long long)iy * w + ix) * c, out.count, v);
                UNROLL for (int j = 0; j < 4; j++) sum[j] += v[j];
            }
        UNROLL for (int j = 0; j < 4; j++) sum[j] /= divisor;
        store_four(y + out.at, out.count, sum);
    }
}

// launch: over=n*h*w*((c+3)//4)
KERNEL avgpool_backward(const real* dy /*n*oh*ow*c*/, real* dx /*n*h*w*c*/, int n, int h, int w, int c,
                        int oh, int ow, int kh, int kw, int stride_y, int stride_x, int pad_y, int pad_x,
                        int include_pad) {
    const int border_y = include_pad ? pad_y : 0, border_x = include_pad ? pad_x : 0;
    OVER(i, (long long)n * h * w * ((c + 3) / 4)) {
        const Place in(i, h, w, c);
        const int py = in.y + pad_y, px = in.x + pad_x;
        const int first_y = first_window(py, kh - 1, stride_y), last_y = last_window(py, oh, stride_y);
        const int first_x = first_window(px, kw - 1, stride_x), last_x = last_window(px, ow, stride_x);
        wide sum[4] = {};
        for (int oy = first_y; oy <= last_y; oy++) {
            const int rows = clipped(oy * stride_y - pad_y, kh, h, border_y);
            for (int ox = first_x; ox <= last_x; ox++) {
                const wide divisor = (wide)(rows * clipped(ox * stride_x - pad_x, kw, w, border_x));
                wide v[4];
                load_four(dy + (((long long)in.image * oh + oy) * ow + ox) * c + in.channel, in.count, v);
                UNROLL for (int j = 0; j < 4; j++) sum[j] += v[j] / divisor;
            }
        }
        store_four(dx + in.at, in.count, sum);
    }
}

// launch: blocks=n*((c+31)//32)
KERNEL global_average_forward(const real* x /*n*pixels*c*/, real* y /*n*c*/, int n, int pixels, int c) {
    const Tile tile((long long)n * pixels, c, n);  // an image is a part
    const wide sum = column_tile_sum(x, tile, c);
    if (tile.writes) store(y + (long long)tile.part * c + tile.column, sum / (wide)pixels);
}

// launch: over=n*pixels*((c+3)//4)
KERNEL global_average_backward(const real* dy /*n*c*/, real* dx /*n*pixels*c*/, int n, int pixels, int c) {
    OVER(i, (long long)n * pixels * ((c + 3) / 4)) {
        const Place in(i, 1, pixels, c);
        wide v[4];
        load_four(dy + (long long)in.image * c + in.channel, in.count, v);
        UNROLL for (int j = 0; j < 4; j++) v[j] /= (wide)pixels;
        store_four(dx + in.at, in.count, v);
    }
}
