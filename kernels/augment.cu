// The next batch out of the resident data set: gathered, cropped, flipped, normalised; and its dense targets.
//
// Image i of this share has place p = (state.batch - state.epoch*batches)*batch + first + i of the epoch and
// is image order[p] of the set. A place from `places` on holds none: x is 0 and the targets say padding.
//
//   batch_crop_flip  x[i, oy, ox, ch] = (pixel - mean)*scale of the pixel at row oy + dy - pad and column
//                    u + dx - pad, where u = ow-1-ox if the image is flipped, else ox: crop first, then flip.
//                    dy and dx are drawn from 0 .. 2*pad; flip 1: every second image is flipped.
//                    Outside of the image: reflect 1 mirrors without repeating the edge; reflect 0 takes
//                    raw 0, so -mean*scale, with one mean a channel (channels = c), and 0 with a mean image
//                    (channels = h*w*c, taken at the source pixel).
//                    Draws: Philox block p of the stream (AUGMENT_SITE, time = epoch):
//                    dy = (word 0 >> 32)*(2*pad + 1) >> 32, dx from word 1 alike, flip = bit 63 of word 2;
//                    batch size and replicas change nothing.
//   batch_targets    targets[i, j] = (label == j)*(1 - smoothing) + smoothing/k; padding is a row of NaN
//   batch_values     targets[i] = values of the image; padding is a row of NaN
//
// Outputs: overwritten.
// Bytes:   n*oh*ow*c pixels in and as many reals out; n*k reals out.
// Launch:  batch_crop_flip a block an image, in it a warp a row; targets over, an element a thread.
#include "philox.cuh"
#include "state.cuh"

DEVICE long long place_of(const State* state, int batch, int batches, long long first) {
    return (state->batch - (long long)state->epoch * batches) * batch + first;
}

DEVICE int mirrored(int i, int size) {
    if (i < 0) i = -i;
    return i < size ? i : 2 * (size - 1) - i;
}

// launch: blocks=n
KERNEL batch_crop_flip(const pixel* images /*set*h*w*c*/, const int* order /*places*/,
                       const State* state /*1*/, const wide* mean /*channels*/,
                       const wide* scale /*channels*/, real* x /*n*oh*ow*c*/, unsigned long long seed,
                       int flip, int pad, int reflect, int batch, int batches, long long first, int places,
                       int set, int channels, int n, int h, int w, int c, int oh, int ow) {
    const long long place = place_of(state, batch, batches, first) + blockIdx.x;
    const bool there = place < places, one_mean = channels == c;
    const pixel* image = images + (there ? (long long)order[place] * h * w * c : 0);
    real* to = x + (long long)blockIdx.x * oh * ow * c;
    __shared__ int crop[3];  // its first row, the column of its first pixel, and the step to the next
    if (threadIdx.x == 0) {
        const Draw draw = philox(seed, AUGMENT_SITE, state->epoch, place);
        const bool flipped = flip && draw.at[2] >> 63;
        crop[0] = (int)((draw.at[0] >> 32) * (2 * pad + 1) >> 32) - pad;
        crop[1] = (int)((draw.at[1] >> 32) * (2 * pad + 1) >> 32) - pad + (flipped ? ow - 1 : 0);
        crop[2] = flipped ? -1 : 1;
    }
    __syncthreads();
    const int top = crop[0], left = crop[1], step = crop[2];
    for (int oy = threadIdx.x / WARP; oy < oh; oy += THREADS / WARP) {
        const int iy = reflect ? mirrored(top + oy, h) : top + oy;
        for (int e = threadIdx.x % WARP; e < ow * c; e += WARP) {
            const int ox = e / c, channel = e - ox * c, column = left + step * ox;
            const int ix = reflect ? mirrored(column, w) : column;
            wide v = 0;
            if (there && iy >= 0 && iy < h && ix >= 0 && ix < w) {
                const int at = (iy * w + ix) * c + channel, m = one_mean ? channel : at;
                v = ((wide)image[at] - mean[m]) * scale[m];
            } else if (there && one_mean) {
                v = -mean[channel] * scale[channel];
            }
            store(to + oy * ow * c + e, v);
        }
    }
}

// launch: over=n*k
KERNEL batch_targets(const int* labels /*set*/, const int* order /*places*/, const State* state /*1*/,
                     real* targets /*n*k*/, wide smoothing, int batch, int batches, long long first,
                     int places, int set, int n, int k) {
    const wide rest = smoothing / (wide)k;
    OVER(e, (long long)n * k) {
        const long long i = e / k, place = place_of(state, batch, batches, first) + i;
        wide t = not_a_number();
        if (place < places) t = (labels[order[place]] == (int)(e - i * k) ? 1 - smoothing : wide(0)) + rest;
        store(targets + e, t);
    }
}

// launch: over=n*k
KERNEL batch_values(const wide* values /*set*k*/, const int* order /*places*/, const State* state /*1*/,
                    real* targets /*n*k*/, int batch, int batches, long long first, int places, int set,
                    int n, int k) {
    OVER(e, (long long)n * k) {
        const long long i = e / k, place = place_of(state, batch, batches, first) + i;
        store(targets + e,
              place < places ? values[(long long)order[place] * k + (e - i * k)] : not_a_number());
    }
}
