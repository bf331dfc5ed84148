//! `hull logs`: prints what a container printed.

use hull_sandbox::host::Host;

use crate::args::Logs;
use crate::{Outcome, log, supervise};

pub(super) fn run(args: &Logs, host: &Host) -> Outcome {
    let record = super::registry(host).find(&args.container)?;
    let path = supervise::log_path(host, &record.id);
    if !path.exists() {
        return Err(format!("{} has no log: containers started with --rm keep none", args.container).into());
    }
    log::print(&path, args.timestamps, &mut std::io::stdout().lock(), &mut std::io::stderr().lock())?;
    Ok(0)
}
