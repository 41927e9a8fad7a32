// Layer normalisation of rows and its backward passes, in the order of kernels/layer_norm.rs.
//
// Sixteen threads a row; where sums go through all rows, a block takes 32 columns, whose values all of its threads fetch
// and one warp adds.
#include "lanes.cuh"

#define THREADS 256

/// What a row is normalised by: its mean, and 1 / sqrt(variance + epsilon).
struct Moments {
    float mean;
    float inverse;

    __device__ float normalise(float value) const { return __fmul_rn(__fsub_rn(value, mean), inverse); }
};

/// Every thread of the warp calls it.
__device__ inline Moments moments_of(const float *row, int columns, int lane, float epsilon) {
    const float count = (float)columns;
    float sum = 0.0f;
    for (int column = lane; column < columns; column += LANES) {
        sum = __fadd_rn(sum, row[column]);
    }
    Moments moments;
    moments.mean = __fdiv_rn(lane_sum(sum), count);
    float squares = 0.0f;
    for (int column = lane; column < columns; column += LANES) {
        const float centred = __fsub_rn(row[column], moments.mean);
        squares = __fmaf_rn(centred, centred, squares);
    }
    const float variance = __fdiv_rn(lane_sum(squares), count);
    moments.inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(variance, epsilon)));
    return moments;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm_forward(const float *values, const float *scale, const float *shift, float *result, long long rows,
                       int columns, float epsilon) {
    long long row;
    const bool exists = find_row(rows, row);
    const int lane = threadIdx.x % LANES;
    values += row * columns;
    const Moments moments = moments_of(values, columns, lane, epsilon);
    if (exists) {
        for (int column = lane; column < columns; column += LANES) {
            const float normalised = moments.normalise(values[column]);
            result[row * columns + column] = __fmaf_rn(normalised, scale[column], shift[column]);
        }
    }
}

/// (s - mean(s) - n mean(s n)) / sqrt(variance + epsilon), with s = gradient scale and n normalised.
extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm_backward(const float *values, const float *scale, const float *gradient, float *result, long long rows,
                        int columns, float epsilon) {
    long long row;
    const bool exists = find_row(rows, row);
    const int lane = threadIdx.x % LANES;
    values += row * columns;
    gradient += row * columns;
    const Moments moments = moments_of(values, columns, lane, epsilon);
    float sum = 0.0f, product_sum = 0.0f;
    for (int column = lane; column < columns; column += LANES) {
        const float scaled = __fmul_rn(gradient[column], scale[column]);
        sum = __fadd_rn(sum, scaled);
        product_sum = __fmaf_rn(scaled, moments.normalise(values[column]), product_sum);
    }
    const float count = (float)columns;
    const float sum_mean = __fdiv_rn(lane_sum(sum), count);
    const float product_mean = __fdiv_rn(lane_sum(product_sum), count);
    if (exists) {
        for (int column = lane; column < columns; column += LANES) {
            const float scaled = __fmul_rn(gradient[column], scale[column]);
            const float normalised = moments.normalise(values[column]);
            const float centred = __fsub_rn(scaled, sum_mean);
            const float slope = __fsub_rn(centred, __fmul_rn(normalised, product_mean));
            result[row * columns + column] = __fmul_rn(slope, moments.inverse);
        }
    }
}

/// Mean and inverse of each row, side by side.
extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm_moments(const float *values, float *moments, long long rows, int columns, float epsilon) {
    long long row;
    const bool exists = find_row(rows, row);
    const int lane = threadIdx.x % LANES;
    const Moments found = moments_of(values + row * columns, columns, lane, epsilon);
    if (exists && lane == 0) {
        moments[2 * row] = found.mean;
        moments[2 * row + 1] = found.inverse;
    }
}

/// Columns of a block, and rows of which it fetches the values at a time.
#define COLUMNS 32
#define DEPTH 64
#define EACH (DEPTH * COLUMNS / THREADS)

/// The gradients of scale and shift, as two rows: each one chain through the rows in ascending order.
extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm_parameters_backward(const float *values, const float *gradient, const float *moments, float *result,
                                   long long rows, int columns) {
    __shared__ float gradients[DEPTH][COLUMNS], normalised[DEPTH][COLUMNS];
    const int place = threadIdx.x % COLUMNS, part = threadIdx.x / COLUMNS;
    const int column = blockIdx.x * COLUMNS + place;
    const bool exists = column < columns;
    float for_scale = 0.0f, for_shift = 0.0f;
    float fetched_gradients[EACH], fetched_normalised[EACH];
    for (long long start = -DEPTH; start < rows; start += DEPTH) {
        // What is fetched here is put into shared memory at the end, while the rows before it are added.
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            const long long row = start + DEPTH + each * (THREADS / COLUMNS) + part;
            fetched_gradients[each] = 0.0f;
            fetched_normalised[each] = 0.0f;
            if (exists && row < rows) {
                const Moments found = {moments[2 * row], moments[2 * row + 1]};
                fetched_gradients[each] = gradient[row * columns + column];
                fetched_normalised[each] = found.normalise(values[row * columns + column]);
            }
        }
        if (start >= 0 && part == 0) {
            const int depth = rows - start < DEPTH ? (int)(rows - start) : DEPTH;
            for (int row = 0; row < depth; row++) {
                for_scale = __fmaf_rn(gradients[row][place], normalised[row][place], for_scale);
                for_shift = __fadd_rn(for_shift, gradients[row][place]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            gradients[each * (THREADS / COLUMNS) + part][place] = fetched_gradients[each];
            normalised[each * (THREADS / COLUMNS) + part][place] = fetched_normalised[each];
        }
        __syncthreads();
    }
    if (exists && part == 0) {
        result[column] = for_scale;
        result[columns + column] = for_shift;
    }
}
