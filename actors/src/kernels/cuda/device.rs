//! The kernels on candle's storage.
//!
//! Invariants:
//! 1. A call gets addresses of as many values as its sizes say: whoever makes a call here has checked lengths, and that
//!    nothing written overlaps anything else.
//! 2. Calls go to the stream of candle's device, so they are ordered with candle's own.
//!
//! Here are products and rows; `attention`, `convolution`, `dense` and `tokens` have the layers, `state` what a training's
//! state needs.

mod attention;
mod convolution;
mod dense;
mod state;
mod tokens;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, DevicePtr, DevicePtrMut, LaunchConfig, PushKernelArg,
};
use candle_core::{CudaDevice, CudaStorage, Error, Layout, Result, Shape, bail};

use super::Dropping;
use super::call::{Address, Argument, Call, Source, THREADS};
use super::calls::{self, Matrices, ProductShape, Rows};

pub(crate) use attention::{attention_backward, attention_forward};
pub(in crate::kernels) use convolution::{
    convolution_forward, convolution_images_backward, convolution_weight_backward,
};
pub(in crate::kernels) use dense::{
    affine_forward, column_sums, cross_entropy, gelu_backward, gelu_forward, overwrite,
    rectifier_backward, zero,
};
pub use state::{FlatState, tree_add, tree_fold};
pub(crate) use tokens::{dropout, embedding_backward, embedding_forward};

impl Source {
    /// Name of the module on a GPU.
    fn module(self) -> &'static str {
        match self {
            Self::Adamw => "mobula-adamw",
            Self::Affine => "mobula-affine",
            Self::Attention => "mobula-attention",
            Self::Convolution => "mobula-convolution",
            Self::CrossEntropy => "mobula-cross-entropy",
            Self::Dropout => "mobula-dropout",
            Self::Embedding => "mobula-embedding",
            Self::Gelu => "mobula-gelu",
            Self::LayerNorm => "mobula-layer-norm",
            Self::Product => "mobula-product",
            Self::Softmax => "mobula-softmax",
            Self::TreeAdd => "mobula-tree-add",
        }
    }

    fn ptx(self) -> &'static str {
        match self {
            Self::Adamw => include_str!(concat!(env!("OUT_DIR"), "/adamw.ptx")),
            Self::Affine => include_str!(concat!(env!("OUT_DIR"), "/affine.ptx")),
            Self::Attention => include_str!(concat!(env!("OUT_DIR"), "/attention.ptx")),
            Self::Convolution => include_str!(concat!(env!("OUT_DIR"), "/convolution.ptx")),
            Self::CrossEntropy => include_str!(concat!(env!("OUT_DIR"), "/cross_entropy.ptx")),
            Self::Dropout => include_str!(concat!(env!("OUT_DIR"), "/dropout.ptx")),
            Self::Embedding => include_str!(concat!(env!("OUT_DIR"), "/embedding.ptx")),
            Self::Gelu => include_str!(concat!(env!("OUT_DIR"), "/gelu.ptx")),
            Self::LayerNorm => include_str!(concat!(env!("OUT_DIR"), "/layer_norm.ptx")),
            Self::Product => include_str!(concat!(env!("OUT_DIR"), "/product.ptx")),
            Self::Softmax => include_str!(concat!(env!("OUT_DIR"), "/softmax.ptx")),
            Self::TreeAdd => include_str!(concat!(env!("OUT_DIR"), "/tree_add.ptx")),
        }
    }
}

