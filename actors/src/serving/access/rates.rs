//! So many requests a second with each token that has a limit.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::state::Token;
use crate::serving::guard::rate::RateLimiter;
use crate::serving::oip::OipError;

/// The limiters of an endpoint's tokens; never more than it has tokens, and one.
#[derive(Debug, Default)]
pub struct TokenRates {
    limiters: Mutex<BTreeMap<String, RateLimiter>>,
}

impl TokenRates {
    /// Takes a request with the token of this name, if there are not too many.
    ///
    /// # Errors
    /// [`OipError::TokenRateLimited`].
    pub fn admit(&self, tokens: &[Token], name: &str, now_ms: u64) -> Result<(), OipError> {
        let token = tokens.iter().find(|token| token.name == name);
        let Some(per_second) = token.and_then(|token| token.per_second) else {
            return Ok(());
        };
        // Whole after every single update, so a panic elsewhere does not spoil it.
        let mut limiters = self.limiters.lock().unwrap_or_else(PoisonError::into_inner);
        if limiters.len() > tokens.len() {
            limiters.retain(|known, _| tokens.iter().any(|token| token.name == *known));
        }
        let limiter = limiters
            .entry(name.to_owned())
            .or_insert_with(|| RateLimiter::new(per_second, now_ms));
        if limiter.per_second() != per_second {
            *limiter = RateLimiter::new(per_second, now_ms);
        }
        limiter
            .take(now_ms)
            .map_err(|retry_after_ms| OipError::TokenRateLimited {
                token: name.to_owned(),
                per_second,
                retry_after_ms,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(name: &str, per_second: Option<u32>) -> Token {
        Token {
            name: name.to_owned(),
            hash: [0; 32],
            created_ms: 0,
            expires_ms: None,
            per_second,
        }
    }

    #[test]
    fn each_token_has_a_limit_of_its_own() {
        let rates = TokenRates::default();
        let tokens = [token("a", Some(2)), token("b", Some(1)), token("c", None)];
        let taken = |name: &str| {
            (0..5)
                .filter(|_| rates.admit(&tokens, name, 0).is_ok())
                .count()
        };
        assert_eq!((taken("a"), taken("b"), taken("c")), (2, 1, 5));
        let error = rates.admit(&tokens, "a", 0).unwrap_err();
        assert_eq!(error.status(), 429);
        assert!(error.to_string().contains("token \"a\""), "{error}");
        assert!(rates.admit(&tokens, "a", 500).is_ok());
    }

    #[test]
    fn limiters_of_tokens_that_are_gone_are_forgotten() {
        let rates = TokenRates::default();
        for round in 0..100 {
            let tokens = [token(&format!("t{round}"), Some(1))];
            assert!(rates.admit(&tokens, &tokens[0].name, 0).is_ok());
        }
        assert!(rates.limiters.lock().unwrap().len() <= 2);
    }
}
