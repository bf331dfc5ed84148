//! What the pod's VM has of memory, and who loses it first where the host has too little.

use oci_spec::runtime::LinuxResources;

use super::Pod;
use crate::error::{Error, Result};

/// A container's limit of memory in bytes; `None` where it has none.
pub(super) type Limit = Option<u64>;

const MIB: u64 = 1 << 20;

/// The limit that `resources` set; `None` where they leave it as it is.
pub(super) fn limit(resources: &LinuxResources) -> Option<Limit> {
    let limit = resources.memory().as_ref()?.limit()?;
    // Below zero is none, and zero is the kernel's own word for nothing to set.
    if limit == 0 { None } else { Some(u64::try_from(limit).ok()) }
}

/// Whether a machine with `machine_mib` can honour the change of a limit. It cannot grow, and who raises a limit above what it has counts
/// on memory that is not there. One that was above it from the start was taken, as a limit above what a node has is.
///
/// # Errors
///
/// Says what the machine has.
pub(super) fn check_change(before: Limit, after: Limit, machine_mib: u64) -> Result<()> {
    match (before, after) {
        (Some(before), Some(after)) if after > before && after.div_ceil(MIB) > machine_mib => {
            Err(Error::State(format!(
                "the pod's virtual machine has {machine_mib} MiB of memory and cannot grow to a limit of {} MiB; create the pod anew with \
             that limit",
                after.div_ceil(MIB)
            )))
        }
        _ => Ok(()),
    }
}

impl Pod {
    /// Has the host's kernel value the VMM as what it holds: as the container of the pod that it would end last. Without a word of a
    /// container's it stays as it is.
    pub(super) fn rank_for_oom(&self) {
        let (pid, score) = {
            let state = self.lock();
            let scores = state.containers.values().filter(|container| !container.init.is_virtual());
            let Some(score) = scores.filter_map(|container| container.oom_score_adj).min() else { return };
            let Some(vm) = &state.vm else { return };
            (vm.pid(), score)
        };
        if let Err(error) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
            tracing::warn!("the VMM's OOM score adjustment cannot be {score}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Option<Limit> {
        limit(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn only_a_limit_that_is_named_is_a_change() {
        assert_eq!(of("{}"), None);
        assert_eq!(of(r#"{"memory":{}}"#), None);
        assert_eq!(of(r#"{"memory":{"limit":0}}"#), None);
        assert_eq!(of(r#"{"memory":{"limit":-1}}"#), Some(None));
        assert_eq!(of(r#"{"memory":{"limit":4096}}"#), Some(Some(4096)));
    }

    #[test]
    fn a_limit_is_not_raised_above_what_the_machine_has() {
        let refused = check_change(Some(64 * MIB), Some(4096 * MIB), 160).unwrap_err().to_string();
        assert!(refused.contains("160 MiB") && refused.contains("4096 MiB"), "{refused}");
        for (before, after) in [
            (Some(64 * MIB), Some(160 * MIB)),
            (Some(64 * MIB), None),
            (None, Some(4096 * MIB)),
            (Some(8192 * MIB), Some(8192 * MIB)),
            (Some(8192 * MIB), Some(4096 * MIB)),
        ] {
            check_change(before, after, 160).unwrap();
        }
    }
}
