//! Attention in which each token looks at all tokens of its own text. Texts of any lengths lie one after the other, so nothing
//! is padded, and what a text sees does not depend on what lies beside it.
//!
//! The bits of a text are those of the text alone: its products and sums are of its own tokens, in an order that follows from
//! their number.

use super::super::Execution;
use super::super::division::{Shared, divide};
use super::head::{self, Head, Mask};

/// The shape of such an attention; there is no backward pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FullAttention<'a> {
    /// Tokens of each text.
    pub(crate) lengths: &'a [usize],
    pub(crate) heads: usize,
    /// Values of a head.
    pub(crate) size: usize,
}

impl FullAttention<'_> {
    /// From `[tokens, 3 * width]`, queries beside keys beside values, to `[tokens, width]`. Scores are divided by the square
    /// root of a head's size.
    ///
    /// # Panics
    /// If there are not as many tokens as the texts have.
    pub(crate) fn compute(&self, execution: Execution, projected: &[f32]) -> Vec<f32> {
        let width = self.heads * self.size;
        let tokens: usize = self.lengths.iter().sum();
        assert_eq!(projected.len(), tokens * 3 * width, "tokens of the texts");
        let mut result = vec![0.0; tokens * width];
        let windows = self.windows();
        let worth: usize = windows
            .iter()
            .map(|(_, length)| head::worth(*length, self.size))
            .sum();
        let shared = Shared::new(&mut result);
        // By heads, so that two threads get equal parts of each text, however different those are.
        divide(execution, self.heads, worth, 1, |heads| {
            for index in heads {
                for (first, length) in &windows {
                    let head = Head {
                        mask: Mask::Full,
                        context: *length,
                        width,
                        size: self.size,
                        scale: head::scale(self.size),
                        first: *first,
                        column: index * self.size,
                    };
                    // SAFETY: each head of each text is there once.
                    unsafe { head.attend(execution, projected, &shared) };
                }
            }
        });
        result
    }

    /// The first token and the length of each text that has tokens.
    fn windows(&self) -> Vec<(usize, usize)> {
        let mut first = 0;
        let window = |length: &usize| {
            let window = (first, *length);
            first += length;
            window
        };
        self.lengths
            .iter()
            .map(window)
            .filter(|(_, length)| *length > 0)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::execution::all_executions;
    use crate::kernels::test_values::{bits, normal, relative_error};

    /// One text in `f64`, as the definition words it.
    fn reference(projected: &[f32], heads: usize, size: usize) -> Vec<f64> {
        let width = heads * size;
        let tokens = projected.len() / (3 * width);
        let value = |token: usize, which: usize, column: usize| {
            f64::from(projected[(token * 3 + which) * width + column])
        };
        let mut result = vec![0.0; tokens * width];
        for (head, query) in (0..heads).flat_map(|head| (0..tokens).map(move |q| (head, q))) {
            let columns = head * size..(head + 1) * size;
            let score = |key: usize| {
                let products = columns
                    .clone()
                    .map(|column| value(query, 0, column) * value(key, 1, column));
                products.sum::<f64>() / (size as f64).sqrt()
            };
            let powers: Vec<f64> = (0..tokens).map(|key| score(key).exp()).collect();
            let sum: f64 = powers.iter().sum();
            for column in columns.clone() {
                let seen = (0..tokens).map(|key| powers[key] / sum * value(key, 2, column));
                result[query * width + column] = seen.sum();
            }
        }
        result
    }

    #[test]
    fn each_text_is_seen_as_it_is_alone_on_every_path() {
        let (heads, size) = (3, 10);
        // Enough work for two threads.
        let lengths = [1, 40, 0, 7, 33, 300];
        let row = 3 * heads * size;
        let tokens: usize = lengths.iter().sum();
        let projected = normal("projected", tokens * row, 1.0);
        let attention = FullAttention {
            lengths: &lengths,
            heads,
            size,
        };
        let mut seen = None;
        for execution in all_executions() {
            let together = attention.compute(execution, &projected);
            let mut first = 0;
            for length in &lengths {
                let (from, to) = (first, first + length);
                let alone = &projected[from * row..to * row];
                let found = &together[from * heads * size..to * heads * size];
                assert!(relative_error(found, &reference(alone, heads, size)) < 1e-5);
                let attention = FullAttention {
                    lengths: &[*length],
                    ..attention
                };
                let alone = attention.compute(execution, alone);
                assert_eq!(bits(found), bits(&alone), "{length}, {execution:?}");
                first = to;
            }
            let found = bits(&together);
            assert!(
                *seen.get_or_insert_with(|| found.clone()) == found,
                "{execution:?}"
            );
        }
    }
}
