// What happens to each image of a batch, drawn: its inverse map, its colours, its boxes, its elastic field.
//
// Row i of n is the image at place p = (state.batch - state.epoch*batches)*batch + first + i of the epoch. With mix 1
// row n + i is the image that i is mixed with, at another place of the epoch, with that place's own draws.
// A draw is Philox block p of the stream (AUGMENT_SITE + transform, time = epoch): batch size and replicas change
// nothing. A uniform is the upper 24 bits of a word; what is random only by a comparison compares whole numbers.
// `settings` holds ranges and probabilities (times 2^24) by `Setting`, then the quantiles 0, 1/1024 .. 1 of the two
// Beta distributions.
//
//   transforms_draw  geometry = the source of output pixel o, both from the middle of the image, is
//                        L(S R D (flip(o) + shift)), L(p) = p(1 + k r^2), S = (1 tan; 0 1), R a turn,
//                        D = diag(1/(zoom sqrt(stretch)), sqrt(stretch)/zoom), r = 1 in a corner
//                    in whole numbers, so that a pixel is the same on every backend. Doubles here round alike
//                    everywhere (no fused operation, sine by its series), but for the logarithm in `lighting`.
//                    field = alpha * noise smoothed by a Gaussian, in 2^-16 pixels: noise is 2*lane - 65535 with the
//                    place's 16-bit lanes, 0 outside; along rows (kept in `rows`, / 256), then along columns.
//
// Outputs: overwritten; a row without an image is 0, its number -1.
// Bytes:   a field of h*w*2 ints an image, written and read 2 (2 radius + 1) times, from the cache.
// Launch:  a block an image: its first thread draws where, its second warp's what colours, all the field.
#include "transforms.cuh"

#define UNIT (1 << 24)
#define QUANTILES 1024

enum Stream { CROP_DRAW, ALTERNATE_DRAW, WARP_DRAW, RESCALE_DRAW, ROTATE_DRAW, SHEAR_DRAW, STRETCH_DRAW, ZOOM_DRAW,
              LENS_DRAW, INTERPOLATION_DRAW, ELASTIC_DRAW, COLOR_DRAW, BRIGHTNESS_DRAW, CONTRAST_DRAW,
              SATURATION_DRAW, HUE_DRAW, LIGHTING_DRAW, CUTOUT_DRAW, MIX_DRAW, CUTMIX_DRAW };

enum Setting { FLIP, FLIP_VERTICAL, ALTERNATE, CROP, WARP_PROBABILITY, INTERPOLATION, ELASTIC, COLOR_PROBABILITY,
               CUTOUT, CUTOUT_PROBABILITY, MIXUP, CUTMIX, MIX_PROBABILITY, RESCALE, ROTATE = RESCALE + 2,
               SHEAR = ROTATE + 2, STRETCH = SHEAR + 2, ZOOM = STRETCH + 2, LENS = ZOOM + 2, BRIGHTNESS = LENS + 2,
               CONTRAST = BRIGHTNESS + 2, SATURATION = CONTRAST + 2, HUE = SATURATION + 2, LIGHTING = HUE + 2,
               TABLES = LIGHTING + 9 };

