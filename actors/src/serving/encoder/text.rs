//! From a text to its tokens.
//!
//! Invariant: what a text costs is bounded before it is looked at, by the bytes that it may have and the characters of a
//! word that is cut into pieces. How many tokens it has, which is bounded too, shows only afterwards.
//!
//! Patterns of a tokenizer's own (`Replace`, `Split`) are not looked at, because tokenizers that are in use have some.
//! Those that look around or refer back can be slow; the library gives one up, for the rest of the text, after a million steps
//! back in the search for one place. Who registers a version answers for the rest: they may run programs anyway.

use serde::de::IgnoredAny;
use tokenizers::{ModelWrapper, Tokenizer};

use super::EncoderError;
use super::config::BertConfig;
use crate::panics::caught;
use crate::serving::signature::TEXT_BYTES_MAX;

/// The largest tokenizer: a vocabulary of some hundred thousand pieces.
pub(super) const TOKENIZER_BYTES_MAX: u64 = 16 << 20;

/// Characters of a word that WordPiece may cut into pieces; a longer word is one unknown token. It looks at every part of
/// what is left of a word for each of its pieces, and copies it: a text of 16 KiB that is one word takes minutes, of
/// words of 200 characters a fifth of a second. Files say 100 as a rule, and 200 where they follow Google's own.
const WORD_CHARACTERS_MAX: usize = 256;

/// The tokens of one text.
pub(super) struct Tokens {
    pub(super) ids: Vec<u32>,
    pub(super) type_ids: Vec<u32>,
}

/// The tokenizer of a model.
pub(super) struct TextReader {
    tokenizer: Tokenizer,
    positions: usize,
    truncates_to: Option<usize>,
}

impl TextReader {
    /// Reads a tokenizer, and refuses one whose tokens the model does not know.
    pub(super) fn read(bytes: &[u8], config: &BertConfig) -> Result<Self, EncoderError> {
        let unreadable =
            |reason: String| EncoderError::Tokenizer(format!("is no tokenizer: {reason}"));
        // The library panics on some files that end too early.
        serde_json::from_slice::<IgnoredAny>(bytes)
            .map_err(|error| unreadable(error.to_string()))?;
        let tokenizer = Tokenizer::from_bytes(bytes);
        let mut tokenizer = tokenizer.map_err(|error| unreadable(error.to_string()))?;
        if let ModelWrapper::WordPiece(pieces) = tokenizer.get_model()
            && pieces.max_input_chars_per_word > WORD_CHARACTERS_MAX
        {
            return Err(EncoderError::Tokenizer(format!(
                "cuts words of up to {} characters into pieces, the limit is {WORD_CHARACTERS_MAX}: lower \
                 max_input_chars_per_word of its model",
                pieces.max_input_chars_per_word
            )));
        }
        let vocabulary = tokenizer.get_vocab(true);
        let Some((token, largest)) = vocabulary.iter().max_by_key(|(_, id)| **id) else {
            return Err(EncoderError::Tokenizer("has no token".to_owned()));
        };
        let known = config.vocab_size;
        if *largest as usize >= known {
            return Err(EncoderError::Tokenizer(format!(
                "numbers {token:?} {largest}, the model knows {known} tokens, numbered from 0: take the two from one model"
            )));
        }
        let positions = config.max_position_embeddings;
        let truncates_to = tokenizer.get_truncation().map(|params| params.max_length);
        if let Some(length) = truncates_to.filter(|length| *length > positions) {
            return Err(EncoderError::Tokenizer(format!(
                "cuts texts off at {length} tokens, the model takes {positions}: lower max_length of its truncation"
            )));
        }
        // Nothing is padded here.
        tokenizer.with_padding(None);
        let reader = TextReader {
            tokenizer,
            positions,
            truncates_to,
        };
        // What is damaged further in shows only when it is used, and so does what a template adds to each text.
        let tokens = reader.tokens(b"a").map_err(|reason| {
            EncoderError::Tokenizer(format!("fails on the text \"a\": {reason}; save it again"))
        })?;
        for (what, numbers, known) in [
            ("tokens", &tokens.ids, config.vocab_size),
            ("types of tokens", &tokens.type_ids, config.type_vocab_size),
        ] {
            if let Some(number) = numbers.iter().find(|number| **number as usize >= known) {
                return Err(EncoderError::Tokenizer(format!(
                    "gives the text \"a\" the number {number}, the model knows {known} {what}, numbered from 0: take the two \
                     from one model"
                )));
            }
        }
        Ok(reader)
    }

    /// Tokens of a text, at most.
    pub(super) fn length_max(&self) -> usize {
        self.truncates_to.unwrap_or(self.positions)
    }

    /// The tokens of a text, or why it has none that the model takes.
    pub(super) fn tokens(&self, text: &[u8]) -> Result<Tokens, String> {
        // An endpoint takes no longer ones, but whoever asks the replica past it has to be refused here.
        if text.len() > TEXT_BYTES_MAX {
            return Err(format!(
                "the text has {} bytes, the limit is {TEXT_BYTES_MAX}: send a shorter one",
                text.len()
            ));
        }
        let text = std::str::from_utf8(text).map_err(|error| {
            let place = error.valid_up_to();
            format!("the text is not UTF-8 from byte {place} on: send it as UTF-8")
        })?;
        let not_taken = |error: String| format!("the tokenizer does not take the text: {error}");
        // The library panics on a template with a token that the file does not describe.
        let encoded = caught(|| self.tokenizer.encode_fast(text, true)).map_err(not_taken)?;
        let encoded = encoded.map_err(|error| not_taken(error.to_string()))?;
        let (count, limit) = (encoded.len(), self.positions);
        if count > limit {
            return Err(format!(
                "the text has {count} tokens, the limit is {limit}: send a shorter one, or register the model with a \
                 tokenizer.json that truncates"
            ));
        }
        if count == 0 {
            return Err("the text has no tokens: send one that is not empty".to_owned());
        }
        Ok(Tokens {
            ids: encoded.get_ids().to_vec(),
            type_ids: encoded.get_type_ids().to_vec(),
        })
    }
}
