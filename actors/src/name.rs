//! Names of models and endpoints: parts of URLs, file names and table keys.

use mobula_core::error::Rejection;

/// The longest name, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// The rule, for errors.
pub(crate) const RULE: &str =
    "use 1 to 64 letters, digits, `-`, `_` and `.`, and begin with none of `.` and `-`";

/// Whether `name` can name a model or an endpoint. One that begins with a dot would be a step in a
/// path, one that begins with a hyphen an option on a command line.
pub(crate) fn is_valid(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(is_plain)
        && !name.starts_with(['.', '-'])
}

/// Refuses a name that is none; `what` it should name begins with an article.
pub(crate) fn check(what: &str, name: &str) -> Result<(), Rejection> {
    if is_valid(name) {
        return Ok(());
    }
    let shown: String = name.chars().take(NAME_BYTES_MAX).collect();
    Err(Rejection::invalid(format!(
        "`{shown}` cannot name {what}: {RULE}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_in_paths_and_urls() {
        for name in ["digits", "Digits-2.1_b", "0", &"x".repeat(64)] {
            assert!(is_valid(name), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            ".x",
            "-x",
            "a/b",
            "a b",
            "ä",
            &"x".repeat(65),
        ] {
            assert!(!is_valid(name), "{name}");
        }
        let error = check("a model", "..").unwrap_err();
        assert!(
            error
                .message
                .starts_with("`..` cannot name a model: use 1 to 64"),
            "{error}"
        );
    }
}
