//! Limits that mean something else in a guest than on the host.

use oci_spec::runtime::LinuxResources;

/// Takes out what names the host's CPUs, nodes and pages, and what the guest's cgroups (version 2) have no control for.
pub(crate) fn fit(resources: &mut LinuxResources) {
    if let Some(cpu) = resources.cpu_mut() {
        // Numbers of the host's CPUs and memory nodes.
        cpu.set_cpus(None);
        cpu.set_mems(None);
        cpu.set_realtime_period(None);
        cpu.set_realtime_runtime(None);
    }
    if let Some(memory) = resources.memory_mut() {
        memory.set_swappiness(None);
        memory.set_kernel(None);
        memory.set_kernel_tcp(None);
    }
    // CRI sets a limit of 0 for every size that the host has.
    let pages = resources.hugepage_limits().iter().flatten().filter(|limit| limit.limit() > 0).cloned().collect();
    resources.set_hugepage_limits(Some(pages));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_limits_that_hold_in_a_guest_are_left() {
        let mut resources: LinuxResources = serde_json::from_value(json!({
            "cpu": { "shares": 512, "quota": 1000, "period": 2000, "cpus": "40-43", "mems": "1" },
            "memory": { "limit": 16777216, "swappiness": 60 },
            "hugepageLimits": [{ "pageSize": "2MB", "limit": 0 }, { "pageSize": "1GB", "limit": 5 }],
        }))
        .unwrap();
        fit(&mut resources);
        assert_eq!(
            serde_json::to_value(resources).unwrap(),
            json!({
                "cpu": { "shares": 512, "quota": 1000, "period": 2000 },
                "memory": { "limit": 16777216 },
                "hugepageLimits": [{ "pageSize": "1GB", "limit": 5 }],
            })
        );
    }
}
