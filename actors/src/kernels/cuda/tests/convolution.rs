//! Convolutions: patches and products of them, in the order in which `device` calls them.

use candle_core::{Device, Tensor};

use super::super::call::Address;
use super::super::calls::convolution::ImageBatch;
use super::super::calls::{self, Matrices, ProductShape, Rows, dense};
use super::super::emulation::{Guarded, check, check_all};
use super::flat;
use crate::kernels::convolution::{Images, ImagesBackward, WeightBackward};
use crate::kernels::test_values::normal;
use crate::kernels::{Activation, convolution};

/// A matrix of `rows` and `columns` without gaps, or the transposed one of it.
fn matrix(values: Address, columns: usize, is_transposed: bool) -> Matrices {
    let strides = [columns as i64, 1];
    let [row_stride, column_stride] = match is_transposed {
        false => strides,
        true => [strides[1], strides[0]],
    };
    Matrices {
        values,
        row_stride,
        column_stride,
        batch_stride: 0,
    }
}

fn product_shape(rows: usize, inner: usize, columns: usize) -> ProductShape {
    ProductShape {
        batch: 1,
        rows,
        inner,
        columns,
    }
}

#[test]
fn a_convolution_has_the_bits_of_the_cpu_forward_and_backward() {
    for (height, width, channels, stride, count, outputs) in [
        (1, 1, 1, 1, 1, 1),
        (1, 1, 2, 2, 2, 3),
        (3, 2, 1, 1, 2, 4),
        (8, 8, 1, 1, 3, 8),
        (8, 8, 8, 2, 2, 16),
        (7, 5, 3, 2, 2, 5),
        (2, 9, 2, 3, 2, 3),
    ] {
        let shape = Images {
            height,
            width,
            channels,
            stride,
        };
        let batch = ImageBatch { shape, count };
        let (places, patch_len) = (batch.places(), shape.patch_len());
        let mut pixels = normal("images", count * shape.image_len(), 1.0);
        let mut weights = normal("weight", patch_len * outputs, 0.3);
        // What lies outside of an image is multiplied, too: a zero by an infinity is a NaN.
        weights[0] = f32::INFINITY;
        pixels[0] = -0.0;
        let biases = normal("bias", outputs, 1.0);
        let gradients = normal("gradient", places * outputs, 1.0);
        let tensor = |values: &[f32], rows: usize| {
            let columns = values.len() / rows;
            Tensor::from_slice(values, (rows, columns), &Device::Cpu).unwrap()
        };
        let (images, weight) = (tensor(&pixels, count), tensor(&weights, patch_len));
        let bias = Tensor::from_slice(&biases, outputs, &Device::Cpu).unwrap();
        let gradient = tensor(&gradients, count);

        let mut stored =
            [&pixels, &weights, &biases, &gradients].map(|values| Guarded::new(values));
        let [images_at, weight_at, bias_at, gradient_at] = stored.each_mut().map(Guarded::address);
        let mut patches = Guarded::unwritten(places * patch_len);
        let patches_at = patches.address();
        let rows = Rows {
            rows: places,
            columns: outputs,
        };
        for activation in [Activation::Identity, Activation::Relu] {
            let expected = convolution(&images, &weight, &bias, shape, activation).unwrap();
            check_all(places * outputs, &flat(&expected), |to| {
                let operands = (
                    matrix(patches_at, patch_len, false),
                    matrix(weight_at, outputs, false),
                );
                let sizes = product_shape(places, patch_len, outputs);
                vec![
                    batch.patches(images_at, patches_at, 2).unwrap(),
                    calls::product(sizes, &operands.0, &operands.1, to, 1).unwrap(),
                    dense::add_bias(to, bias_at, rows, activation.floor(), 2).unwrap(),
                ]
            });
        }
        // The guards of what was between are whole.
        assert_eq!(patches.values().len(), places * patch_len);

        let expected = images.apply_op3_no_bwd(&weight, &gradient, &WeightBackward(shape));
        check_all(patch_len * outputs, &flat(&expected.unwrap()), |to| {
            let operands = (
                matrix(patches_at, patch_len, true),
                matrix(gradient_at, outputs, false),
            );
            let sizes = product_shape(patch_len, places, outputs);
            vec![
                batch.patches(images_at, patches_at, 1).unwrap(),
                calls::product(sizes, &operands.0, &operands.1, to, 1).unwrap(),
            ]
        });

        let expected = images.apply_op3_no_bwd(&weight, &gradient, &ImagesBackward(shape));
        check_all(pixels.len(), &flat(&expected.unwrap()), |to| {
            let operands = (
                matrix(gradient_at, outputs, false),
                matrix(weight_at, outputs, true),
            );
            let sizes = product_shape(places, outputs, patch_len);
            vec![
                calls::product(sizes, &operands.0, &operands.1, patches_at, 1).unwrap(),
                batch.patches_backward(patches_at, to, 2).unwrap(),
            ]
        });
        assert_eq!(patches.values().len(), places * patch_len);
    }
}

#[test]
fn patches_are_zero_outside_of_the_image_and_too_many_are_refused() {
    let shape = Images {
        height: 1,
        width: 2,
        channels: 1,
        stride: 1,
    };
    let mut image = Guarded::new(&[5.0, 7.0]);
    let at = image.address();
    let batch = ImageBatch { shape, count: 1 };
    let rows = [
        [0.0, 0.0, 0.0, 0.0, 5.0, 7.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 5.0, 7.0, 0.0, 0.0, 0.0, 0.0],
    ];
    check(18, &rows.concat(), |to| batch.patches(at, to, 1).unwrap());
    let many = ImageBatch {
        shape,
        count: 1 << 28,
    };
    assert!(many.patches(at, at, 1).is_err());
    assert!(many.patches_backward(at, at, 1).is_err());
}
