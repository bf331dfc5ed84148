//! The `hull` command: containers in virtual machines of their own, without a daemon.
//!
//! `commands` has one file per verb. The process of a `hull run` owns its sandbox (`supervise`); every other verb reads the
//! registry and talks to the sandbox's sockets.
#![forbid(unsafe_code)]

mod args;
mod capabilities;
mod commands;
mod dns;
pub mod image;
mod log;
mod mounts;
mod output;
mod spec;
mod streams;
mod supervise;
mod terminal;
mod ulimit;

use std::process::ExitCode;

use clap::Parser;

/// Exit status for Hull's own failures, as podman and docker have it.
pub(crate) const FAILED: u8 = 125;

/// Any error of a verb; its text is the one line that the user sees.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
/// What a verb ends with: the process's exit status.
pub(crate) type Outcome = Result<u8, Error>;

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let args = match args::Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Help and version are no failures, though clap reports them as errors.
            let code = if error.use_stderr() { FAILED } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let level = if args.debug { "debug" } else { "warn" };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(level)
        .without_time()
        .with_target(false)
        .init();
    match commands::run(args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("hull: {}", one_line(&error.to_string()));
            ExitCode::from(FAILED)
        }
    }
}

fn one_line(message: &str) -> String {
    message.split('\n').map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}
