// GELU and its gradient, each value by itself, in the order of kernels/elementary.rs.
#include "lanes.cuh"

typedef unsigned long long Word;

#define THREADS 256

/// Hyperbolic tangent.
__device__ inline float hyperbolic_tangent(float x) {
    const float size = __uint_as_float(__float_as_uint(x) & 0x7fffffffu);
    const float square = __fmul_rn(x, x);
    float series = -5.7049887e-3f;
    series = __fmaf_rn(series, square, 2.063909e-2f);
    series = __fmaf_rn(series, square, -5.3739715e-2f);
    series = __fmaf_rn(series, square, 1.3331442e-1f);
    series = __fmaf_rn(series, square, -3.333328e-1f);
    const float near = __fmaf_rn(__fmul_rn(series, square), x, x);
    const float power = __fadd_rn(exponential(__fadd_rn(size, size)), 1.0f);
    const float far = __fsub_rn(1.0f, __fdiv_rn(2.0f, power));
    const unsigned sign = __float_as_uint(x) & 0x80000000u;
    const float signed_far = __uint_as_float((__float_as_uint(far) & 0x7fffffffu) | sign);
    const float result = size < 0.625f ? near : signed_far;
    return x != x ? x : result;
}

#define GELU_SCALE 0.7978846f
#define GELU_CUBIC 0.044715f

/// The tangent within GELU, of x and its square.
__device__ inline float gelu_tangent(float x, float square) {
    const float inner = __fmul_rn(__fmaf_rn(square, GELU_CUBIC, 1.0f), x);
    return hyperbolic_tangent(__fmul_rn(inner, GELU_SCALE));
}

extern "C" __global__ void __launch_bounds__(THREADS) gelu_forward(const float *values, float *result, Word count) {
    const Word stride = (Word)gridDim.x * THREADS;
    for (Word index = (Word)blockIdx.x * THREADS + threadIdx.x; index < count; index += stride) {
        const float x = values[index];
        const float tangent = gelu_tangent(x, __fmul_rn(x, x));
        const float half = __fmul_rn(x, 0.5f);
        result[index] = __fmaf_rn(half, tangent, half);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_backward(const float *values, const float *gradient, float *result, Word count) {
    const Word stride = (Word)gridDim.x * THREADS;
    for (Word index = (Word)blockIdx.x * THREADS + threadIdx.x; index < count; index += stride) {
        const float x = values[index];
        const float square = __fmul_rn(x, x);
        const float tangent = gelu_tangent(x, square);
        const float inner_slope = __fmaf_rn(square, 3.0f * GELU_CUBIC * GELU_SCALE, GELU_SCALE);
        const float tangent_slope = __fsub_rn(1.0f, __fmul_rn(tangent, tangent));
        const float bend = __fmul_rn(__fmul_rn(x, 0.5f), tangent_slope);
        const float slope = __fmaf_rn(bend, inner_slope, __fmaf_rn(tangent, 0.5f, 0.5f));
        result[index] = __fmul_rn(gradient[index], slope);
    }
}
