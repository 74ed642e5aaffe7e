// Along one axis: which windows of a convolution or pooling hold a position, how much of a window is inside. And
// how threads share the pixels of an image.
//
// Window o holds padded positions o*stride .. o*stride + reach, reach = (taps - 1)*dilation; padded position
// p is input position p - pad.
#ifndef GPUNET_WINDOW
#define GPUNET_WINDOW

#include "common.cuh"

// The first and last window that reach padded position p >= 0; first > last: none.
DEVICE int first_window(int p, int reach, int stride) {
    const int begin = p - reach;
    return begin > 0 ? (begin + stride - 1) / stride : 0;
}

DEVICE int last_window(int p, int windows, int stride) { return min(p / stride, windows - 1); }

// The tap at distance t >= 0 from a window's start, or -1 if t falls between two taps.
DEVICE int tap_at(int t, int dilation) {
    if (dilation == 1) return t;
    const int tap = t / dilation;
    return tap * dilation == t ? tap : -1;
}

// How many of the positions start .. start + taps - 1 lie in -pad .. size + pad - 1.
DEVICE int clipped(int start, int taps, int size, int pad) {
    return min(start + taps, size + pad) - max(start, -pad);
}

// Four channels of a pixel, by the number of a thread's work.
struct Place {
    int image, y, x, channel, count;
    long long at;  // element of the tensor

    __device__ Place(long long i, int h, int w, int c) {
        const int fours = (c + 3) / 4;
        const long long pixel = i / fours, line = pixel / w;
        channel = 4 * (int)(i - pixel * fours);
        count = up_to_four(c - channel);
        x = (int)(pixel - line * w);
        image = (int)(line / h);
        y = (int)(line - (long long)image * h);
        at = pixel * c + channel;
    }
};

#endif
