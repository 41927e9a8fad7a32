// Cross-entropy of rows of logits, in the order of kernels/loss.rs: sixteen threads a row.
//
// The loss itself is a sum of logarithms in f64, which the CPU makes of three numbers a row.
#include "lanes.cuh"

#define THREADS 256

/// `gradient`: (p - 1 at the label, p elsewhere) times `scale`. `facts`: the largest logit, the sum of the exponentials,
/// and the label's logit. The labels are below `columns`.
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy(const float *logits, const unsigned *labels, float *gradient, float *facts, long long rows,
                  int columns, float scale) {
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
    if (!exists) {
        return;
    }
    const int label = (int)labels[row];
    for (int column = lane; column < columns; column += LANES) {
        const float power = exponential(__fsub_rn(logits[column], largest));
        const float probability = __fdiv_rn(power, sum);
        const float slope = column == label ? __fsub_rn(probability, 1.0f) : probability;
        gradient[row * columns + column] = __fmul_rn(slope, scale);
    }
    if (lane == 0) {
        facts[3 * row] = largest;
        facts[3 * row + 1] = sum;
        facts[3 * row + 2] = logits[label];
    }
}
