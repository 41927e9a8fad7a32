// Causal attention and its gradient, in the order of training/models/layers/attention.rs.
//
// A window has `context` tokens; a row of `projected` holds the queries of all heads, then their keys, then their values.
// What a token has to say of those up to it lies in a row of `context` values for each token and head; of those after it
// nothing is written or read there.

#include "lanes.cuh"

#define THREADS 256

/// Lanes of a sum of products.
#define DOT_LANES 8

/// Eight sums, as a tree.
__device__ inline float dot_tree(const float (&lanes)[DOT_LANES]) {
    const float even = __fadd_rn(__fadd_rn(lanes[0], lanes[4]), __fadd_rn(lanes[2], lanes[6]));
    const float odd = __fadd_rn(__fadd_rn(lanes[1], lanes[5]), __fadd_rn(lanes[3], lanes[7]));
    return __fadd_rn(even, odd);
}

/// Sum of products: eight lanes, the tree over them, then the rest in order. Nothing is fused.
__device__ inline float dot(const float *a, const float *b, int size) {
    float lanes[DOT_LANES];
#pragma unroll
    for (int lane = 0; lane < DOT_LANES; lane++) {
        lanes[lane] = 0.0f;
    }
    int index = 0;
    for (; index + DOT_LANES <= size; index += DOT_LANES) {
#pragma unroll
        for (int lane = 0; lane < DOT_LANES; lane++) {
            lanes[lane] = __fadd_rn(lanes[lane], __fmul_rn(a[index + lane], b[index + lane]));
        }
    }
    float sum = dot_tree(lanes);
    for (; index < size; index++) {
        sum = __fadd_rn(sum, __fmul_rn(a[index], b[index]));
    }
    return sum;
}

/// e to the power x in f64, for x up to zero, as kernels/math.rs computes it.
__device__ inline double wide_exponential(double x) {
    if (x != x) {
        return x;
    }
    if (x < -708.0) {
        return 0.0;
    }
    const double scaled = __dmul_rn(x, 1.44269504088896340735992468100189214);
    // Half away from zero: below zero, that is downwards.
    long long whole = (long long)scaled;
    whole = __dsub_rn(scaled, (double)whole) <= -0.5 ? whole - 1 : whole;
    const double k = (double)whole;
    const double high = __longlong_as_double(0x3fe62e42fee00000LL), low = __longlong_as_double(0x3dea39ef35793c76LL);
    const double r = __dsub_rn(__dsub_rn(x, __dmul_rn(k, high)), __dmul_rn(k, low));
    double sum = 1.0;
    for (int n = 13; n >= 1; n--) {
        sum = __dadd_rn(1.0, __ddiv_rn(__dmul_rn(sum, r), (double)n));
    }
    return __dmul_rn(sum, __longlong_as_double((whole + 1023) << 52));
}

/// For each query and each token up to its own: `dot` of two parts of their rows, times `scale`. `queries` and `others`
/// point to the first head's part in the first row, rows are `query_stride` and `other_stride` apart.
__device__ inline void pairs(const float *queries, int query_stride, const float *others, int other_stride,
                             float *result, long long count, int context, int heads, int size, float scale) {
    const long long step = (long long)gridDim.x * THREADS;
    for (long long index = (long long)blockIdx.x * THREADS + threadIdx.x; index < count; index += step) {
        const int other = (int)(index % context);
        const int head = (int)(index / context % heads);
        const long long row = index / context / heads;
        const int token = (int)(row % context);
        if (other <= token) {
            const float *query = queries + row * query_stride + head * size;
            const float *partner = others + (row - token + other) * other_stride + head * size;
            result[index] = __fmul_rn(dot(query, partner, size), scale);
        }
    }
}

/// The score of each query and key.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_scores(const float *projected, float *scores, long long count, int context, int heads, int size,
                     float scale) {
    const int width = heads * size;
    pairs(projected, 3 * width, projected + width, 3 * width, scores, count, context, heads, size, scale);
}

/// Of the gradient of the result, that of each query's share of each value.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_slopes(const float *projected, const float *gradient, float *slopes, long long count, int context,
                     int heads, int size) {
    const int width = heads * size;
    // A multiplication by one changes no bit.
    pairs(gradient, width, projected + 2 * width, 3 * width, slopes, count, context, heads, size, 1.0f);
}

/// As `find_row`, of rows of `context` values, and how many of them there are. Threads without a row go along with the
/// last one, whatever they read there, and write nothing.
__device__ inline bool find_query(long long rows, int context, int heads, long long &row, int &known) {
    const bool exists = find_row(rows, row);
    known = (int)(row / heads % context) + 1;
    return exists;
}

