use super::*;
use crate::kernels::affine;
use crate::kernels::execution::all_executions;
use crate::kernels::test_values::bits;
use crate::training::random::{Purpose, Stream};
use candle_core::{DType, Device, Var};

fn values(name: &str, count: usize) -> Vec<f32> {
    let stream = Stream::new(6, Purpose::Initialise, name, 0);
    (0..count)
        .map(|index| stream.normal(index as u64, 0) as f32)
        .collect()
}

/// Output and gradients against candle's convolution, which wants channels first; all paths agree in every bit.
fn check((height, width): (usize, usize), channels: usize, outputs: usize, stride: usize) {
    let count = 3;
    let images = Images {
        height,
        width,
        channels,
        stride,
    };
    let var = |name: &str, shape: (usize, usize)| {
        Var::from_vec(values(name, shape.0 * shape.1), shape, &Device::Cpu).unwrap()
    };
    let x = var("x", (count, images.image_len()));
    let weight = var("w", (images.patch_len(), outputs));
    let bias = Var::from_vec(values("b", outputs), outputs, &Device::Cpu).unwrap();
    for activation in [Activation::Identity, Activation::Relu] {
        let theirs = {
            let x = x.reshape((count, height, width, channels)).unwrap();
            let x = x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
            let kernel = weight
                .reshape((KERNEL_SIDE, KERNEL_SIDE, channels, outputs))
                .unwrap();
            let kernel = kernel.permute((3, 2, 0, 1)).unwrap().contiguous().unwrap();
            let result = x.conv2d(&kernel, 1, stride, 1, 1).unwrap();
            let result = result.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
            let result = result.broadcast_add(&bias).unwrap();
            let result = result.reshape((count, ())).unwrap();
            match activation {
                Activation::Identity => result,
                Activation::Relu => result.relu().unwrap(),
            }
        };
        let all = |result: Tensor| {
            let gradients = result.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let of = |var: &Var| gradients.get(var.as_tensor()).unwrap().clone();
            [of(&x), of(&weight), of(&bias), result]
                .map(|tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        };
        let theirs = all(theirs);
        let mut seen = None;
        for execution in all_executions() {
            let ours =
                execution.run(|| all(convolution(&x, &weight, &bias, images, activation).unwrap()));
            for (ours, theirs) in ours.iter().flatten().zip(theirs.iter().flatten()) {
                assert!(
                    (ours - theirs).abs() < 1e-3 * theirs.abs().max(1.0),
                    "{ours} {theirs}"
                );
            }
            let ours = ours.map(|values| bits(&values));
            let first = seen.get_or_insert_with(|| ours.clone());
            assert_eq!(*first, ours, "{execution:?}");
        }
    }
}

/// As the product of all patches of all images at once, which is how the order is defined.
#[test]
fn it_has_the_bits_of_one_dense_layer_of_all_patches() {
    let images = Images {
        height: 6,
        width: 5,
        channels: 3,
        stride: 2,
    };
    let (count, outputs) = (70, 33);
    let x = values("x", count * images.image_len());
    let (places, patch_len) = (images.output_len(), images.patch_len());
    let mut patches = vec![0.0; count * places * patch_len];
    let each = x.chunks_exact(images.image_len());
    for (image, patches) in each.zip(patches.chunks_exact_mut(places * patch_len)) {
        images.extract(image, &(0..patch_len), patches);
    }
    let tensor = |values: Vec<f32>, shape: (usize, usize)| {
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let x = tensor(x, (count, images.image_len()));
    let patches = tensor(patches, (count * places, patch_len));
    let weight = values("w", patch_len * outputs);
    let weight = Var::from_vec(weight, (patch_len, outputs), &Device::Cpu).unwrap();
    let bias = Var::from_vec(values("b", outputs), outputs, &Device::Cpu).unwrap();
    let all = |result: Tensor| {
        let gradients = result.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let of = |var: &Var| gradients.get(var.as_tensor()).unwrap().clone();
        [of(&weight), of(&bias), result]
            .map(|tensor| bits(&tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()))
    };
    let dense = all(affine(&patches, &weight, &bias, Activation::Relu).unwrap());
    for execution in all_executions() {
        let ours = execution
            .run(|| all(convolution(&x, &weight, &bias, images, Activation::Relu).unwrap()));
        assert!(ours == dense, "{execution:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let images = Images {
        height: 2,
        width: 2,
        channels: 1,
        stride: 1,
    };
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let bias = zeros(&[4]);
    for (x, weight, said) in [
        (zeros(&[1, 5]), zeros(&[9, 4]), "images of 5 values"),
        (zeros(&[1, 4]), zeros(&[8, 4]), "a weight of 8 by 4"),
        (zeros(&[4]), zeros(&[9, 4]), "needs rows and a matrix"),
    ] {
        let refused = convolution(&x, &weight, &bias, images, Activation::Identity);
        let error = refused.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn it_is_candles_convolution_with_bias_and_rectifier() {
    check((8, 8), 1, 4, 1);
    check((8, 8), 3, 5, 2);
    check((5, 9), 2, 3, 2);
    check((3, 7), 2, 3, 1);
    check((1, 1), 2, 3, 2);
    check((1, 2), 2, 3, 1);
}
