//! What a user's `main` returned, as the end of its driver.
//!
//! Invariants:
//! 1. An error of the cluster is recognized however it is wrapped, as long as its wrappers name it as
//!    their source. Whether it passes with another start decides; every other error is the program's
//!    own, and final.
//! 2. An error's text names what it stems from.

use std::any::Any;
use std::cell::Cell;
use std::error::Error as StdError;
use std::fmt::Display;
use std::io;
use std::iter::successors;

use mobula_core::error::CallError;
use mobula_core::object::ObjectError;
use serde::Serialize;

use crate::error::Error;

/// Errors that are looked through for one of the cluster, each the source of the one before. More are
/// none that somebody wrote: such a chain comes back to where it was.
const CAUSES_MAX: usize = 64;

/// What a user's main may return.
pub trait MainOutcome {
    /// How the job's `main` ended.
    fn into_outcome(self) -> MainEnd;
}

/// How a job's `main` ended. A program that knows better than its errors' types what another start
/// would come to may return this itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MainEnd {
    /// All went well; what it returned is the job's result.
    Completed {
        /// As JSON; `None` if it returned `()`.
        result_json: Option<String>,
    },
    /// It returned an error of its own: the job has failed, unless it asked for another try.
    Failed(String),
    /// The cluster did not do its part: the driver is started again, as its restart policy says.
    Unavailable(String),
}

impl MainOutcome for MainEnd {
    fn into_outcome(self) -> MainEnd {
        self
    }
}

impl MainOutcome for () {
    fn into_outcome(self) -> MainEnd {
        MainEnd::Completed { result_json: None }
    }
}

/// Of an error that need not be one for the standard library only [`Error`] and boxes are looked
/// through; `#[mobula::main]` knows more about its type.
impl<T: Serialize, E: Display + 'static> MainOutcome for Result<T, E> {
    fn into_outcome(self) -> MainEnd {
        end_of(self, |error| match as_error(&error) {
            Some(error) => failure(error),
            None => MainEnd::Failed(error.to_string()),
        })
    }
}

fn end_of<T: Serialize, E>(returned: Result<T, E>, failure: impl FnOnce(E) -> MainEnd) -> MainEnd {
    let value = match returned {
        Ok(value) => value,
        Err(error) => return failure(error),
    };
    match serde_json::to_value(&value) {
        // `()` is `null`, and nothing to store.
        Ok(serde_json::Value::Null) => MainEnd::Completed { result_json: None },
        Ok(value) => MainEnd::Completed {
            result_json: Some(value.to_string()),
        },
        Err(error) => MainEnd::Failed(format!("the result cannot be written as JSON: {error}")),
    }
}

/// The error that `error` is, or that lies in it as in a box.
fn as_error(error: &dyn Any) -> Option<&(dyn StdError + 'static)> {
    if let Some(error) = error.downcast_ref::<Error>() {
        return Some(error);
    }
    if let Some(error) = error.downcast_ref::<Box<dyn StdError + Send + Sync>>() {
        return Some(&**error);
    }
    if let Some(error) = error.downcast_ref::<Box<dyn StdError + Send>>() {
        return Some(&**error);
    }
    let error = error.downcast_ref::<Box<dyn StdError>>()?;
    Some(&**error)
}

