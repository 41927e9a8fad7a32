//! What one sample looks like: decides which models can take it, and with the model the parameters.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Dimensions of a sample's numbers, at most.
pub const DIMENSIONS_MAX: usize = 4;
/// Numbers of a sample, at most: a batch of 1024 then takes 4 GiB, far more than anybody wants.
pub const FEATURES_MAX: usize = 1 << 20;
/// Classes, at most: the outputs of a sample stay small beside its features.
pub const CLASSES_MAX: usize = 1 << 16;
/// Tokens of a window, at most: the scores of one attention head then take 64 MiB.
pub const CONTEXT_MAX: usize = 4096;

/// What one sample looks like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SampleShape {
    /// Numbers, and one of so many classes.
    Classified {
        /// The dimensions of the numbers, the last one nearest in memory: `[64]`, `[8, 8]`, or
        /// `[height, width, channels]`.
        features: Vec<usize>,
        /// How many classes there are; a label is below.
        classes: usize,
    },
    /// Numbers, and other numbers to predict from them.
    Measured {
        /// The dimensions of the numbers.
        features: Vec<usize>,
        /// How many numbers are to be predicted.
        targets: usize,
    },
    /// A window of tokens, each of which but the last is to predict the one after it.
    Tokens {
        /// How many tokens are seen and predicted; a window has one more.
        context: usize,
        /// How many tokens there are; a token is below.
        vocabulary: usize,
    },
}

impl SampleShape {
    /// Numbers of one sample that a model reads.
    #[must_use]
    pub fn feature_count(&self) -> usize {
        match self {
            SampleShape::Classified { features, .. } | SampleShape::Measured { features, .. } => {
                features.iter().product()
            }
            SampleShape::Tokens { context, .. } => *context,
        }
    }

    /// Numbers that a model gives for one sample, or for each token of one.
    #[must_use]
    pub fn output_count(&self) -> usize {
        match self {
            SampleShape::Classified { classes, .. } => *classes,
            SampleShape::Measured { targets, .. } => *targets,
            SampleShape::Tokens { vocabulary, .. } => *vocabulary,
        }
    }

    /// The rule that this shape breaks, if it breaks one. Nothing may be computed from a shape that
    /// came from outside and was not checked.
    pub fn check(&self) -> Result<(), String> {
        let within = |what: &str, found: usize, low: usize, high: usize| match found {
            _ if (low..=high).contains(&found) => Ok(()),
            _ => Err(format!("{what} is {found}, outside {low} to {high}")),
        };
        match self {
            SampleShape::Classified { features, .. } | SampleShape::Measured { features, .. } => {
                within(
                    "the number of dimensions",
                    features.len(),
                    1,
                    DIMENSIONS_MAX,
                )?;
                let mut total = 1usize;
                for dimension in features {
                    within("a dimension", *dimension, 1, FEATURES_MAX)?;
                    total = total.saturating_mul(*dimension);
                }
                within("the number of values of a sample", total, 1, FEATURES_MAX)?;
            }
            SampleShape::Tokens { context, .. } => {
                within("the context", *context, 1, CONTEXT_MAX)?;
            }
        }
        match self {
            SampleShape::Measured { targets, .. } => {
                within("the number of targets", *targets, 1, CLASSES_MAX)
            }
            SampleShape::Classified { classes, .. } => {
                within("the number of classes", *classes, 2, CLASSES_MAX)
            }
            SampleShape::Tokens { vocabulary, .. } => {
                within("the vocabulary", *vocabulary, 2, CLASSES_MAX)
            }
        }
    }
}

impl fmt::Display for SampleShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dimensions = |features: &[usize]| {
            let texts: Vec<String> = features.iter().map(usize::to_string).collect();
            texts.join("×")
        };
        match self {
            SampleShape::Classified { features, classes } => {
                write!(f, "{} numbers in {classes} classes", dimensions(features))
            }
            SampleShape::Measured { features, targets } => {
                write!(
                    f,
                    "{} numbers with {targets} to predict",
                    dimensions(features)
                )
            }
            SampleShape::Tokens {
                context,
                vocabulary,
            } => {
                write!(f, "windows of {context} tokens out of {vocabulary}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_outside_their_limits_are_named() {
        let classified = |features: &[usize], classes| SampleShape::Classified {
            features: features.to_vec(),
            classes,
        };
        classified(&[8, 8, 3], 10).check().unwrap();
        for (shape, expected) in [
            (classified(&[], 10), "dimensions is 0"),
            (classified(&[8, 0], 10), "a dimension is 0"),
            (
                classified(&[1 << 20, 1 << 20, 1 << 20, 1 << 20], 10),
                "values of a sample",
            ),
            (classified(&[8], 1), "classes is 1"),
            (
                SampleShape::Measured {
                    features: vec![3],
                    targets: 0,
                },
                "targets is 0",
            ),
            (
                SampleShape::Tokens {
                    context: 0,
                    vocabulary: 256,
                },
                "context is 0",
            ),
            (
                SampleShape::Tokens {
                    context: 8,
                    vocabulary: 1 << 17,
                },
                "vocabulary is",
            ),
        ] {
            let error = shape.check().unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        assert_eq!(
            classified(&[8, 8], 10).to_string(),
            "8×8 numbers in 10 classes"
        );
    }
}
