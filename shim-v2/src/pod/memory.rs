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

/// What a pod has of memory, and what its containers may have of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Budget {
    /// Of the machine, in MiB.
    pub(super) machine_mib: u64,
    /// What of that is for the guest itself, in MiB.
    pub(super) overhead_mib: u64,
    /// The sum of the other containers' limits.
    pub(super) others_bytes: u64,
}

impl Budget {
    /// Whether the machine can honour the change of a limit. It cannot grow, and who raises a limit counts on memory that is not there where
    /// all limits come to more than it has. One that was too large from the start was taken, as a limit above what a node has is.
    ///
    /// # Errors
    ///
    /// Says what the machine has.
    pub(super) fn check(self, before: Limit, after: Limit) -> Result<()> {
        let Self { machine_mib, overhead_mib, others_bytes } = self;
        let (Some(before), Some(after)) = (before, after) else { return Ok(()) };
        let all_mib = others_bytes.saturating_add(after).div_ceil(MIB);
        if after <= before || all_mib.saturating_add(overhead_mib) <= machine_mib {
            return Ok(());
        }
        Err(Error::State(format!(
            "the pod's virtual machine has {machine_mib} MiB of memory, {overhead_mib} of them for the guest itself, and cannot grow to \
             limits of {all_mib} MiB in all; create the pod anew with them"
        )))
    }
}

impl Pod {
    /// Whether the pod's machine can honour another limit of a container.
    ///
    /// # Errors
    ///
    /// Says what the machine has.
    pub(super) fn check_memory(&self, container_id: &str, after: Limit) -> Result<()> {
        let state = self.lock();
        let Some(size) = &state.size else { return Ok(()) };
        let others = state.containers.iter().filter(|(id, _)| *id != container_id);
        let budget = Budget {
            machine_mib: size.memory_mib,
            overhead_mib: self.settings.pod.overhead_mib.value.get(),
            others_bytes: others.filter_map(|(_, container)| container.memory_limit).fold(0, u64::saturating_add),
        };
        budget.check(state.container(container_id)?.memory_limit, after)
    }

    /// Gives the VMM the lowest OOM score adjustment of the pod's containers. It is left alone where none has one.
    pub(super) fn rank_for_oom(&self) {
        let (pid, score) = {
            let state = self.lock();
            let scores = state.containers.values().filter(|container| !container.init.is_virtual());
            let Some(score) = scores.filter_map(|container| container.oom_score_adj).min() else { return };
            let Some(vm) = state.vm.as_ref().filter(|vm| !vm.has_ended()) else { return };
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
    fn limits_are_not_raised_above_what_the_machine_has() {
        let budget = Budget { machine_mib: 224, overhead_mib: 96, others_bytes: 64 * MIB };
        let refused = budget.check(Some(64 * MIB), Some(65 * MIB)).unwrap_err().to_string();
        assert!(refused.contains("224 MiB") && refused.contains("129 MiB in all"), "{refused}");
        for (before, after) in [
            (Some(32 * MIB), Some(64 * MIB)),
            (Some(64 * MIB), None),
            (None, Some(4096 * MIB)),
            (Some(8192 * MIB), Some(8192 * MIB)),
            (Some(8192 * MIB), Some(4096 * MIB)),
        ] {
            budget.check(before, after).unwrap();
        }
    }
}
