//! A call of a kernel: which, over how many blocks, with what. The same for a GPU and for the tests' emulation.

use std::fmt;

/// Threads in a block, of every kernel.
pub(super) const THREADS: u32 = 256;

/// A file of kernels, which is one module on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Adamw,
    Affine,
    Attention,
    Convolution,
    CrossEntropy,
    Dropout,
    Embedding,
    Gelu,
    LayerNorm,
    Product,
    Softmax,
    TreeAdd,
}

/// A kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    Adamw,
    AddBias,
    RectifierBackward,
    ColumnSums,
    AttentionScores,
    AttentionShares,
    AttentionForward,
    AttentionSlopes,
    AttentionScoresBackward,
    AttentionBackward,
    Patches,
    PatchesBackward,
    CrossEntropy,
    Dropout,
    EmbeddingForward,
    EmbeddingBackward,
    GeluForward,
    GeluBackward,
    LayerNormForward,
    LayerNormBackward,
    LayerNormMoments,
    LayerNormParametersBackward,
    Product128,
    Product64,
    Product32,
    SoftmaxForward,
    SoftmaxBackward,
    TreeAdd,
    TreeFold,
}

impl Kernel {
    /// Its name in the source.
    pub(super) fn name(self) -> &'static str {
        self.name_and_source().0
    }

    /// The file that it is in.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "only a GPU loads it")
    )]
    pub(super) fn source(self) -> Source {
        self.name_and_source().1
    }

    fn name_and_source(self) -> (&'static str, Source) {
        match self {
            Self::Adamw => ("adamw", Source::Adamw),
            Self::AddBias => ("add_bias", Source::Affine),
            Self::RectifierBackward => ("rectifier_backward", Source::Affine),
            Self::ColumnSums => ("column_sums", Source::Affine),
            Self::AttentionScores => ("attention_scores", Source::Attention),
            Self::AttentionShares => ("attention_shares", Source::Attention),
            Self::AttentionForward => ("attention_forward", Source::Attention),
            Self::AttentionSlopes => ("attention_slopes", Source::Attention),
            Self::AttentionScoresBackward => ("attention_scores_backward", Source::Attention),
            Self::AttentionBackward => ("attention_backward", Source::Attention),
            Self::Patches => ("patches", Source::Convolution),
            Self::PatchesBackward => ("patches_backward", Source::Convolution),
            Self::CrossEntropy => ("cross_entropy", Source::CrossEntropy),
            Self::Dropout => ("dropout", Source::Dropout),
            Self::EmbeddingForward => ("embedding_forward", Source::Embedding),
            Self::EmbeddingBackward => ("embedding_backward", Source::Embedding),
            Self::GeluForward => ("gelu_forward", Source::Gelu),
            Self::GeluBackward => ("gelu_backward", Source::Gelu),
            Self::LayerNormForward => ("layer_norm_forward", Source::LayerNorm),
            Self::LayerNormBackward => ("layer_norm_backward", Source::LayerNorm),
            Self::LayerNormMoments => ("layer_norm_moments", Source::LayerNorm),
            Self::LayerNormParametersBackward => {
                ("layer_norm_parameters_backward", Source::LayerNorm)
            }
            Self::Product128 => ("product_128", Source::Product),
            Self::Product64 => ("product_64", Source::Product),
            Self::Product32 => ("product_32", Source::Product),
            Self::SoftmaxForward => ("softmax_forward", Source::Softmax),
            Self::SoftmaxBackward => ("softmax_backward", Source::Softmax),
            Self::TreeAdd => ("tree_add", Source::TreeAdd),
            Self::TreeFold => ("tree_fold", Source::TreeAdd),
        }
    }
}

/// Where values lie: on a GPU, or in the emulation's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address(pub(super) u64);

/// One argument, of the size that the kernel declares.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Argument {
    Address(Address),
    /// `unsigned long long`.
    Count(u64),
    /// `long long`.
    Wide(i64),
    /// `int`.
    Int(i32),
    /// `float`.
    Float(f32),
}

impl fmt::Debug for Argument {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(Address(address)) => write!(formatter, "at {address:#x}"),
            Self::Count(value) => write!(formatter, "{value}"),
            Self::Wide(value) => write!(formatter, "{value}"),
            Self::Int(value) => write!(formatter, "{value}"),
            Self::Float(value) => write!(formatter, "{value:e}"),
        }
    }
}

/// One call. A grid without blocks is nothing to do.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Call {
    pub(super) kernel: Kernel,
    /// Blocks in x, y, z.
    pub(super) grid: [u32; 3],
    pub(super) arguments: Vec<Argument>,
}

impl Call {
    /// Whether there is nothing to do; a GPU refuses such a call.
    pub(super) fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }
}

/// Why a kernel cannot take a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} of {found} are more than a kernel takes, {max}; divide the tensor")]
pub(super) struct TooLarge {
    what: &'static str,
    found: usize,
    max: usize,
}

/// `found` as a number of at most `max`, which is below 2^31.
pub(super) fn at_most(what: &'static str, found: usize, max: i32) -> Result<i32, TooLarge> {
    match i32::try_from(found) {
        Ok(number) if number <= max => Ok(number),
        _ => Err(TooLarge {
            what,
            found,
            max: max as usize,
        }),
    }
}
