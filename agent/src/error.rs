//! What goes wrong in the agent, by what the caller can do about it. `server::status` turns these into gRPC codes.

use std::borrow::Cow;
use std::error::Error as StdError;

pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The request, or a field of a specification in it, cannot be honoured.
    #[error("{field}: {reason}")]
    Invalid { field: Cow<'static, str>, reason: String },
    #[error("no such {0}")]
    NotFound(String),
    #[error("{0} exists already")]
    Exists(String),
    /// The state of the container or process does not allow the request.
    #[error("{0}")]
    State(String),
    /// Something that the request waited for did not happen in time.
    #[error("{0}: timed out")]
    TimedOut(String),
    /// A step on the way failed.
    #[error("{step}: {cause}")]
    Failed { step: Cow<'static, str>, cause: String },
}

impl Error {
    pub(crate) fn invalid(field: impl Into<Cow<'static, str>>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }

    pub(crate) fn failed(step: impl Into<Cow<'static, str>>, cause: impl Into<String>) -> Self {
        Self::Failed { step: step.into(), cause: cause.into() }
    }

    /// Whether a file system or a quota is full. libcontainer's processes tell of that in words.
    pub(crate) fn is_full(&self) -> bool {
        let words = ["No space left on device", "Disk quota exceeded"];
        matches!(self, Self::Failed { cause, .. } if words.iter().any(|word| cause.contains(word)))
    }
}

/// A cause with the reasons behind it, which can be long and are in the form for programmers. What the system said comes first, because
/// messages are cut on their way.
pub(crate) fn with_reasons(cause: &str, reasons: &str) -> String {
    let said = reasons.rsplit_once("message: \"").and_then(|(_, rest)| rest.split('"').next());
    match said.filter(|said| !cause.contains(said)) {
        _ if reasons.is_empty() => cause.to_owned(),
        Some(said) => format!("{said}: {cause} ({reasons})"),
        None => format!("{cause} ({reasons})"),
    }
}

/// Names the step that an error comes from.
pub(crate) trait Step<T> {
    fn step(self, step: &'static str) -> Result<T>;
    /// As [`Step::step`], where the name is put together only if it is needed.
    fn step_with(self, step: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: StdError> Step<T> for std::result::Result<T, E> {
    fn step(self, step: &'static str) -> Result<T> {
        self.map_err(|error| Error::failed(step, chain(&error)))
    }

    fn step_with(self, step: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::failed(step(), chain(&error)))
    }
}

/// An error with everything behind it, since some errors name only their own step.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let cause = source.to_string();
        // Many errors print their source themselves.
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn what_the_system_said_comes_first_whatever_was_collected() {
        let reasons = format!("prepare: err={:?}", std::io::Error::from_raw_os_error(28));
        let cause = with_reasons("create", &reasons);
        assert!(cause.starts_with("No space left on device: create (prepare: err=Os { code: 28,"), "{cause}");
        assert!(Error::failed("step", cause).is_full());
        assert_eq!(with_reasons("create", ""), "create");
        assert_eq!(with_reasons("create", "no more is known"), "create (no more is known)");
        assert!(!Error::failed("step", "create").is_full());
    }

    #[test]
    fn a_failed_step_names_itself_and_every_cause_once() {
        let result: std::result::Result<(), _> = Err(Outer(std::io::Error::other("inner")));
        assert_eq!(result.step("mount").unwrap_err().to_string(), "mount: outer: inner");
        let result: std::result::Result<(), _> = Err(std::io::Error::other("inner"));
        assert_eq!(result.step("mount").unwrap_err().to_string(), "mount: inner");
    }
}
