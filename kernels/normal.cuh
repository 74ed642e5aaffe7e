// The standard normal distribution.
#ifndef GPUNET_NORMAL
#define GPUNET_NORMAL

#include "common.cuh"

DEVICE wide normal_distribution(wide x) { return wide(0.5) * (1 + erf(x * wide(0.70710678118654752))); }
DEVICE wide normal_density(wide x) { return wide(0.39894228040143268) * exp(wide(-0.5) * x * x); }

#endif
