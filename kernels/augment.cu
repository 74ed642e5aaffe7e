// The next batch out of the resident data set: gathered, cropped, flipped, normalised; and its dense targets.
//
// Image i of this share has place p = (state.batch - state.epoch*batches)*batch + first + i of the epoch and
// is image order[p] of the set. A place from `places` on holds none: x is 0 and the targets say padding.
//
//   batch_crop_flip  x[i, oy, ox, ch] = (pixel - mean)*scale of the pixel at row oy + dy - pad and column
//                    u + dx - pad, where u = ow-1-ox if the image is flipped, else ox: crop first, then flip.
//                    dy and dx are drawn from 0 .. 2*pad; flip 1: every second image is flipped; flip 2: each
//                    in every second epoch.
//                    Outside of the image: reflect 1 mirrors without repeating the edge; reflect 0 takes
//                    raw 0, so -mean*scale, with one mean a channel (channels = c), and 0 with a mean image
//                    (channels = h*w*c, taken at the source pixel).
//                    Draws: Philox block p of the stream (AUGMENT_SITE, time = epoch):
//                    dy = (word 0 >> 32)*(2*pad + 1) >> 32, dx from word 1 alike, flip = bit 63 of word 2;
//                    batch size and replicas change nothing.
//   batch_warp       warped = the pixels at the sources that `geometry` and `field` (transforms.cu) give, one
//                    interpolation for all: 2x2 bilinear, nearest, the mean of 4x4 nearest samples (area), or 4x4
//                    cubic (Keys 1981, a = -1/2; pixels of a byte stay in 0 .. 255). Sources are whole numbers.
//                    Outside: 0, or mirrored. With mix 1 the partners follow the n images.
//   batch_finish     x = (colour(warped) - mean)*scale, 0 in the cleared box; with mix 1 then
//                    inside*x + (1 - inside)*partner in the mixed box. With photometric 1, for pixels 0 .. 255,
//                    colour is brightness, contrast, and with three channels saturation, hue, lighting, each
//                    clamped to 0 .. 255. A mean image is taken at the output pixel.
//   batch_targets    targets[i, j] = (label == j)*(1 - smoothing) + smoothing/k; padding is a row of NaN
//   batch_targets_mixed  the same of two images, weighed by `share` of color and 1 - share
//   batch_values     targets[i] = values of the image; padding is a row of NaN
//
// Outputs: overwritten.
// Bytes:   n*oh*ow*c pixels in and as many reals out; n*k reals out. batch_warp: 4, 1, 16 or 16 pixels in (mostly
//          from the cache) and a wide out for each; batch_finish: those in, twice for contrast, and reals out.
// Launch:  batch_crop_flip a block an image, in it a warp a row; batch_warp and batch_finish a block an image;
//          targets over, an element a thread.
#include "reduce.cuh"
#include "transforms.cuh"

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
        bool flipped = flip && draw.at[2] >> 63;
        if (flip == 2 && there) flipped = alternates(seed, state->epoch, order[place]);
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

DEVICE int folded(int i, int size) {
    const int period = max(2 * (size - 1), 1);
    i = (i % period + period) % period;
    return i < size ? i : period - i;
}

// An image as it is warped.
struct Picture {
    const pixel* at;
    int h, w, c, channel, reflect;

    __device__ wide pixel_at(int y, int x) const {
        if (x < 0 || x >= w || y < 0 || y >= h) {
            if (!reflect) return 0;
            y = folded(y, h);
            x = folded(x, w);
        }
        return (wide)at[((long long)y * w + x) * c + channel];
    }
};

// A place in the source; 2^16 is a pixel, and pixels lie at multiples of it.
struct Spot {
    int x, y;
};

DEVICE long long clamped(long long v, long long far) { return min(max(v, -far), far); }

// The source of a place in the output, x and y from the middle in eighths of a pixel.
DEVICE Spot source_of(const long long* row, int x, int y, int h, int w) {
    const long long far = (long long)max(h, w) << 22;  // eight images away, so that nothing below overflows
    long long px = clamped(row[M00] * x + row[M01] * y + row[SHIFT_X], far);
    long long py = clamped(row[M10] * x + row[M11] * y + row[SHIFT_Y], far);
    if (row[LENS_K]) {
        const long long qx = px >> 10, qy = py >> 10, factor = row[LENS_K] * (qx * qx + qy * qy) >> 32;
        px += px * factor >> 16;
        py += py * factor >> 16;
    }
    return {(int)clamped((px >> 3) + ((w - 1) << 15), 1 << 30), (int)clamped((py >> 3) + ((h - 1) << 15), 1 << 30)};
}

DEVICE wide fraction(int place) { return (place & 0xffff) / wide(65536); }

DEVICE wide bilinear(const Picture& p, Spot s) {
    const int x = s.x >> 16, y = s.y >> 16;
    const wide fx = fraction(s.x), fy = fraction(s.y);
    const wide above = p.pixel_at(y, x) * (1 - fx) + p.pixel_at(y, x + 1) * fx;
    const wide under = p.pixel_at(y + 1, x) * (1 - fx) + p.pixel_at(y + 1, x + 1) * fx;
    return above * (1 - fy) + under * fy;
}