/// Scores become shares, in place: their softmax, in f64 from the largest score down, added in ascending order. Sixteen
/// threads a row compute the powers; each adds all of them.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_shares(float *scores, long long rows, int context, int heads) {
    long long row;
    int known;
    const bool exists = find_query(rows, context, heads, row, known);
    const int lane = threadIdx.x % LANES;
    scores += row * context;
    float largest = -infinity();
    for (int other = lane; other < known; other += LANES) {
        largest = larger(scores[other], largest);
    }
    largest = lane_largest(largest);
    double total = 0.0;
    for (int start = 0; start < context; start += LANES) {
        const int other = start + lane;
        double power = 0.0;
        if (other < known) {
            power = wide_exponential((double)__fsub_rn(scores[other], largest));
        }
        for (int turn = 0; turn < LANES; turn++) {
            const double next = __shfl_sync(0xffffffffu, power, turn, LANES);
            total = start + turn < known ? __dadd_rn(total, next) : total;
        }
        if (exists && other < known) {
            scores[other] = __double2float_rn(power);
        }
    }
    const float inverse = __double2float_rn(__ddiv_rn(1.0, total));
    for (int other = lane; other < known; other += LANES) {
        if (exists) {
            scores[other] = __fmul_rn(scores[other], inverse);
        }
    }
}

/// Slopes of shares become slopes of scores, in place: share (slope - mean) scale, where the mean is the sum of shares
/// times slopes, in the order of `dot`: of sixteen threads a row, eight have a lane each, and the others do the same.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_scores_backward(const float *shares, float *slopes, long long rows, int context, int heads,
                              float scale) {
    long long row;
    int known;
    const bool exists = find_query(rows, context, heads, row, known);
    const int lane = threadIdx.x % LANES;
    shares += row * context;
    slopes += row * context;
    const int whole = known / DOT_LANES * DOT_LANES;
    float mean = 0.0f;
    for (int other = lane % DOT_LANES; other < whole; other += DOT_LANES) {
        mean = __fadd_rn(mean, __fmul_rn(shares[other], slopes[other]));
    }
#pragma unroll
    for (int width = DOT_LANES / 2; width >= 1; width /= 2) {
        mean = __fadd_rn(mean, __shfl_xor_sync(0xffffffffu, mean, width));
    }
    for (int other = whole; other < known; other++) {
        mean = __fadd_rn(mean, __fmul_rn(shares[other], slopes[other]));
    }
    // Nobody writes a slope before all threads of the row have read it.
    __syncwarp();
    for (int other = lane; other < known; other += LANES) {
        if (exists) {
            const float centred = __fsub_rn(slopes[other], mean);
            slopes[other] = __fmul_rn(__fmul_rn(shares[other], centred), scale);
        }
    }
}

/// The values, as each token shares them: a thread for each column of each row.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward(const float *projected, const float *shares, float *result, long long count, int context,
                      int heads, int size) {
    const int width = heads * size;
    const long long step = (long long)gridDim.x * THREADS;
    for (long long index = (long long)blockIdx.x * THREADS + threadIdx.x; index < count; index += step) {
        const int column = (int)(index % width), head = column / size;
        const long long row = index / width;
        const int token = (int)(row % context);
        const float *of_query = shares + (row * heads + head) * context;
        const float *value = projected + (row - token) * 3 * width + 2 * width + column;
        float sum = 0.0f;
        for (int other = 0; other <= token; other++) {
            sum = __fadd_rn(sum, __fmul_rn(of_query[other], value[(long long)other * 3 * width]));
        }
        result[index] = sum;
    }
}

/// The gradient of the projected rows, a thread for each column of each row. A query's goes through the keys up to it, a
/// key's and a value's through the queries from theirs on, both in ascending order.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward(const float *projected, const float *gradient, const float *shares, const float *score_slopes,
                       float *result, long long count, int context, int heads, int size) {
    const int width = heads * size;
    const long long step = (long long)gridDim.x * THREADS;
    for (long long index = (long long)blockIdx.x * THREADS + threadIdx.x; index < count; index += step) {
        const int which = (int)(index % (3 * width)) / width, column = (int)(index % width), head = column / size;
        const long long row = index / (3 * width);
        const int token = (int)(row % context);
        const long long first = row - token;
        float sum = 0.0f;
        if (which == 0) {
            const float *slopes = score_slopes + (row * heads + head) * context;
            const float *keys = projected + first * 3 * width + width + column;
            for (int other = 0; other <= token; other++) {
                sum = __fadd_rn(sum, __fmul_rn(slopes[other], keys[(long long)other * 3 * width]));
            }
        } else {
            const float *factors = (which == 1 ? score_slopes : shares) + (first * heads + head) * context + token;
            const float *from = which == 1 ? projected + first * 3 * width + column : gradient + first * width + column;
            const int from_stride = which == 1 ? 3 * width : width;
            for (int query = token; query < context; query++) {
                const float factor = factors[(long long)query * heads * context];
                sum = __fadd_rn(sum, __fmul_rn(factor, from[(long long)query * from_stride]));
            }
        }
        result[index] = sum;
    }
}
