// The matrix product: each element one chain of fused multiply-adds from zero over the inner dimension, ascending.
//
// A block computes a tile of the result, 16 x 16 threads, each of them EDGE x EDGE elements in registers. The operands
// pass through shared memory in slices of the inner dimension, the next one on its way while the present one is used.
// The inner dimension is never divided between threads, and a last slice is as short as it is: padding it with zeros
// could turn a sum of -0 into +0. So the tile's size, like the GPU, never shows in a result.

#define SLICE 16
#define GRID_EDGE 16
#define THREADS 256

/// Where an operand's elements lie. Which index neighbouring threads run along decides the speed, and nothing else.
struct Operand {
    const float *values;
    long long outer_stride;
    long long inner_stride;
    int outer_count;
};

/// This thread's share of a slice, on its way from memory to the tile.
template <int OUTER>
struct Share {
    static const int COUNT = OUTER * SLICE / THREADS;
    float values[COUNT];

    static __device__ int outer_of(int index, bool along_inner) {
        return along_inner ? index / SLICE : index % OUTER;
    }
    static __device__ int inner_of(int index, bool along_inner) {
        return along_inner ? index % SLICE : index / OUTER;
    }

    __device__ void fetch(const Operand &operand, int outer_start, int inner_start, int inner_end) {
        const bool along_inner = operand.inner_stride == 1;
#pragma unroll
        for (int each = 0; each < COUNT; each++) {
            const int index = each * THREADS + threadIdx.x;
            const int outer = outer_start + outer_of(index, along_inner);
            const int inner = inner_start + inner_of(index, along_inner);
            float value = 0.0f;
            if (outer < operand.outer_count && inner < inner_end) {
                value = operand.values[outer * operand.outer_stride + inner * operand.inner_stride];
            }
            values[each] = value;
        }
    }

    /// The inner index comes first in the tile, so that a thread's elements lie side by side.
    __device__ void put(float (*tile)[OUTER + 4], bool along_inner) const {
#pragma unroll
        for (int each = 0; each < COUNT; each++) {
            const int index = each * THREADS + threadIdx.x;
            tile[inner_of(index, along_inner)][outer_of(index, along_inner)] = values[each];
        }
    }
};

/// The position in a tile of element `index` of the thread at `place` of 16: in runs of four, so that a warp's reads of
/// shared memory meet no bank twice.
template <int EDGE>
__device__ inline int position(int place, int index) {
    const int run = EDGE < 4 ? EDGE : 4;
    return index / run * (GRID_EDGE * run) + place * run + index % run;
}

template <int EDGE>
__device__ inline void multiply_slice(const float (*a_tile)[EDGE * GRID_EDGE + 4],
                                      const float (*b_tile)[EDGE * GRID_EDGE + 4], int k, int row_place,
                                      int column_place, float (&sums)[EDGE][EDGE]) {
    float a[EDGE], b[EDGE];
#pragma unroll
    for (int index = 0; index < EDGE; index++) {
        a[index] = a_tile[k][position<EDGE>(row_place, index)];
        b[index] = b_tile[k][position<EDGE>(column_place, index)];
    }
#pragma unroll
    for (int row = 0; row < EDGE; row++) {
#pragma unroll
        for (int column = 0; column < EDGE; column++) {
            sums[row][column] = __fmaf_rn(a[row], b[column], sums[row][column]);
        }
    }
}

template <int EDGE>
__device__ inline void multiply_tile(const Operand &a, const Operand &b, float *c, int inner_count) {
    const int TILE = EDGE * GRID_EDGE;
    __shared__ __align__(16) float a_tiles[2][SLICE][TILE + 4];
    __shared__ __align__(16) float b_tiles[2][SLICE][TILE + 4];
    // A warp takes 8 columns by 4 rows of the threads.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column_place = warp % 2 * 8 + lane % 8, row_place = warp / 2 * 4 + lane / 8;
    const int row_start = blockIdx.x * TILE, column_start = blockIdx.y * TILE;
    const bool a_along_inner = a.inner_stride == 1, b_along_inner = b.inner_stride == 1;
    float sums[EDGE][EDGE];
#pragma unroll
    for (int row = 0; row < EDGE; row++) {
#pragma unroll
        for (int column = 0; column < EDGE; column++) {
            sums[row][column] = 0.0f;
        }
    }
    Share<TILE> a_share, b_share;
    a_share.fetch(a, row_start, 0, inner_count);
    b_share.fetch(b, column_start, 0, inner_count);
    a_share.put(a_tiles[0], a_along_inner);
    b_share.put(b_tiles[0], b_along_inner);
    __syncthreads();
    int half = 0;
    for (int start = 0; start < inner_count; start += SLICE) {
        const bool goes_on = inner_count - start > SLICE;
        if (goes_on) {
            a_share.fetch(a, row_start, start + SLICE, inner_count);
            b_share.fetch(b, column_start, start + SLICE, inner_count);
#pragma unroll
            for (int k = 0; k < SLICE; k++) {
                multiply_slice<EDGE>(a_tiles[half], b_tiles[half], k, row_place, column_place, sums);
            }
            // The other half was last read before the barrier that ended the previous slice.
            a_share.put(a_tiles[half ^ 1], a_along_inner);
            b_share.put(b_tiles[half ^ 1], b_along_inner);
        } else {
            for (int k = 0; k < inner_count - start; k++) {
                multiply_slice<EDGE>(a_tiles[half], b_tiles[half], k, row_place, column_place, sums);
            }
        }
        __syncthreads();
        half ^= 1;
    }
#pragma unroll
    for (int row_index = 0; row_index < EDGE; row_index++) {
        const int row = row_start + position<EDGE>(row_place, row_index);
#pragma unroll
        for (int column_index = 0; column_index < EDGE; column_index++) {
            const int column = column_start + position<EDGE>(column_place, column_index);
            if (row < a.outer_count && column < b.outer_count) {
                c[(long long)row * b.outer_count + column] = sums[row_index][column_index];
            }
        }
    }
}

/// All products of a batch, c row-major and without gaps. Block x: tiles of rows; y: of columns; z: of the batch, each
/// block going on to the z-th next.
template <int EDGE>
__device__ inline void multiply_batch(const float *a, long long a_row, long long a_column, long long a_batch,
                                      const float *b, long long b_row, long long b_column, long long b_batch,
                                      float *c, int rows, int columns, int inner, int batch) {
    for (int item = blockIdx.z; item < batch; item += gridDim.z) {
        const Operand left = {a + item * a_batch, a_row, a_column, rows};
        const Operand right = {b + item * b_batch, b_column, b_row, columns};
        multiply_tile<EDGE>(left, right, c + (long long)item * rows * columns, inner);
    }
}

#define PRODUCT(NAME, EDGE, BLOCKS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                    \
        NAME(const float *a, long long a_row, long long a_column, long long a_batch, const float *b,                 \
             long long b_row, long long b_column, long long b_batch, float *c, int rows, int columns, int inner,     \
             int batch) {                                                                                            \
        multiply_batch<EDGE>(a, a_row, a_column, a_batch, b, b_row, b_column, b_batch, c, rows, columns, inner,      \
                             batch);                                                                                 \
    }

PRODUCT(product_128, 8, 1)
PRODUCT(product_64, 4, 2)
PRODUCT(product_32, 2, 2)
