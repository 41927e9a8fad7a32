//! Panics of code that is not ours, as failures of what called it.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Does something, or says with which words it panicked. What the work was changing must not be used again after that.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        text.unwrap_or("it said nothing").to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_panic_said_is_kept() {
        assert_eq!(caught(|| 7), Ok(7));
        assert_eq!(caught(|| panic!("at once")), Err::<(), _>("at once".into()));
        let number = 7;
        assert_eq!(
            caught(|| panic!("at {number}")),
            Err::<(), _>("at 7".into())
        );
        let silent = caught(|| std::panic::panic_any(7_u8));
        assert_eq!(silent, Err::<(), _>("it said nothing".into()));
    }
}
