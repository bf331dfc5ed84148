//! `containerd-shim-hull-v2`: Hull as a containerd runtime.
//!
//! ```text
//! containerd ── start ──▶ this program, for a moment: starts the daemon, prints its address
//!            ── ttrpc ──▶ the daemon, one per pod: serves tasks and the sandbox until the pod is gone
//!            ── delete ─▶ this program, for a moment: clears what a dead daemon left
//! ```
//!
//! The daemon is one thread. All it knows of sandboxes is `hull_sandbox`, and what it adds is containerd's language:
//! requests ([`task`], [`sandbox`]), events ([`events`]), streams ([`streams`]), specifications ([`spec`]) and errors ([`error`]).
#![forbid(unsafe_code)]

mod annotations;
mod bootstrap;
mod clear;
mod connections;
mod daemon;
mod error;
mod events;
mod flags;
mod launch;
mod live;
mod memory;
mod orphans;
mod pod;
mod process;
mod rootfs;
mod sandbox;
mod spec;
mod stats;
mod streams;
mod task;
mod vm;

#[allow(missing_docs, clippy::all, clippy::pedantic, unused, unreachable_pub, rustdoc::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/generated.rs"));
}

use std::io::Write;
use std::process::ExitCode;

use flags::Flags;

/// Trouble that ends the program; containerd shows it to people.
type Trouble = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let outcome = flags::parse(std::env::args().skip(1)).map_err(Trouble::from).and_then(|flags| run(&flags));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The reader may have gone.
            let _ = writeln!(std::io::stderr(), "containerd-shim-hull-v2: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Result<(), Trouble> {
    if flags.version {
        return print(format!("containerd-shim-hull-v2:\n  Version: {}\n", env!("CARGO_PKG_VERSION")).as_bytes());
    }
    if flags.info {
        return print(&launch::info()?);
    }
    match flags.action.as_str() {
        "start" => print(&launch::start(flags)?),
        "delete" => print(&clear::delete(flags)?),
        "" if !flags.pod.is_empty() => daemon::run(flags),
        "" => Err("this program is run by containerd; see docs/containerd.md".into()),
        other => Err(format!("there is no action {other}; there are start and delete").into()),
    }
}

/// Prints for containerd, which takes everything on standard output for the answer.
fn print(bytes: &[u8]) -> Result<(), Trouble> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes)?;
    Ok(stdout.flush()?)
}
