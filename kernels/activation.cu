// Activations: y = f(x), element by element, and dx = dy * f'(x).
//
//   relu        y = max(x, 0)                   dx = dy if y > 0 else 0
//   leaky_relu  y = x if x > 0 else slope*x     dx = dy if y > 0 else slope*dy                (slope >= 0)
//   sigmoid     y = 1 / (1 + exp(-x))           dx = dy * y * (1 - y)
//   tanh        y = tanh(x)                     dx = dy * (1 - y*y)
//   gelu        y = x * P(x)                    dx = dy * (P(x) + x * p(x))     P, p: normal cdf, density
//   silu        y = x * s(x), s = sigmoid       dx = dy * s * (1 + x * (1 - s))
//
// The first four need y in backward, not x, so that y may lie over x. NaN stays NaN.
// Outputs: overwritten; may be an input.
// Bytes:   forward n reals in, n out; backward 2n in, n out.
// Launch:  over, four elements a thread.
#include "common.cuh"

// launch: over=(n+3)//4
KERNEL relu_forward(const real* x /*n*/, real* y /*n*/, long long n) {
    each(x, y, n, [](wide v) { return v < 0 ? wide(0) : v; });
}

// launch: over=(n+3)//4
KERNEL relu_backward(const real* dy /*n*/, const real* y /*n*/, real* dx /*n*/, long long n) {
    each(dy, y, dx, n, [](wide d, wide v) { return v > 0 ? d : wide(0); });
}

// launch: over=(n+3)//4
KERNEL leaky_relu_forward(const real* x /*n*/, real* y /*n*/, wide slope, long long n) {
    each(x, y, n, [slope](wide v) { return v > 0 ? v : slope * v; });
}

// launch: over=(n+3)//4
KERNEL leaky_relu_backward(const real* dy /*n*/, const real* y /*n*/, real* dx /*n*/, wide slope,
                           long long n) {
    each(dy, y, dx, n, [slope](wide d, wide v) { return v > 0 ? d : slope * d; });
}

DEVICE wide sigmoid(wide x) { return 1 / (1 + exp(-x)); }

// launch: over=(n+3)//4
KERNEL sigmoid_forward(const real* x /*n*/, real* y /*n*/, long long n) {
    each(x, y, n, [](wide v) { return sigmoid(v); });
}

// launch: over=(n+3)//4
KERNEL sigmoid_backward(const real* dy /*n*/, const real* y /*n*/, real* dx /*n*/, long long n) {
    each(dy, y, dx, n, [](wide d, wide v) { return d * v * (1 - v); });
}

// launch: over=(n+3)//4
KERNEL tanh_forward(const real* x /*n*/, real* y /*n*/, long long n) {
    each(x, y, n, [](wide v) { return tanh(v); });
}

// launch: over=(n+3)//4
KERNEL tanh_backward(const real* dy /*n*/, const real* y /*n*/, real* dx /*n*/, long long n) {
    each(dy, y, dx, n, [](wide d, wide v) { return d * (1 - v * v); });
}

DEVICE wide normal_distribution(wide x) { return wide(0.5) * (1 + erf(x * wide(0.70710678118654752))); }
DEVICE wide normal_density(wide x) { return wide(0.39894228040143268) * exp(wide(-0.5) * x * x); }

// launch: over=(n+3)//4
KERNEL gelu_forward(const real* x /*n*/, real* y /*n*/, long long n) {
    each(x, y, n, [](wide v) { return v * normal_distribution(v); });
}

// launch: over=(n+3)//4
KERNEL gelu_backward(const real* dy /*n*/, const real* x /*n*/, real* dx /*n*/, long long n) {
    each(dy, x, dx, n, [](wide d, wide v) { return d * (normal_distribution(v) + v * normal_density(v)); });
}

// launch: over=(n+3)//4
KERNEL silu_forward(const real* x /*n*/, real* y /*n*/, long long n) {
    each(x, y, n, [](wide v) { return v * sigmoid(v); });
}

// launch: over=(n+3)//4
KERNEL silu_backward(const real* dy /*n*/, const real* x /*n*/, real* dx /*n*/, long long n) {
    each(dy, x, dx, n, [](wide d, wide v) {
        const wide s = sigmoid(v);
        return d * s * (1 + v * (1 - s));
    });
}
