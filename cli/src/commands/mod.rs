//! One file per verb.

mod boot;
mod check;
mod config;
mod disk;
mod exec;
mod image;
mod inspect;
mod kill;
mod logs;
mod ps;
mod pull;
mod rm;
mod run;
mod stats;
mod stop;

use std::path::Path;

use hull_sandbox::agent::Agent;
use hull_sandbox::host::Host;
use hull_sandbox::registry::{Phase, Record, Registry};
use hull_settings::Settings;

use crate::args::{Args, Verb};
use crate::{Error, Outcome};

/// Does what the command line says.
pub(crate) fn run(args: Args) -> Outcome {
    let host = Host::discover()?;
    match args.verb {
        Verb::Run(args) => {
            let settings = Settings::load()?;
            let host = settings.host(host);
            run::run(*args, host, &settings)
        }
        Verb::Exec(args) => exec::run(args, &host),
        Verb::Ps(args) => ps::run(&args, &host),
        Verb::Kill(args) => kill::run(&args, &host),
        Verb::Stop(args) => stop::run(&args, &host),
        Verb::Rm(args) => rm::run(&args, &host),
        Verb::Logs(args) => logs::run(&args, &host),
        Verb::Stats(args) => stats::run(&args, &host),
        Verb::Inspect(args) => inspect::run(&args, &host),
        Verb::Image(args) => image::run(args, &host),
        Verb::Disk(args) => disk::run(&args, &host),
        Verb::Check(args) => check::run(&args, host),
        Verb::Config(args) => config::run(&args, host),
        Verb::Boot(args) => boot::run(args, &Settings::load()?.host(host)),
    }
}

fn registry(host: &Host) -> Registry {
    Registry::new(&host.state_dir, &host.data_dir)
}

/// A runtime on this one thread: what hull does is wait.
fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// The record of a container that must be running.
fn find_running(registry: &Registry, reference: &str) -> Result<Record, Error> {
    let record = registry.find(reference)?;
    match record.phase {
        Phase::Running => Ok(record),
        Phase::Created => Err(format!("the container {reference} is still starting; try again in a moment").into()),
        Phase::Exited => Err(format!("the container {reference} does not run any more; `hull ps -a` shows it").into()),
    }
}

async fn connect(registry: &Registry, record: &Record) -> Result<Agent, Error> {
    let socket = registry.dir(&record.id).join("vsock.sock");
    Ok(Agent::connect(&socket).await?.0)
}

/// Does something to each of several containers; goes on after a failure, which is said at once.
fn for_each(references: &[String], mut act: impl FnMut(&str) -> Result<(), Error>) -> Outcome {
    let mut code = 0;
    for reference in references {
        match act(reference) {
            Ok(()) => println!("{reference}"),
            Err(error) => {
                eprintln!("hull: {error}");
                code = crate::FAILED;
            }
        }
    }
    Ok(code)
}

/// Reads a signal's name, with or without `SIG`, or number.
fn parse_signal(text: &str) -> Result<u32, Error> {
    let wrong = || format!("{text} is no signal; use a name such as TERM or a number from 1 to 64");
    if let Ok(number) = text.parse::<u32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err(wrong().into()) };
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    let signal: nix::sys::signal::Signal = name.parse().map_err(|_| wrong())?;
    Ok(signal as u32)
}

/// `path` made absolute against the current directory, links resolved.
fn absolute(path: &Path) -> Result<std::path::PathBuf, Error> {
    std::fs::canonicalize(path).map_err(|error| format!("{}: {error}; it must exist", path.display()).into())
}

#[cfg(test)]
mod tests {
    use super::parse_signal;

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["TERM", "sigterm", "SIGTERM", "15"] {
            assert_eq!(parse_signal(text).unwrap(), 15, "{text}");
        }
        for text in ["", "0", "65", "-1", "NOPE"] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }
}
