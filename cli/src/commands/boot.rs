//! `hull boot`: a bare microVM of the user's own kernel.

use hull_sandbox::bare::{self, BareConfig};
use hull_sandbox::config::ConfigError;
use hull_sandbox::host::Host;
use hull_vmm_api::config::MAX_CPUS;

use crate::args::Boot;
use crate::{Outcome, mounts, terminal};

pub(super) fn run(args: Boot, host: &Host) -> Outcome {
    let cpus = u8::try_from(args.cpus).unwrap_or(u8::MAX);
    if cpus == 0 || cpus > MAX_CPUS {
        return Err(ConfigError::Cpus(cpus).into());
    }
    let config = BareConfig {
        kernel: args.kernel,
        initrd: args.initrd,
        disks: args.disk.iter().map(|text| mounts::disk(text)).collect::<Result<_, _>>()?,
        cmdline: args.cmdline,
        cpus,
        memory_mib: args.memory,
        input: args.console,
    };
    let raw_mode = if args.console && terminal::is_interactive() { Some(terminal::RawMode::enter()?) } else { None };
    let exit = bare::run(host, &config)?;
    drop(raw_mode);
    if exit.orderly { Ok(0) } else { Err(format!("the virtual machine {}", exit.reason).into()) }
}