fn failure(error: &(dyn StdError + 'static)) -> MainEnd {
    let text = text_of(error);
    let of_the_cluster = causes(error).find_map(|error| error.downcast_ref::<Error>());
    match of_the_cluster.is_some_and(may_pass_with_another_start) {
        true => MainEnd::Unavailable(text),
        false => MainEnd::Failed(text),
    }
}

/// An error, what it stems from, what that stems from, and so on.
fn causes<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    successors(Some(error), |&error| {
        // Such an error names the source of what was put into it, and not that itself.
        match error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
        {
            Some(inner) => Some(inner as &(dyn StdError + 'static)),
            None => error.source(),
        }
    })
    .take(CAUSES_MAX)
}

fn text_of(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error).skip(1) {
        let cause = cause.to_string();
        // Many errors say themselves what they stem from.
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// Whether a driver that ended with `error` may come further at its next start. That makes its
/// actors, tasks and objects anew, so what was lost with a node or a process counts too.
pub(crate) fn may_pass_with_another_start(error: &Error) -> bool {
    let is_lost = matches!(
        error,
        Error::Call(CallError::NodeLost { .. } | CallError::ObjectLost { .. })
            | Error::Object(
                ObjectError::Lost { .. }
                    | ObjectError::OwnerDied { .. }
                    | ObjectError::Unavailable { .. }
            )
    );
    is_lost || error.may_pass()
}

/// What `main` returned, for the code of `#[mobula::main]`: that asks `(&&&returned).end()`, and the
/// compiler takes the first of the three traits below that the type allows. There is no other way to
/// ask whether a type is an error, and only errors say what they stem from.
pub struct Returned<R>(Cell<Option<R>>);

impl<R> Returned<R> {
    /// What it returned.
    pub fn new(returned: R) -> Self {
        Returned(Cell::new(Some(returned)))
    }

    fn take(&self) -> R {
        self.0.take().expect("it is asked once")
    }
}

/// It returned an error.
pub trait EndOfError {
    /// How the job's `main` ended.
    fn end(&self) -> MainEnd;
}

impl<T: Serialize, E: StdError + 'static> EndOfError for &&Returned<Result<T, E>> {
    fn end(&self) -> MainEnd {
        end_of(self.take(), |error| failure(&error))
    }
}

/// It returned what holds an error, as boxes and reports do.
pub trait EndOfReport {
    /// How the job's `main` ended.
    fn end(&self) -> MainEnd;
}

impl<T: Serialize, E: AsRef<dyn StdError>> EndOfReport for &Returned<Result<T, E>> {
    fn end(&self) -> MainEnd {
        end_of(self.take(), |error| failure(error.as_ref()))
    }
}

/// It returned something else.
pub trait EndOfOther {
    /// How the job's `main` ended.
    fn end(&self) -> MainEnd;
}

impl<R: MainOutcome> EndOfOther for Returned<R> {
    fn end(&self) -> MainEnd {
        self.take().into_outcome()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::CallFailure;
    use mobula_core::error::{ErrorCode, Executed};

    fn no_leader() -> Error {
        Error::Control {
            operation: String::new(),
            code: ErrorCode::Unavailable,
            message: "there is no leader".into(),
            executed: Executed::No,
        }
    }

    fn refused() -> Error {
        Error::User("a word is missing".into())
    }

    #[derive(Debug, thiserror::Error)]
    enum Own {
        #[error("the first half")]
        Half(#[source] Error),
        #[error("both halves")]
        Both(#[from] Box<Own>),
        #[error("the second half: {0}")]
        Read(#[from] io::Error),
    }

    /// Holds an error and is none, as the reports of other crates.
    struct Report(Box<dyn StdError + Send + Sync>);

    impl AsRef<dyn StdError> for Report {
        fn as_ref(&self) -> &(dyn StdError + 'static) {
            &*self.0
        }
    }

    fn unavailable(text: &str) -> MainEnd {
        MainEnd::Unavailable(text.to_owned())
    }

    fn failed(text: &str) -> MainEnd {
        MainEnd::Failed(text.to_owned())
    }

    /// As the macro asks.
    macro_rules! end {
        ($returned:expr) => {
            (&&&Returned::new($returned)).end()
        };
    }

    #[test]
    fn an_error_of_the_cluster_is_seen_through_its_wrappers() {
        type Ended<E> = Result<(), E>;
        let ended: Ended<Error> = Err(no_leader());
        assert_eq!(end!(ended), unavailable("there is no leader"));
        let ended: Ended<Own> = Err(Own::Both(Box::new(Own::Half(no_leader()))));
        assert_eq!(
            end!(ended),
            unavailable("both halves: the first half: there is no leader")
        );
        let ended: Ended<Own> = Err(Own::Read(io::Error::other(no_leader())));
        assert_eq!(
            end!(ended),
            unavailable("the second half: there is no leader")
        );
        let ended: Ended<CallFailure<String>> = Err(CallFailure::System(no_leader()));
        assert_eq!(end!(ended), unavailable("there is no leader"));
        let ended: Ended<Box<dyn StdError>> = Err(Box::new(Own::Half(no_leader())));
        let text = "the first half: there is no leader";
        assert_eq!(end!(ended), unavailable(text));
        let ended: Ended<Box<dyn StdError + Send + Sync>> = Err(Box::new(Own::Half(no_leader())));
        assert_eq!(end!(ended), unavailable(text));
        let ended: Ended<Report> = Err(Report(Box::new(Own::Half(no_leader()))));
        assert_eq!(end!(ended), unavailable(text));
    }

    #[test]
    fn a_programs_own_error_is_final_and_other_ends_are_what_they_were() {
        let ended: Result<(), Own> = Err(Own::Half(refused()));
        assert_eq!(end!(ended), failed("the first half: a word is missing"));
        let ended: Result<(), String> = Err("no such file".to_owned());
        assert_eq!(end!(ended), failed("no such file"));
        let ended: Result<(), CallFailure<String>> = Err(CallFailure::User("odd".into()));
        assert_eq!(end!(ended), failed("odd"));
        let completed = |result_json: Option<&str>| MainEnd::Completed {
            result_json: result_json.map(ToOwned::to_owned),
        };
        let ended: Result<u8, Own> = Ok(7);
        assert_eq!(end!(ended), completed(Some("7")));
        let ended: Result<(), Report> = Ok(());
        assert_eq!(end!(ended), completed(None));
        assert_eq!(end!(()), completed(None));
        assert_eq!(end!(unavailable("later")), unavailable("later"));
    }

    #[test]
    fn what_was_lost_with_a_node_is_made_anew_by_another_start() {
        let lost = Error::Call(CallError::NodeLost {
            actor: "actor-1".into(),
            node: "node-1".into(),
            executed: Executed::Unknown,
        });
        assert!(may_pass_with_another_start(&lost));
        let panicked = Error::Call(CallError::Panicked("oh".into()));
        assert!(!may_pass_with_another_start(&panicked));
    }
}