DEVICE wide nearest(const Picture& p, Spot s) { return p.pixel_at((s.y + 32768) >> 16, (s.x + 32768) >> 16); }

// Weight k of the four pixels around a place that is f behind the second.
DEVICE wide keys(int k, wide f) {
    if (k == 0) return ((wide(-0.5) * f + 1) * f - wide(0.5)) * f;
    if (k == 1) return (wide(1.5) * f - wide(2.5)) * f * f + 1;
    if (k == 2) return ((wide(-1.5) * f + 2) * f + wide(0.5)) * f;
    return (wide(0.5) * f - wide(0.5)) * f * f;
}

DEVICE wide cubic(const Picture& p, Spot s) {
    const int x = (s.x >> 16) - 1, y = (s.y >> 16) - 1;
    const wide fx = fraction(s.x), fy = fraction(s.y);
    wide sum = 0;
    UNROLL for (int i = 0; i < 4; i++) {
        wide line = 0;
        UNROLL for (int j = 0; j < 4; j++) line += p.pixel_at(y + i, x + j) * keys(j, fx);
        sum += line * keys(i, fy);
    }
    return sizeof(pixel) > 1 || is_nan(sum) ? sum : min(max(sum, wide(0)), wide(255));
}

// launch: blocks=n*(1+mix)
KERNEL batch_warp(const pixel* images /*set*h*w*c*/, const long long* geometry /*n*(1+mix)*18*/,
                  const int* field /*(n*(1+mix)*2*h*w-1)*elastic+1*/, wide* warped /*n*(1+mix)*h*w*c*/, int mix,
                  int elastic, int reflect, int set, int n, int h, int w, int c) {
    const long long* row = geometry + (long long)blockIdx.x * GEOMETRY;
    const int size = h * w * c, interpolation = (int)row[INTERPOLATION_OF];
    const bool there = row[IMAGE] >= 0, moved = elastic && row[IS_ELASTIC];
    Picture picture = {images + (there ? row[IMAGE] * size : 0), h, w, c, 0, reflect};
    const int* moves = field + (moved ? (long long)blockIdx.x * 2 * h * w : 0);
    for (int e = threadIdx.x; e < size; e += THREADS) {
        const int at = e / c, y = at / w, x = at - y * w, x8 = 4 * (2 * x + 1 - w), y8 = 4 * (2 * y + 1 - h);
        const int dx = moved ? moves[at] : 0, dy = moved ? moves[h * w + at] : 0;
        picture.channel = e - at * c;
        wide v = 0;
        if (there && interpolation == 2) {
            for (int k = 0; k < 16; k++) {
                Spot s = source_of(row, x8 + 2 * (k % 4) - 3, y8 + 2 * (k / 4) - 3, h, w);
                v += nearest(picture, {s.x + dx, s.y + dy});
            }
            v *= wide(0.0625);
        } else if (there) {
            Spot s = source_of(row, x8, y8, h, w);
            s = {s.x + dx, s.y + dy};
            v = interpolation == 0 ? bilinear(picture, s) : interpolation == 1 ? nearest(picture, s) : cubic(picture, s);
        }
        warped[(long long)blockIdx.x * size + e] = v;
    }
}

DEVICE wide in_range(wide v) { return is_nan(v) ? v : min(max(v, wide(0)), wide(255)); }

DEVICE wide grey_of(wide r, wide g, wide b) { return wide(0.299) * r + wide(0.587) * g + wide(0.114) * b; }

// Hue and colour of a pixel turned by `turns`: through HSV (Smith 1978), value and saturation kept.
DEVICE void turn_hue(wide* v, wide turns) {
    const wide high = max(v[0], max(v[1], v[2])), low = min(v[0], min(v[1], v[2])), span = high - low;
    if (!(span > 0)) return;
    wide hue = high == v[0] ? (v[1] - v[2]) / span : high == v[1] ? 2 + (v[2] - v[0]) / span : 4 + (v[0] - v[1]) / span;
    hue += 6 * turns;
    UNROLL for (int k = 0; k < 3; k++) {  // a channel is `high` near its own hue 0, 2, 4 and falls on both sides
        wide away = hue - 2 * k;
        away = fabs(away - 6 * floor(away / 6 + wide(0.5)));
        v[k] = high - span * min(max(away - 1, wide(0)), wide(1));
    }
}