/// Starts a kernel; it ends some time later.
///
/// # Safety
/// The addresses are on this device, of as many values as the kernel reads and writes, and what it writes overlaps
/// nothing else.
unsafe fn launch(device: &CudaDevice, call: &Call) -> Result<()> {
    if call.is_empty() {
        return Ok(());
    }
    let source = call.kernel.source();
    let function =
        device.get_or_load_custom_func(call.kernel.name(), source.module(), source.ptx())?;
    let mut builder = function.builder();
    for argument in &call.arguments {
        match argument {
            Argument::Address(Address(value)) | Argument::Count(value) => builder.arg(value),
            Argument::Wide(value) => builder.arg(value),
            Argument::Int(value) => builder.arg(value),
            Argument::Float(value) => builder.arg(value),
        };
    }
    let configuration = LaunchConfig {
        grid_dim: call.grid.into(),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the caller promises the addresses; `calls` makes arguments of the types of the kernel, which the
    // emulation checks.
    unsafe { builder.launch(configuration) }.map_err(Error::wrap)?;
    Ok(())
}

/// How many multiprocessors the GPU has.
fn multiprocessors(device: &CudaDevice) -> Result<u32> {
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let stream = device.cuda_stream();
    let count = stream.context().attribute(attribute).map_err(Error::wrap)?;
    Ok(u32::try_from(count).unwrap_or(1).max(1))
}

/// Where values lie that a call reads; alive until the call is started.
macro_rules! read {
    ($values:expr, $stream:expr) => {{
        let (address, guard) = DevicePtr::device_ptr($values, $stream);
        (Address(address), guard)
    }};
}
use read;

/// Where values lie that a call writes; alive until the call is started.
macro_rules! written {
    ($values:expr, $stream:expr) => {{
        let (address, guard) = DevicePtrMut::device_ptr_mut($values, $stream);
        (Address(address), guard)
    }};
}

use written;

/// `f32` values of a tensor without gaps: where in their storage they start.
struct Contiguous<'a> {
    values: &'a CudaSlice<f32>,
    start: usize,
}

impl<'a> Contiguous<'a> {
    fn of(storage: &'a CudaStorage, layout: &Layout, operation: &str) -> Result<Self> {
        let values = storage.as_cuda_slice::<f32>()?;
        match layout.contiguous_offsets() {
            Some((start, end)) if end <= values.len() => Ok(Self { values, start }),
            _ => bail!("{operation} needs contiguous values, not {layout:?}"),
        }
    }
}

/// An operand and its layout, as candle hands it over.
pub(crate) type Operand<'a> = (&'a CudaStorage, &'a Layout);

impl Contiguous<'_> {
    fn address(&self, Address(start): Address) -> Address {
        Address(start + (self.start * size_of::<f32>()) as u64)
    }
}

