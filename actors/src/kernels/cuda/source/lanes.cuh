// Arithmetic that the kernels share: every operation rounded once, in an order that the CPU keeps too.
//
// A sum over a row is sixteen sums, of the values at positions i, i + 16, …, added as a tree (kernels/lanes.rs). Here
// sixteen threads of a warp take one of them each. Nothing here leaves it to the compiler whether to fuse.
#pragma once

#define LANES 16
/// Rows of a block of 256 threads.
#define ROWS 16

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }

/// `if a > b { a } else { b }`: b where either is NaN.
__device__ inline float larger(float a, float b) { return a > b ? a : b; }

/// `if a < b { a } else { b }`.
__device__ inline float smaller(float a, float b) { return a < b ? a : b; }

/// The sum of the sixteen lanes around this thread, as a tree: the upper eight to the lower eight, then four, two, one.
/// The partner adds the same two numbers, so that all sixteen threads get the sum. Every thread of the warp calls it.
__device__ inline float lane_sum(float value) {
#pragma unroll
    for (int width = LANES / 2; width >= 1; width /= 2) {
        value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, width));
    }
    return value;
}

/// The largest of the sixteen lanes, none of which is NaN. Every thread of the warp calls it.
__device__ inline float lane_largest(float value) {
#pragma unroll
    for (int width = LANES / 2; width >= 1; width /= 2) {
        value = larger(value, __shfl_xor_sync(0xffffffffu, value, width));
    }
    return value;
}

/// e to the power x, as `kernels/elementary.rs` computes it.
__device__ inline float exponential(float x) {
    const float min = -87.33654f, max = 88.72283f, rounder = 12582912.0f;
    const float within = smaller(larger(x, min), max);
    const float shifted = __fmaf_rn(within, 1.44269504f, rounder);
    const float n = __fsub_rn(shifted, rounder);
    float r = __fmaf_rn(n, -0.6933594f, within);
    r = __fmaf_rn(n, 2.1219444e-4f, r);
    float series = 1.9875691e-4f;
    series = __fmaf_rn(series, r, 1.3981999e-3f);
    series = __fmaf_rn(series, r, 8.333452e-3f);
    series = __fmaf_rn(series, r, 4.1665796e-2f);
    series = __fmaf_rn(series, r, 1.6666665e-1f);
    series = __fmaf_rn(series, r, 0.5f);
    const float fraction = __fadd_rn(__fmaf_rn(series, __fmul_rn(r, r), r), 1.0f);
    // The lowest bits of `shifted` hold n; this adds it to the exponent.
    float power = __uint_as_float(__float_as_uint(fraction) + (__float_as_uint(shifted) << 23));
    power = x < min ? 0.0f : power;
    power = max < x ? infinity() : power;
    return x != x ? x : power;
}

/// This thread's row, and whether there is one: threads without take part in the sums of their warp, with the last row.
__device__ inline bool find_row(long long rows, long long &row) {
    row = (long long)blockIdx.x * ROWS + threadIdx.x / LANES;
    const bool exists = row < rows;
    row = exists ? row : rows - 1;
    return exists;
}
