//! The agent's errors as gRPC codes; the only place where that happens.

use ttrpc::Code;

use crate::error::Error;

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Invalid { .. } => Code::INVALID_ARGUMENT,
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::Exists(_) => Code::ALREADY_EXISTS,
            Error::State(_) => Code::FAILED_PRECONDITION,
            Error::TimedOut(_) => Code::DEADLINE_EXCEEDED,
            Error::Failed { .. } if error.is_full() => Code::RESOURCE_EXHAUSTED,
            Error::Failed { .. } => Code::INTERNAL,
        };
        tracing::debug!("answer {code:?}: {error}");
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, error))
    }
}
