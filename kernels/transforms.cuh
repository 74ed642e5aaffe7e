// What is drawn for an image of a batch: a row of whole numbers and a row of colours. Python: gpunet.core.augmentation.
#ifndef GPUNET_TRANSFORMS
#define GPUNET_TRANSFORMS

#include "philox.cuh"
#include "state.cuh"

// A row of `geometry`. A pixel is 2^16; M00 .. M11 are the inverse map, CUT_* a box that is cleared, BOX_* one
// that is mixed with the partner; a box holds rows TOP .. BOTTOM-1.
enum Geometry {
    IMAGE,           // its number in the set, or -1: there is none
    M00,             // from the output to the source: x of x, x of y, y of x, y of y, 2^16 is 1
    M01,
    M10,
    M11,
    SHIFT_X,         // 2^19 is a pixel
    SHIFT_Y,
    LENS_K,          // k r^2 = LENS_K * squared radius >> 32: 2^16 is 1, and 2^18 a squared pixel
    INTERPOLATION_OF,  // 0 bilinear, 1 nearest, 2 area, 3 cubic
    IS_ELASTIC,
    CUT_TOP,
    CUT_BOTTOM,
    CUT_LEFT,
    CUT_RIGHT,
    BOX_TOP,
    BOX_BOTTOM,
    BOX_LEFT,
    BOX_RIGHT,
    GEOMETRY,        // how many they are
};

// A row of `color`: factors, turns of hue, what is added to each channel, and of a mixed image the share of its
// own in the target and inside the box.
enum Color {
    BRIGHTNESS_OF,
    CONTRAST_OF,
    SATURATION_OF,
    HUE_OF,
    LIGHT,
    SHARE = LIGHT + 3,
    INSIDE,
    COLOR,
};

DEVICE long long place_of(const State* state, int batch, int batches, long long first) {
    return (state->batch - (long long)state->epoch * batches) * batch + first;
}

// Whether an image is mirrored in this epoch: drawn once for each image, then by turns.
DEVICE bool alternates(word seed, int epoch, int image) {
    return (philox(seed, AUGMENT_SITE + 1, 0, image).at[0] >> 63) ^ (epoch & 1);
}

#endif