// A product that is never fused with a sum behind it: the same bits on every machine.
DEVICE double times(double a, double b) {
#ifdef __CUDACC__
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

// sin(2 pi t) by its series up to a quarter turn, t in -1 .. 1.
DEVICE double sine(double t) {
    t -= floor(t + 0.5);
    if (t > 0.25) t = 0.5 - t;
    if (t < -0.25) t = -0.5 - t;
    const double x = times(t, 6.283185307179586), square = times(x, x);
    double sum = 0;
    UNROLL for (int k = 21; k > 1; k -= 2) sum = times(1 - sum, square) / (k * (k - 1));
    return times(x, 1 - sum);
}

DEVICE double cosine(double t) { return sine(t + 0.25); }

// One place of an epoch, which draws.
struct Place {
    word seed, epoch, place;
    const double* settings;

    __device__ Draw draw(int stream) const { return philox(seed, AUGMENT_SITE + stream, epoch, place); }

    __device__ int whole(int setting) const { return (int)settings[setting]; }

    __device__ double uniform(word bits, int setting) const {
        const double low = settings[setting], high = settings[setting + 1];
        return low + times(high - low, times((double)(bits >> 40), 1.0 / UNIT));
    }

    // Uniform on a range; nothing is drawn where it is one value.
    __device__ double within(int stream, int setting) const {
        const double low = settings[setting];
        return low == settings[setting + 1] ? low : uniform(draw(stream).at[0], setting);
    }

    __device__ bool chosen(word bits, int setting) const { return (int)(bits >> 40) < whole(setting); }
};

// Uniform on 0 .. count-1.
DEVICE int below(word bits, int count) { return (int)((bits >> 32) * count >> 32); }

DEVICE int clipped(int i, int size) { return min(max(i, 0), size); }

// An inverse map: from places around the middle of the output to places around the middle of the source.
struct Map {
    double xx, xy, yx, yy;
};

DEVICE Map inverse_map(const Place& p, double rescale) {
    const double zoom = times(rescale, p.within(ZOOM_DRAW, ZOOM));
    const double root = sqrt(p.within(STRETCH_DRAW, STRETCH));
    const double turn = p.within(ROTATE_DRAW, ROTATE) / 360, lean = p.within(SHEAR_DRAW, SHEAR) / 360;
    const double narrow = 1 / times(zoom, root), flat = root / zoom, tangent = sine(lean) / cosine(lean);
    Map map = {times(cosine(turn), narrow), -times(sine(turn), flat), times(sine(turn), narrow),
               times(cosine(turn), flat)};
    map.xx += times(tangent, map.yx);
    map.xy += times(tangent, map.yy);
    return map;
}

DEVICE void draw_geometry(const Place& p, int image, long long* row, int h, int w) {
    const Draw crop = p.draw(CROP_DRAW);
    const int pad = p.whole(CROP);
    long long x = (below(crop.at[1], 2 * pad + 1) - pad) * 65536ll;
    long long y = (below(crop.at[0], 2 * pad + 1) - pad) * 65536ll;
    Map map = {1, 0, 0, 1};
    const bool warped = p.chosen(p.draw(WARP_DRAW).at[0], WARP_PROBABILITY);
    row[LENS_K] = 0;
    if (warped) {
        double rescale = p.settings[RESCALE];
        if (rescale != p.settings[RESCALE + 1] || rescale != 1) {
            const Draw draw = p.draw(RESCALE_DRAW);
            rescale = p.uniform(draw.at[0], RESCALE);
            const double room = times(fabs(rescale - 1), 65536.0 / (1 << 24));
            x += (long long)rint(times(room, times((double)(draw.at[2] >> 40) - UNIT / 2, w)));
            y += (long long)rint(times(room, times((double)(draw.at[1] >> 40) - UNIT / 2, h)));
        }
        map = inverse_map(p, rescale);
        const double corner = times(w, w) + times(h, h);
        row[LENS_K] = (long long)rint(times(p.within(LENS_DRAW, LENS), 4294967296.0 / corner));
    }
    const long long xx = (long long)rint(times(map.xx, 65536)), xy = (long long)rint(times(map.xy, 65536));
    const long long yx = (long long)rint(times(map.yx, 65536)), yy = (long long)rint(times(map.yy, 65536));
    bool flipped = (int)(crop.at[2] >> 40) >= UNIT - p.whole(FLIP);
    if (p.whole(ALTERNATE)) flipped = alternates(p.seed, (int)p.epoch, image);
    const bool upside_down = p.chosen(crop.at[3], FLIP_VERTICAL);
    row[IMAGE] = image;
    row[M00] = flipped ? -xx : xx;
    row[M01] = upside_down ? -xy : xy;
    row[M10] = flipped ? -yx : yx;
    row[M11] = upside_down ? -yy : yy;
    row[SHIFT_X] = (xx * x + xy * y) >> 13;
    row[SHIFT_Y] = (yx * x + yy * y) >> 13;
    const int interpolation = p.whole(INTERPOLATION);
    row[INTERPOLATION_OF] = interpolation < 4 ? interpolation : (int)(p.draw(INTERPOLATION_DRAW).at[0] >> 62);
    row[IS_ELASTIC] = warped && p.settings[ELASTIC] > 0;
    const Draw cut = p.draw(CUTOUT_DRAW);
    const int side = p.chosen(cut.at[2], CUTOUT_PROBABILITY) ? p.whole(CUTOUT) : 0;
    const int top = below(cut.at[0], h) - side / 2, left = below(cut.at[1], w) - side / 2;
    row[CUT_TOP] = clipped(top, h);
    row[CUT_BOTTOM] = clipped(top + side, h);
    row[CUT_LEFT] = clipped(left, w);
    row[CUT_RIGHT] = clipped(left + side, w);
}

DEVICE void draw_color(const Place& p, wide* row) {
    const bool colored = p.chosen(p.draw(COLOR_DRAW).at[0], COLOR_PROBABILITY);
    row[BRIGHTNESS_OF] = colored ? (wide)p.within(BRIGHTNESS_DRAW, BRIGHTNESS) : wide(1);
    row[CONTRAST_OF] = colored ? (wide)p.within(CONTRAST_DRAW, CONTRAST) : wide(1);
    row[SATURATION_OF] = colored ? (wide)p.within(SATURATION_DRAW, SATURATION) : wide(1);
    row[HUE_OF] = colored ? (wide)p.within(HUE_DRAW, HUE) : wide(0);
    const Draw draw = p.draw(LIGHTING_DRAW);  // normal by Box and Muller, two of a pair
    double uniform[4];
    UNROLL for (int i = 0; i < 4; i++) uniform[i] = times((double)(draw.at[i] >> 40), 1.0 / UNIT);
    const double r = sqrt(-2 * log(1 - uniform[0])), s = sqrt(-2 * log(1 - uniform[2]));
    const double a = times(r, cosine(uniform[1])), b = times(r, sine(uniform[1])), d = times(s, cosine(uniform[3]));
    const double* axes = p.settings + LIGHTING;
    UNROLL for (int c = 0; c < 3; c++) {
        const double light = times(axes[3 * c], a) + times(axes[3 * c + 1], b) + times(axes[3 * c + 2], d);
        row[LIGHT + c] = colored ? (wide)light : wide(0);
    }
    row[SHARE] = row[INSIDE] = 1;
}

// Whether the image at this place is mixed.
DEVICE bool is_mixed(const Place& p) { return p.chosen(p.draw(MIX_DRAW).at[0], MIX_PROBABILITY); }

// The box that is mixed, and how much of it is the image's own.
DEVICE void draw_mix(const Place& p, long long* row, wide* color, int h, int w) {
    int box[4] = {0, 0, 0, 0};
    color[SHARE] = color[INSIDE] = 1;
    if (is_mixed(p)) {
        const Draw draw = p.draw(MIX_DRAW);
        const bool pastes = p.whole(CUTMIX) && !(p.whole(MIXUP) && draw.at[3] >> 63 == 0);
        const int bits = (int)(draw.at[2] >> 40), cell = bits / (UNIT / QUANTILES);
        const double* at = p.settings + TABLES + (pastes ? QUANTILES + 1 : 0) + cell;
        double share = at[0] + times(at[1] - at[0], (bits % (UNIT / QUANTILES)) / (double)(UNIT / QUANTILES));
        color[INSIDE] = (wide)share;
        box[1] = h;
        box[3] = w;
        if (pastes) {
            const Draw corner = p.draw(CUTMIX_DRAW);
            const double side = sqrt(1 - share);
            const int rows = (int)times(h, side), columns = (int)times(w, side);
            const int top = below(corner.at[0], h) - rows / 2, left = below(corner.at[1], w) - columns / 2;
            box[0] = clipped(top, h);
            box[1] = clipped(top + rows, h);
            box[2] = clipped(left, w);
            box[3] = clipped(left + columns, w);
            color[INSIDE] = 0;
            share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / times(h, w);
        }
        color[SHARE] = (wide)share;
    }
    UNROLL for (int i = 0; i < 4; i++) row[BOX_TOP + i] = box[i];
}

// A row of weights `radius` to both sides of i, over what of size `size` there is, `step` elements apart.
DEVICE long long smoothed(const int* values, const int* weights, int i, int size, int step, int radius) {
    long long sum = 0;
    const int stop = min(i + radius, size - 1);
    for (int j = max(i - radius, 0); j <= stop; j++)
        sum += (long long)weights[j < i ? i - j : j - i] * values[j * step];
    return sum;
}

// launch: blocks=n*(1+mix)
KERNEL transforms_draw(const int* order /*places*/, const State* state /*1*/, const double* settings /*2092*/,
                       const int* weights /*radius+1*/, long long* geometry /*n*(1+mix)*18*/,
                       wide* color /*n*(1+mix)*9*/, int* rows /*(n*(1+mix)*2*h*w-1)*elastic+1*/,
                       int* field /*(n*(1+mix)*2*h*w-1)*elastic+1*/, unsigned long long seed, int mix,
                       int elastic, int radius, int batch, int batches, long long first, int places, int n, int h,
                       int w) {
    const int slot = blockIdx.x, i = slot < n ? slot : slot - n;
    const long long start = place_of(state, batch, batches, first) + i;
    Place p = {seed, (word)state->epoch, (word)start, settings};
    bool there = start < places;
    if (there && slot >= n) {
        const word partner = p.draw(MIX_DRAW).at[1];
        there = is_mixed(p);
        p.place = below(partner, places);
    }
    long long* row = geometry + (long long)slot * GEOMETRY;
    wide* colors = color + (long long)slot * COLOR;
    if (threadIdx.x == 0) {
        for (int k = 0; k < GEOMETRY; k++) row[k] = k == IMAGE ? -1 : 0;
        if (there) draw_geometry(p, order[p.place], row, h, w);
    }
    if (threadIdx.x == WARP) {
        for (int k = 0; k < COLOR; k++) colors[k] = 0;
        if (there) draw_color(p, colors);
    }
    __syncthreads();
    if (threadIdx.x == 0 && there && mix && slot < n) draw_mix(p, row, colors, h, w);
    if (threadIdx.x == 0 && slot == 0 && !elastic) rows[0] = field[0] = 0;
    const int size = elastic ? 2 * h * w : 0, lanes = (size + 15) / 16;
    rows += (long long)slot * size;
    field += (long long)slot * size;
    for (int e = threadIdx.x; e < lanes; e += THREADS) {
        const Draw draw = philox(seed, AUGMENT_SITE + ELASTIC_DRAW, state->epoch, p.place * lanes + e);
        UNROLL for (int k = 0; k < 16; k++)
            if (16 * e + k < size)
                field[16 * e + k] = there ? 2 * (int)(draw.at[k / 4] >> 16 * (k % 4) & 0xffff) - 65535 : 0;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < size; e += THREADS)
        rows[e] = (int)(smoothed(field + e / w * w, weights, e % w, w, 1, radius) >> 8);
    __syncthreads();
    for (int e = threadIdx.x; e < size; e += THREADS) {
        const int y = e / w % h;
        const long long sum = smoothed(rows + (e - y * w), weights, y, h, w, radius);
        field[e] = (int)rint(times((double)sum, settings[ELASTIC]));
    }
}
