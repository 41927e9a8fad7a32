// Rows of a table by number, and the sum of their gradients, in the order of training/models/layers/embedding.rs.

#define THREADS 256

/// Row `rows[i]` of the table, for each i. The caller has checked that there are such rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_forward(const float *table, const unsigned *rows, float *result, int count, int width) {
    const unsigned stride = gridDim.x * THREADS;
    for (unsigned index = blockIdx.x * THREADS + threadIdx.x; index < (unsigned)count; index += stride) {
        result[index] = table[(size_t)rows[index / width] * width + index % width];
    }
}

/// The sum, for each row of the table, of the gradients of its uses in ascending order. The uses of row r are
/// `uses[starts[r]]` up to, without, `uses[starts[r + 1]]`. A thread adds one column of one row: no two write to one
/// place, and there is no atomic sum, whose order nobody knows.
extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_backward(const float *gradient, const unsigned *starts, const unsigned *uses, float *result, int count,
                       int width) {
    const unsigned stride = gridDim.x * THREADS;
    for (unsigned index = blockIdx.x * THREADS + threadIdx.x; index < (unsigned)count; index += stride) {
        const unsigned row = index / width, column = index % width;
        float sum = 0.0f;
        for (unsigned use = starts[row]; use < starts[row + 1]; use++) {
            sum = __fadd_rn(sum, gradient[(size_t)uses[use] * width + column]);
        }
        result[index] = sum;
    }
}
