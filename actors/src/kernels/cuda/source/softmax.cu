// Softmax of rows and its backward pass, in the order of kernels/softmax.rs. Sixteen threads a row.
//
// The exponentials are computed twice, once for their sum and once to be divided: this is cheaper than to write them and
// read them back.
#include "lanes.cuh"

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
    softmax_forward(const float *logits, float *probabilities, long long rows, int columns) {
    long long row;
    const bool exists = find_row(rows, row);
    const int lane = threadIdx.x % LANES;
    logits += row * columns;
    float largest = -infinity();
    for (int column = lane; column < columns; column += LANES) {
        largest = larger(logits[column], largest);
    }
    largest = lane_largest(largest);
    float sum = 0.0f;
    for (int column = lane; column < columns; column += LANES) {
        sum = __fadd_rn(sum, exponential(__fsub_rn(logits[column], largest)));
    }
    sum = lane_sum(sum);
    if (exists) {
        for (int column = lane; column < columns; column += LANES) {
            const float power = exponential(__fsub_rn(logits[column], largest));
            probabilities[row * columns + column] = __fdiv_rn(power, sum);
        }
    }
}

/// y (g - sum of g y), of the gradient g and the probabilities y.
extern "C" __global__ void __launch_bounds__(THREADS)
    softmax_backward(const float *gradient, const float *probabilities, float *result, long long rows, int columns) {
    long long row;
    const bool exists = find_row(rows, row);
    const int lane = threadIdx.x % LANES;
    gradient += row * columns;
    probabilities += row * columns;
    float sum = 0.0f;
    for (int column = lane; column < columns; column += LANES) {
        sum = __fmaf_rn(gradient[column], probabilities[column], sum);
    }
    sum = lane_sum(sum);
    if (exists) {
        for (int column = lane; column < columns; column += LANES) {
            const float centred = __fsub_rn(gradient[column], sum);
            result[row * columns + column] = __fmul_rn(probabilities[column], centred);
        }
    }
}
