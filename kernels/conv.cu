// Convolution as matrix multiplication: the patches of images to the rows of a matrix, and back.
//
//   unfold  columns[g, (image, oy, ox), (ky, kx, j)] = x[image, iy, ix, g*(c/groups) + j], 0 outside of the
//           image; iy = oy*stride_y - pad_y + ky*dilation_y, ix alike. Forward is then columns[g] @ W[g],
//           dW the same columns transposed @ dy.
//   fold    x[image, iy, ix, channel] = sum of all columns that unfold fills from it: its adjoint. A position
//           gathers from the windows that hold it, in their order: no atomics.
//
// Outputs: overwritten.
// Bytes:   n*h*w*c reals and kh*kw/(stride_y*stride_x) times as many columns, one read, the other written.
// Launch:  over, four channels of one position a thread (of the output in unfold, of the input in fold):
//          neighbours in a warp are neighbours in memory, and an index is divided once for all kh*kw taps.
#include "window.cuh"

// launch: over=groups*n*oh*ow*((c//groups+3)//4)
KERNEL unfold(const real* x /*n*h*w*c*/, real* columns /*groups*n*oh*ow*kh*kw*(c//groups)*/, int n, int h,
              int w, int c, int oh, int ow, int kh, int kw, int stride_y, int stride_x, int pad_y, int pad_x,
              int dilation_y, int dilation_x, int groups) {
    const int inside = c / groups, fours = (inside + 3) / 4;
    OVER(i, (long long)groups * n * oh * ow * fours) {
        const long long row = i / fours;  // of all groups' matrices
        const int channel = 4 * (int)(i - row * fours), count = up_to_four(inside - channel);
        const long long line = row / ow, plane = line / oh;
        const int ox = (int)(row - line * ow), oy = (int)(line - plane * oh);
        const int group = (int)(plane / n), image = (int)(plane - (long long)group * n);
        const int top = oy * stride_y - pad_y, left = ox * stride_x - pad_x;
        const real* from = x + (long long)image * h * w * c + group * inside + channel;
        real* to = columns + row * kh * kw * inside + channel;
        for (int ky = 0; ky < kh; ky++) {
            const int iy = top + ky * dilation_y;
            for (int kx = 0; kx < kw; kx++) {
                const int ix = left + kx * dilation_x;
                real v[4] = {};
                if (iy >= 0 && iy < h && ix >= 0 && ix < w)
                    read_four(from + ((long long)iy * w + ix) * c, count, v);
                write_four(to, count, v);
                to += inside;
            }
        }
    }
}

// launch: over=groups*n*h*w*((c//groups+3)//4)
KERNEL fold(const real* columns /*groups*n*oh*ow*kh*kw*(c//groups)*/, real* x /*n*h*w*c*/, int n, int h,
            int w, int c, int oh, int ow, int kh, int kw, int stride_y, int stride_x, int pad_y, int pad_x,
            int dilation_y, int dilation_x, int groups) {
    const int inside = c / groups, fours = (inside + 3) / 4;
    const int reach_y = (kh - 1) * dilation_y, reach_x = (kw - 1) * dilation_x;
    OVER(i, (long long)groups * n * h * w * fours) {
        const long long pixel = i / fours;  // of all groups' images
        const int channel = 4 * (int)(i - pixel * fours), count = up_to_four(inside - channel);
        const long long line = pixel / w, plane = line / h;
        const int px = (int)(pixel - line * w) + pad_x, py = (int)(line - plane * h) + pad_y;
        const int group = (int)(plane / n), image = (int)(plane - (long long)group * n);
        const int first_y = first_window(py, reach_y, stride_y), last_y = last_window(py, oh, stride_y);
        const int first_x = first_window(px, reach_x, stride_x), last_x = last_window(px, ow, stride_x);
        const real* from = columns + channel;
        wide sum[4] = {};
        for (int oy = first_y; oy <= last_y; oy++) {
            const int ky = tap_at(py - oy * stride_y, dilation_y);
            if (ky < 0) continue;
            for (int ox = first_x; ox <= last_x; ox++) {
                const int kx = tap_at(px - ox * stride_x, dilation_x);
                if (kx < 0) continue;
                wide v[4];
                load_four(from + (((plane * oh + oy) * ow + ox) * kh * kw + ky * kw + kx) * inside, count, v);
                UNROLL for (int j = 0; j < 4; j++) sum[j] += v[j];
            }
        }
        const long long at = (long long)image * h * w + (long long)(py - pad_y) * w + (px - pad_x);
        store_four(x + at * c + group * inside + channel, count, sum);
    }
}
