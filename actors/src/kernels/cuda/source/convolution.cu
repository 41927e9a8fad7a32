// The patches of images, and the way back from patches to images, in the order of kernels/convolution.rs. What is
// between the two is a product.

#define THREADS 256
/// Side of the kernel; an image is padded by one zero all round.
#define KERNEL_SIDE 3
#define KERNEL_AREA 9

/// A row for each place of the output of each image: the values under the kernel there, zeros outside of the image.
/// `count` values in all.
extern "C" __global__ void __launch_bounds__(THREADS)
    patches(const float *images, float *result, int count, int height, int width, int channels, int stride,
            int output_height, int output_width) {
    const unsigned step = gridDim.x * THREADS;
    for (unsigned index = blockIdx.x * THREADS + threadIdx.x; index < (unsigned)count; index += step) {
        unsigned rest = index;
        const unsigned channel = rest % channels;
        rest /= channels;
        const int kernel_column = rest % KERNEL_SIDE;
        rest /= KERNEL_SIDE;
        const int kernel_row = rest % KERNEL_SIDE;
        rest /= KERNEL_SIDE;
        const int column = rest % output_width;
        rest /= output_width;
        const int row = rest % output_height;
        const unsigned image = rest / output_height;
        const int y = row * stride + kernel_row - 1, x = column * stride + kernel_column - 1;
        const bool is_inside = 0 <= y && y < height && 0 <= x && x < width;
        result[index] = is_inside ? images[((image * height + y) * width + x) * channels + channel] : 0.0f;
    }
}

/// The first place of the output whose patch reaches what is at `at` of a side.
__device__ inline int first_place(int at, int stride) { return at == 0 ? 0 : (at + stride - 2) / stride; }

/// The place after the last one.
__device__ inline int end_place(int at, int stride, int places) {
    const int end = (at + 1) / stride + 1;
    return end < places ? end : places;
}

/// Of the gradients of patches, those of the images' values, `count` in all: each the sum over the places of the output
/// whose patch has it, in ascending order.
extern "C" __global__ void __launch_bounds__(THREADS)
    patches_backward(const float *gradient, float *result, int count, int height, int width, int channels, int stride,
                     int output_height, int output_width) {
    const unsigned step = gridDim.x * THREADS;
    for (unsigned index = blockIdx.x * THREADS + threadIdx.x; index < (unsigned)count; index += step) {
        unsigned rest = index;
        const unsigned channel = rest % channels;
        rest /= channels;
        const int x = rest % width;
        rest /= width;
        const int y = rest % height;
        const unsigned image = rest / height;
        const int row_end = end_place(y, stride, output_height);
        const int column_end = end_place(x, stride, output_width);
        float sum = 0.0f;
        for (int row = first_place(y, stride); row < row_end; row++) {
            for (int column = first_place(x, stride); column < column_end; column++) {
                const int kernel_row = y + 1 - row * stride, kernel_column = x + 1 - column * stride;
                const unsigned place = (image * output_height + row) * output_width + column;
                const unsigned position = place * KERNEL_AREA + kernel_row * KERNEL_SIDE + kernel_column;
                sum = __fadd_rn(sum, gradient[position * channels + channel]);
            }
        }
        result[index] = sum;
    }
}