// What a pixel of the image becomes whose mean grey is given; three channels, or one of another number.
DEVICE void colour(wide* v, int channels, const wide* color, wide mean_grey) {
    UNROLL for (int k = 0; k < 3; k++) {
        v[k] = in_range(v[k] * color[BRIGHTNESS_OF]);
        v[k] = in_range(v[k] * color[CONTRAST_OF] + mean_grey * (1 - color[CONTRAST_OF]));
    }
    if (channels != 3) return;
    const wide grey = grey_of(v[0], v[1], v[2]);
    UNROLL for (int k = 0; k < 3; k++)
        v[k] = in_range(v[k] * color[SATURATION_OF] + grey * (1 - color[SATURATION_OF]));
    if (color[HUE_OF] != 0) turn_hue(v, color[HUE_OF]);
    UNROLL for (int k = 0; k < 3; k++) v[k] = in_range(v[k] + color[LIGHT + k]);
}

// Where an image of `finish` comes from: its warped pixels, colours and the box that is cleared.
struct Layer {
    const wide* pixels;
    const wide* color;
    const long long* row;
    wide mean_grey;

    // The normalised value of v, a colour of this layer, at element e in row y and column x.
    __device__ wide normal(wide v, int y, int x, wide mean, wide scale) const {
        const bool cut = y >= row[CUT_TOP] && y < row[CUT_BOTTOM] && x >= row[CUT_LEFT] && x < row[CUT_RIGHT];
        return cut ? wide(0) : (v - mean) * scale;
    }

    __device__ void load_pixel(int e, int count, int channels, int photometric, wide* v) const {
        UNROLL for (int k = 0; k < 3; k++) v[k] = k < count ? pixels[e + k] : wide(0);
        if (photometric) colour(v, channels, color, mean_grey);
    }
};

// The sum over an image's elements of its brightened grey: the mean of all channels where they are not three.
DEVICE wide grey_sum(const wide* pixels, const wide* color, int size, int c) {
    wide sum = 0;
    for (int e = threadIdx.x; e < size; e += THREADS) {
        const wide v = in_range(pixels[e] * color[BRIGHTNESS_OF]);
        sum += v * (c != 3 ? 1 / (wide)c : e % 3 == 0 ? wide(0.299) : e % 3 == 1 ? wide(0.587) : wide(0.114));
    }
    return block_sum(sum);
}

// launch: blocks=n
KERNEL batch_finish(const wide* warped /*n*(1+mix)*h*w*c*/, const long long* geometry /*n*(1+mix)*18*/,
                    const wide* color /*n*(1+mix)*9*/, const wide* mean /*channels*/, const wide* scale /*channels*/,
                    real* x /*n*h*w*c*/, int photometric, int mix, int channels, int n, int h, int w, int c) {
    const int size = h * w * c, group = c == 3 ? 3 : 1;  // elements a thread: a pixel, or one of its channels
    const long long other = blockIdx.x + (mix ? (long long)n : 0);
    Layer own = {warped + (long long)blockIdx.x * size, color + (long long)blockIdx.x * COLOR,
                 geometry + (long long)blockIdx.x * GEOMETRY, 0};
    Layer partner = {warped + other * size, color + other * COLOR, geometry + other * GEOMETRY, 0};
    own.mean_grey = grey_sum(own.pixels, own.color, photometric ? size : 0, c) / (h * w);
    partner.mean_grey = grey_sum(partner.pixels, partner.color, photometric && mix ? size : 0, c) / (h * w);
    const long long* row = own.row;
    const bool there = row[IMAGE] >= 0;
    for (int e = threadIdx.x * group; e < size; e += THREADS * group) {
        const int at = e / c, py = at / w, px = at - py * w;
        const bool mixed = mix && py >= row[BOX_TOP] && py < row[BOX_BOTTOM] && px >= row[BOX_LEFT] &&
                           px < row[BOX_RIGHT];
        wide a[3], b[3] = {0, 0, 0};
        own.load_pixel(e, group, c, photometric, a);
        if (mixed) partner.load_pixel(e, group, c, photometric, b);
        const wide inside = own.color[INSIDE];
        UNROLL for (int k = 0; k < 3; k++) {
            if (k < group) {
                const int m = channels == c ? (e + k) % c : e + k;
                wide v = own.normal(a[k], py, px, mean[m], scale[m]);
                if (mixed) v = v * inside + partner.normal(b[k], py, px, mean[m], scale[m]) * (1 - inside);
                store(x + (long long)blockIdx.x * size + e + k, there ? v : wide(0));
            }
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
KERNEL batch_targets_mixed(const int* labels /*set*/, const long long* geometry /*n*2*18*/,
                           const wide* color /*n*2*9*/, real* targets /*n*k*/, wide smoothing, int set, int n, int k) {
    const wide rest = smoothing / (wide)k;
    OVER(e, (long long)n * k) {
        const long long i = e / k, own = geometry[i * GEOMETRY + IMAGE], other = geometry[(n + i) * GEOMETRY + IMAGE];
        const int j = (int)(e - i * k);
        const wide share = color[i * COLOR + SHARE];
        wide t = own >= 0 && labels[own] == j ? share : wide(0);
        if (other >= 0 && labels[other] == j) t += 1 - share;
        store(targets + e, own >= 0 ? t * (1 - smoothing) + rest : not_a_number());
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
