// What a dense layer does beside its product, in the order of kernels/affine.rs.

typedef unsigned long long Word;

#define THREADS 256

/// Adds the bias to each row, in place; then nothing less than `floor` stays, but NaN.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_bias(float *values, const float *bias, int count, int columns, float floor) {
    const unsigned stride = gridDim.x * THREADS;
    for (unsigned index = blockIdx.x * THREADS + threadIdx.x; index < (unsigned)count; index += stride) {
        const float sum = __fadd_rn(values[index], bias[index % columns]);
        values[index] = sum != sum ? sum : (sum > floor ? sum : floor);
    }
}

/// The gradient where the rectifier's result is above zero.
extern "C" __global__ void __launch_bounds__(THREADS)
    rectifier_backward(const float *gradient, const float *result, float *slope, Word count) {
    const Word stride = (Word)gridDim.x * THREADS;
    for (Word index = (Word)blockIdx.x * THREADS + threadIdx.x; index < count; index += stride) {
        slope[index] = 0.0f < result[index] ? gradient[index] : 0.0f;
    }
}

/// The sum of each column, through the rows in ascending order: a thread each. Neighbouring threads read neighbouring
/// values, and eight rows are under way while one is added.
extern "C" __global__ void __launch_bounds__(THREADS)
    column_sums(const float *values, float *sums, long long rows, int columns) {
    const int column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= columns) {
        return;
    }
    float sum = 0.0f;
#pragma unroll 8
    for (long long row = 0; row < rows; row++) {
        sum = __fadd_rn(sum, values[row * columns + column]);
    }
    sums[column] = sum;
}
