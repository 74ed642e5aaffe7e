// Activations: y = f(x), element by element, and dx = dy * f'(x).
//
//   relu        y = max(x, 0)                   dx = dy if y > 0 else 0
//   leaky_relu  y = x if x > 0 else slope*x     dx = dy if y > 0 else slope*dy                (slope >= 0)
//   sigmoid     y = 1 / (1 + exp(-x))           dx = dy * y * (1 - y)
//   tanh        y = tanh(x)                     dx = dy * (1 - y*y)
//   gelu        y = x * P(x)                    dx = dy * (P(x) + x * p(x))     P, p: normal cdf, density
//   silu        y = x * s(x), s = sigmoid       dx = dy * s * (1 + x * (1 - s))
//   elu         y = x if x > 0 else alpha*(exp(x) - 1)    dx = dy if y > 0 else dy*(y + alpha)    (alpha >= 0)
//   softplus    y = log(1 + exp(x))             dx = dy * (1 - exp(-y))
//   hardswish   y = x * min(max(x + 3, 0), 6)/6     dx = dy * (0 below -3, 1 above 3, else (2*x + 3)/6)
//
// gelu, silu and hardswish need x in backward, the others y, so that y may lie over x. NaN stays NaN.
// Outputs: overwritten; may be an input.
// Bytes:   forward n reals in, n out; backward 2n in, n out.
// Launch:  over, four elements a thread.
#include "normal.cuh"

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

// launch: over=(n+3)//4
KERNEL elu_forward(const real* x /*n*/, real* y /*n*/, wide alpha, long long n) {
    each(x, y, n, [alpha](wide v) { return v > 0 ? v : alpha * expm1(v); });
}

// launch: over=(n+3)//4
KERNEL elu_backward(const real* dy /*n*/, const real* y /*n*/, real* dx /*n*/, wide alpha, long long n) {
    each(dy, y, dx, n, [alpha](wide d, wide v) { return v > 0 ? d : d * (v + alpha); });
}

// launch: over=(n+3)//4
KERNEL softplus_forward(const real* x /*n*/, real* y /*n*/, long long n) {
    each(x, y, n, [](wide v) {  // exp of what is at most 0: no overflow
        return v > 0 ? v + log1p(exp(-v)) : log1p(exp(v));
    });
}

// launch: over=(n+3)//4
KERNEL softplus_backward(const real* dy /*n*/, const real* y /*n*/, real* dx /*n*/, long long n) {
    each(dy, y, dx, n, [](wide d, wide v) { return d * -expm1(-v); });
}

// launch: over=(n+3)//4
KERNEL hardswish_forward(const real* x /*n*/, real* y /*n*/, long long n) {
    each(x, y, n, [](wide v) {  // the first case for -inf, which times 0 would be NaN
        return v <= -3 ? wide(0) : v >= 3 ? v : v * (v + 3) / 6;
    });
}

// launch: over=(n+3)//4
KERNEL hardswish_backward(const real* dy /*n*/, const real* x /*n*/, real* dx /*n*/, long long n) {
    each(dy, x, dx, n, [](wide d, wide v) {
        return v <= -3 ? wide(0) : v >= 3 ? d : d * (2 * v + 3) / 6;
    });
}