/// Makes a tensor of `shape` from contiguous operands, of which `call` gets the addresses, with that of the result.
fn of_contiguous<const N: usize>(
    operation: &str,
    operands: [Operand<'_>; N],
    shape: Shape,
    call: impl FnOnce([Address; N], Address) -> Result<Call>,
) -> Result<(CudaStorage, Shape)> {
    of_contiguous_and(operation, operands, [], shape, |addresses, [], result| {
        call(addresses, result)
    })
}

/// As [`of_contiguous`], from vectors of whole numbers as well.
fn of_contiguous_and<const N: usize, const M: usize>(
    operation: &str,
    operands: [Operand<'_>; N],
    numbers: [&CudaSlice<u32>; M],
    shape: Shape,
    call: impl FnOnce([Address; N], [Address; M], Address) -> Result<Call>,
) -> Result<(CudaStorage, Shape)> {
    let device = operands[0].0.device().clone();
    let stream = device.cuda_stream();
    let mut contiguous = Vec::with_capacity(N);
    for (storage, layout) in operands {
        contiguous.push(Contiguous::of(storage, layout, operation)?);
    }
    // SAFETY: every kernel writes each value of its result; nothing reads it before.
    let mut result = unsafe { device.alloc::<f32>(shape.elem_count())? };
    {
        let mut guards = Vec::with_capacity(N + M);
        let mut addresses = [Address(0); N];
        for (operand, address) in contiguous.iter().zip(&mut addresses) {
            let (start, guard) = read!(operand.values, &stream);
            *address = operand.address(start);
            guards.push(guard);
        }
        let mut number_addresses = [Address(0); M];
        for (numbers, address) in numbers.into_iter().zip(&mut number_addresses) {
            let guard;
            (*address, guard) = read!(numbers, &stream);
            guards.push(guard);
        }
        let (result, _written) = written!(&mut result, &stream);
        // SAFETY: the operands have the sizes of their layouts, the result is new; the callers' sizes are those of
        // the layouts and of the numbers.
        unsafe { launch(&device, &call(addresses, number_addresses, result)?)? };
    }
    Ok((CudaStorage::wrap_cuda_slice(result, device), shape))
}

/// Changes the values of a tensor that nobody else has, which fill their storage; `call` gets their address, and those of
/// contiguous operands.
fn in_place<const N: usize>(
    operation: &str,
    values: &mut CudaStorage,
    operands: [Operand<'_>; N],
    call: impl FnOnce(Address, [Address; N]) -> Result<Call>,
) -> Result<()> {
    let device = values.device().clone();
    let stream = device.cuda_stream();
    let mut contiguous = Vec::with_capacity(N);
    for (storage, layout) in operands {
        contiguous.push(Contiguous::of(storage, layout, operation)?);
    }
    let mut guards = Vec::with_capacity(N);
    let mut addresses = [Address(0); N];
    for (operand, address) in contiguous.iter().zip(&mut addresses) {
        let (start, guard) = read!(operand.values, &stream);
        *address = operand.address(start);
        guards.push(guard);
    }
    let (values, _written) = written!(values.as_cuda_slice_mut::<f32>()?, &stream);
    // SAFETY: the operands have the sizes of their layouts, the values are borrowed alone; the callers' sizes are theirs.
    unsafe { launch(&device, &call(values, addresses)?) }
}

/// The rows of a tensor: all but the last dimension.
fn rows_of(layout: &Layout) -> Rows {
    let columns = layout.dims().last().copied().unwrap_or(1);
    let count = layout.shape().elem_count();
    Rows {
        rows: count.checked_div(columns).unwrap_or_default(),
        columns,
    }
}

/// Softmax of each row.
pub(in crate::kernels) fn softmax_forward(logits: Operand<'_>) -> Result<(CudaStorage, Shape)> {
    let rows = rows_of(logits.1);
    let shape = logits.1.shape().clone();
    of_contiguous("softmax", [logits], shape, |[logits], result| {
        rows.softmax_forward(logits, result).map_err(Error::wrap)
    })
}

/// Of the gradient and the probabilities, the gradient of the logits.
pub(in crate::kernels) fn softmax_backward(
    gradient: Operand<'_>,
    probabilities: Operand<'_>,
) -> Result<(CudaStorage, Shape)> {
    let shape = probabilities.1.shape().clone();
    same_dims("softmax-backward", gradient, probabilities)?;
    let rows = rows_of(probabilities.1);
    let operands = [gradient, probabilities];
    of_contiguous("softmax-backward", operands, shape, |addresses, result| {
        let [gradient, probabilities] = addresses;
        rows.softmax_backward(gradient, probabilities, result)
            .map_err(Error::wrap)
    })
}

fn same_dims(operation: &str, a: Operand<'_>, b: Operand<'_>) -> Result<()> {
    if a.1.dims() != b.1.dims() {
        bail!(
            "{operation} of {:?} and {:?}, which differ",
            a.1.dims(),
            b.1.dims()
        )
    }
    Ok(())
}

/// Refuses a parameter that has not one value a column.
fn one_a_column(operation: &str, rows: Rows, parameter: Operand<'_>) -> Result<()> {
    if parameter.1.dims() != [rows.columns] {
        bail!(
            "{operation} of rows of {} values needs as many parameters, not {:?}",
            rows.columns,
            parameter.1.dims()
        )
    }
    Ok(())
}

/// Layer normalisation of each row of values, with scale and shift.
pub(in crate::kernels) fn layer_norm_forward(
    [values, scale, shift]: [Operand<'_>; 3],
    epsilon: f32,
) -> Result<(CudaStorage, Shape)> {
    let (rows, shape) = (rows_of(values.1), values.1.shape().clone());
    one_a_column("layer-norm", rows, scale)?;
    one_a_column("layer-norm", rows, shift)?;
    let operands = [values, scale, shift];
    of_contiguous("layer-norm", operands, shape, |addresses, result| {
        rows.layer_norm_forward(addresses, result, epsilon)
            .map_err(Error::wrap)
    })
}

/// Of values, scale and gradient, the gradient of the values.
pub(in crate::kernels) fn layer_norm_backward(
    [values, scale, gradient]: [Operand<'_>; 3],
    epsilon: f32,
) -> Result<(CudaStorage, Shape)> {
    let (rows, shape) = (rows_of(values.1), values.1.shape().clone());
    one_a_column("layer-norm-backward", rows, scale)?;
    same_dims("layer-norm-backward", values, gradient)?;
    let operands = [values, scale, gradient];
    of_contiguous(
        "layer-norm-backward",
        operands,
        shape,
        |addresses, result| {
            rows.layer_norm_backward(addresses, result, epsilon)
                .map_err(Error::wrap)
        },
    )
}

/// Of values and gradient, the gradients of scale and shift as two rows.
pub(in crate::kernels) fn layer_norm_parameters_backward(
    [values, gradient]: [Operand<'_>; 2],
    epsilon: f32,
) -> Result<(CudaStorage, Shape)> {
    const NAME: &str = "layer-norm-parameters-backward";
    let rows = rows_of(values.1);
    same_dims(NAME, values, gradient)?;
    let moments_shape = Shape::from((rows.rows, 2));
    let (moments, moments_shape) =
        of_contiguous(NAME, [values], moments_shape, |[values], result| {
            rows.layer_norm_moments(values, result, epsilon)
                .map_err(Error::wrap)
        })?;
    let moments_layout = Layout::contiguous(moments_shape);
    let operands = [values, gradient, (&moments, &moments_layout)];
    let shape = Shape::from((2, rows.columns));
    of_contiguous(NAME, operands, shape, |addresses, result| {
        rows.layer_norm_parameters_backward(addresses, result)
            .map_err(Error::wrap)
    })
}

/// Whether a product reads this as it lies.
pub(in crate::kernels) fn is_readable(layout: &Layout) -> bool {
    Matrices::of(Address(0), layout).is_some()
}

/// `a · b` for each pair of matrices. The caller has compared the dimensions.
pub(in crate::kernels) fn product(
    a: Operand<'_>,
    b: Operand<'_>,
    sizes: [usize; 3],
    shape: Shape,
) -> Result<(CudaStorage, Shape)> {
    let [rows, inner, columns] = sizes;
    let device = a.0.device().clone();
    let stream = device.cuda_stream();
    let batch = shape.elem_count().checked_div(rows * columns);
    let product_shape = ProductShape {
        batch: batch.unwrap_or_default(),
        rows,
        inner,
        columns,
    };
    let multiprocessors = multiprocessors(&device)?;
    // SAFETY: the kernel writes each element; nothing reads one before.
    let mut c = unsafe { device.alloc::<f32>(shape.elem_count())? };
    {
        let (a_values, b_values) = (a.0.as_cuda_slice::<f32>()?, b.0.as_cuda_slice::<f32>()?);
        let (a_address, _a_read) = read!(a_values, &stream);
        let (b_address, _b_read) = read!(b_values, &stream);
        let a = matrices(a_address, a.1)?;
        let b = matrices(b_address, b.1)?;
        let (c, _written) = written!(&mut c, &stream);
        let call =
            calls::product(product_shape, &a, &b, c, multiprocessors).map_err(Error::wrap)?;
        // SAFETY: candle's layouts stay within their storage; the result is new and of the product's size.
        unsafe { launch(&device, &call)? };
    }
    Ok((CudaStorage::wrap_cuda_slice(c, device), shape))
}

fn matrices(start: Address, layout: &Layout) -> Result<Matrices> {
    match Matrices::of(start, layout) {
        Some(matrices) => Ok(matrices),
        None => {
            bail!("a product on a GPU needs matrices with one stride between them, not {layout:?}")
        }
    }
}
