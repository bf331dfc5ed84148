//! How libcontainer's first process becomes the container's program.

use std::collections::HashMap;

use libcontainer::workload::{ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use oci_spec::runtime::Spec;

use super::process;

/// Executes the program as any runtime does. libcontainer's own executor wants a PATH, takes for executable only what
/// everybody may execute, and leaves SIGPIPE ignored, as the Rust runtime has it.
#[derive(Clone)]
pub(super) struct Executor;

impl libcontainer::workload::Executor for Executor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        match spec.process() {
            Some(process) => Err(ExecutorError::Other(process::execute(process).to_string())),
            None => Err(ExecutorError::InvalidArg),
        }
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec.process().as_ref().ok_or(ExecutorValidationError::CantHandle("hull"))?;
        match process::find_program(process) {
            Ok(_) => Ok(()),
            Err(error) => Err(ExecutorValidationError::ArgValidationError(error.to_string())),
        }
    }

    /// The environment is handed over when the program is executed.
    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }
}
