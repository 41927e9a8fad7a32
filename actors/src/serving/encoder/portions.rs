//! Which texts of a batch are computed at once: as many as a processor's memory nearby has room for, so that a large batch takes
//! no more memory than a small one, and no longer a text.

use std::ops::Range;

/// What the widest values of the tokens of a portion may take: they stay in a third-level cache beside a layer's weights.
const BYTES_MAX: usize = 4 << 20;

/// How many tokens may be computed at once, where the network is `width` wide at its widest.
pub(super) fn tokens_at_once(width: usize) -> usize {
    (BYTES_MAX / size_of::<f32>() / width.max(1)).max(1)
}

/// Neighbouring texts that have `tokens_max` tokens together at the most, or one text that has more by itself.
pub(super) fn portions(lengths: &[usize], tokens_max: usize) -> Vec<Range<usize>> {
    let mut portions: Vec<Range<usize>> = Vec::new();
    let mut tokens = 0;
    for (text, length) in lengths.iter().enumerate() {
        match portions.last_mut() {
            Some(portion) if tokens + length <= tokens_max => {
                portion.end = text + 1;
                tokens += length;
            }
            _ => {
                portions.push(text..text + 1);
                tokens = *length;
            }
        }
    }
    portions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_text_is_in_one_portion_that_is_full_or_the_last() {
        assert_eq!(
            portions(&[3, 4, 1, 9, 2, 2, 8], 8),
            [0..3, 3..4, 4..6, 6..7]
        );
        assert_eq!(portions(&[8, 9], 8), [0..1, 1..2]);
        assert!(portions(&[], 8).is_empty());
    }

    #[test]
    fn a_wide_network_computes_fewer_tokens_at_once() {
        assert_eq!(tokens_at_once(1536), 682);
        assert_eq!(tokens_at_once(3072), 341);
        assert_eq!(tokens_at_once(usize::MAX), 1);
    }
}
