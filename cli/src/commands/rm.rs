//! `hull rm`: removes what is left of containers.

use std::time::Duration;

use hull_sandbox::host::Host;
use hull_sandbox::registry::{Phase, RegistryError};

use crate::Outcome;
use crate::args::Rm;

pub(super) fn run(args: &Rm, host: &Host) -> Outcome {
    let registry = super::registry(host);
    let runtime = super::runtime()?;
    super::for_each(&args.containers, |reference| {
        let record = registry.find(reference)?;
        if record.phase != Phase::Exited {
            if !args.force {
                return Err(RegistryError::Running(reference.to_owned()).into());
            }
            runtime.block_on(super::stop::stop(&registry, &record, Duration::ZERO))?;
        }
        // With --rm its owner has removed it; there is nothing left to do then.
        match registry.find(&record.id) {
            Ok(_) => Ok(registry.remove(&record.id)?),
            Err(RegistryError::NotFound(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    })
}
