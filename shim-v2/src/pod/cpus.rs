//! How many of the guest's CPUs are online, as containers and their limits come, change and go.

use oci_spec::runtime::LinuxResources;

use super::Pod;
use crate::annotations::Size;
use crate::error::Result;

/// A container's limit of CPU time, in thousandths of a CPU; `None` where it has none.
pub(super) type Limit = Option<u64>;

/// The limit that `resources` set, or `Err` where they leave it as it is.
pub(super) fn limit(resources: &LinuxResources) -> std::result::Result<Limit, Unchanged> {
    let cpu = resources.cpu().as_ref().ok_or(Unchanged)?;
    match (cpu.quota(), cpu.period().filter(|period| *period > 0)) {
        (None, _) => Err(Unchanged),
        // Linux's period where none is set: Documentation/admin-guide/cgroup-v2.rst, cpu.max.
        (Some(quota), period) => Ok(u64::try_from(quota)
            .ok()
            .filter(|quota| *quota > 0)
            .map(|quota| (u128::from(quota) * 1000).div_ceil(period.unwrap_or(100_000).into()))
            .map(|thousandths| u64::try_from(thousandths).unwrap_or(u64::MAX))),
    }
}

/// Resources that say nothing of CPU time.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unchanged;

/// How many CPUs a pod of this size needs: enough for the sum of its containers' limits, and at least as many as every pod of its
/// kind has; with a container that has no limit, at least as many as at boot.
fn needed(size: &Size, limits: impl Iterator<Item = Limit>) -> u8 {
    let mut thousandths = 0_u64;
    let mut least = size.base_cpus;
    for limit in limits {
        match limit {
            Some(limit) => thousandths = thousandths.saturating_add(limit),
            None => least = size.cpus,
        }
    }
    let cpus = u8::try_from(thousandths.div_ceil(1000)).unwrap_or(u8::MAX);
    cpus.max(least).clamp(1, size.max_cpus)
}

impl Pod {
    /// Has as many CPUs online in the guest as the containers' limits need now, and none taken offline unless `may_shrink`: as long
    /// as containers are still coming, the pod was given what all of them need.
    ///
    /// # Errors
    ///
    /// Fails where the guest does not answer or cannot switch a CPU.
    pub(super) async fn fit_cpus(&self, may_shrink: bool) -> Result<()> {
        // Of two changes at once the last must see both limits.
        let mut online = self.cpus_online.lock().await;
        let (vm, wanted, now) = {
            let state = self.lock();
            let (Some(vm), Some(size)) = (state.vm.clone(), state.size.as_ref()) else { return Ok(()) };
            let limits = state.containers.values().filter(|container| !container.init.is_virtual());
            (vm, needed(size, limits.map(|container| container.cpu_limit)), online.unwrap_or(size.cpus))
        };
        if wanted == now || (wanted < now && !may_shrink) {
            return Ok(());
        }
        let now = match vm.agent().online_cpus(wanted.into()).await {
            Ok(now) => now,
            Err(error) => return Err(vm.explain(error).await),
        };
        tracing::info!(wanted, now, "CPUs are online");
        *online = Some(wanted);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn size(base_cpus: u8, cpus: u8, max_cpus: u8) -> Size {
        Size {
            base_cpus,
            cpus,
            max_cpus,
            memory_mib: 512,
            kernel_params: String::new(),
            block_cache: Default::default(),
        }
    }

    #[test]
    fn the_sum_of_the_limits_is_rounded_up_within_the_pods_bounds() {
        let size = size(1, 2, 4);
        let needs = |limits: &[Limit]| needed(&size, limits.iter().copied());
        assert_eq!(needs(&[]), 1);
        assert_eq!(needs(&[Some(500), Some(400)]), 1);
        assert_eq!(needs(&[Some(500), Some(501)]), 2);
        assert_eq!(needs(&[Some(1500), Some(1500)]), 3);
        assert_eq!(needs(&[Some(64_000)]), 4);
        assert_eq!(needs(&[Some(u64::MAX), Some(u64::MAX)]), 4);
    }

    #[test]
    fn a_container_without_a_limit_keeps_what_the_pod_had_at_boot() {
        let size = size(1, 2, 4);
        assert_eq!(needed(&size, [None, Some(100)].into_iter()), 2);
        assert_eq!(needed(&size, [None, Some(3000)].into_iter()), 3);
    }

    #[test]
    fn resources_set_lift_or_leave_the_limit() {
        let read = |value| limit(&serde_json::from_value(value).unwrap());
        assert_eq!(read(json!({})), Err(Unchanged));
        assert_eq!(read(json!({ "cpu": { "shares": 2 } })), Err(Unchanged));
        assert_eq!(read(json!({ "cpu": { "quota": 150_000, "period": 100_000 } })), Ok(Some(1500)));
        assert_eq!(read(json!({ "cpu": { "quota": 1, "period": 1_000_000 } })), Ok(Some(1)));
        assert_eq!(read(json!({ "cpu": { "quota": 200_000, "period": 0 } })), Ok(Some(2000)));
        assert_eq!(read(json!({ "cpu": { "quota": -1 } })), Ok(None));
        assert_eq!(read(json!({ "cpu": { "quota": 0 } })), Ok(None));
        assert_eq!(read(json!({ "cpu": { "quota": i64::MAX, "period": 1 } })), Ok(Some(u64::MAX)));
    }
}
