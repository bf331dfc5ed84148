//! `linux.resources` of an OCI specification as writes to a cgroup's files, at creation and at an update alike.
//!
//! What version 2 of cgroups has no counterpart for is refused by name. The conversions from version 1's units
//! are those of runc and crun, so that limits mean the same here as anywhere.

use std::io;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::Cgroup;
use crate::error::{Error, Result};

/// The period of a CPU quota that comes without one, in microseconds; also the kernel's default.
const DEFAULT_PERIOD_US: u64 = 100_000;
/// The bounds of `cpu.shares` of version 1.
const SHARES: std::ops::RangeInclusive<u64> = 2..=262_144;

/// A value for a file of the cgroup, and the field of the specification that asks for it.
#[derive(Debug, PartialEq, Eq)]
struct Write {
    file: String,
    value: String,
    field: String,
    /// Whether the kernel may lack the file, because the lack is as good as the limit.
    optional: bool,
}

impl Write {
    fn new(file: impl Into<String>, value: impl ToString, field: &str) -> Self {
        let field = format!("linux.resources.{field}");
        Self { file: file.into(), value: value.to_string(), field, optional: false }
    }
}

/// Sets or changes the limits that `resources` names and leaves all others alone. Rules for devices are not here but
/// in [`super::devices`].
pub(crate) fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    let cpu_max = cgroup.read("cpu.max").unwrap_or_default();
    let writes = plan(resources, &cpu_max)?;
    if let Some(memory) = resources.memory() {
        check_before_update(cgroup, memory)?;
    }
    for write in writes {
        match cgroup.write(&write.file, &write.value) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound && write.optional => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::invalid(write.field, format!("the guest's kernel has no {}", write.file)));
            }
            // What makes no sense, is out of range, or names a device that is not there.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ERANGE | libc::ENODEV)) => {
                return Err(Error::invalid(write.field, format!("the kernel refuses {:?}: {error}", write.value)));
            }
            Err(error) => {
                return Err(Error::failed(format!("{}: write {}", write.field, write.file), error.to_string()));
            }
        }
    }
    Ok(())
}

/// `memory.checkBeforeUpdate`: whether a limit below the present use is refused rather than enforced by killing.
fn check_before_update(cgroup: &Cgroup, memory: &LinuxMemory) -> Result<()> {
    let (Some(true), Some(limit)) = (memory.check_before_update(), memory.limit()) else {
        return Ok(());
    };
    let usage: i64 = cgroup.read("memory.current").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    if limit > 0 && usage > limit {
        return Err(Error::invalid("linux.resources.memory.limit", format!("{usage} bytes are in use")));
    }
    Ok(())
}

fn plan(resources: &LinuxResources, cpu_max: &str) -> Result<Vec<Write>> {
    let mut writes = Vec::new();
    if let Some(cpu) = resources.cpu() {
        plan_cpu(cpu, cpu_max, &mut writes)?;
    }
    if let Some(memory) = resources.memory() {
        plan_memory(memory, &mut writes)?;
    }
    if let Some(pids) = resources.pids() {
        match pids.limit() {
            0 => {}
            limit => writes.push(Write::new("pids.max", limit_or_max(limit), "pids.limit")),
        }
    }
    if let Some(block_io) = resources.block_io() {
        plan_block_io(block_io, &mut writes)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        plan_hugepages(limit, &mut writes)?;
    }
    let network = resources.network().as_ref();
    let class_id = network.and_then(|network| network.class_id()).unwrap_or(0);
    if class_id != 0 || network.is_some_and(|network| network.priorities().iter().flatten().next().is_some()) {
        return Err(Error::invalid("linux.resources.network", "cgroup version 2 has no such control"));
    }
    if resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
        return Err(Error::invalid("linux.resources.rdma", "the guest has no such devices"));
    }
    if let Some(unified) = resources.unified() {
        let mut sorted: Vec<_> = unified.iter().collect();
        sorted.sort();
        for (file, value) in sorted {
            plan_unified(file, value, &mut writes)?;
        }
    }
    Ok(writes)
}

fn plan_cpu(cpu: &LinuxCpu, cpu_max: &str, writes: &mut Vec<Write>) -> Result<()> {
    if cpu.realtime_runtime().is_some_and(|runtime| runtime != 0)
        || cpu.realtime_period().is_some_and(|period| period != 0)
    {
        return Err(Error::invalid("linux.resources.cpu.realtimeRuntime", "cgroup version 2 has no such control"));
    }
    if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
        writes.push(Write::new("cpuset.cpus", cpus, "cpu.cpus"));
    }
    if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
        writes.push(Write::new("cpuset.mems", mems, "cpu.mems"));
    }
    // An idle cgroup has no weight, so idleness is set first and taken back first.
    if let Some(idle) = cpu.idle() {
        writes.push(Write::new("cpu.idle", idle, "cpu.idle"));
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && cpu.idle() != Some(1)) {
        writes.push(Write::new("cpu.weight", weight_of_shares(shares), "cpu.shares"));
    }
    let burst = cpu.burst().map(|burst| Write::new("cpu.max.burst", burst, "cpu.burst"));
    if cpu.quota().is_some_and(|quota| quota != 0) || cpu.period().is_some_and(|period| period != 0) {
        let mut present = cpu_max.split_whitespace();
        let present_quota = present.next().unwrap_or("max").to_owned();
        let present_period = present.next().and_then(|period| period.parse().ok()).unwrap_or(DEFAULT_PERIOD_US);
        let quota = match cpu.quota() {
            None | Some(0) => present_quota,
            Some(quota) => limit_or_max(quota),
        };
        let period = cpu.period().filter(|period| *period != 0).unwrap_or(present_period);
        writes.push(Write::new("cpu.max", format!("{quota} {period}"), "cpu.quota"));
    }
    writes.extend(burst);
    Ok(())
}

/// Version 1's shares as version 2's weight: the least, the default and the most of one are those of the other, with
/// a smooth curve through the three, as runc has done since its 1.3.2.
fn weight_of_shares(shares: u64) -> u64 {
    if shares <= *SHARES.start() {
        return 1;
    }
    if shares >= *SHARES.end() {
        return 10_000;
    }
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    10_f64.powf(exponent).ceil() as u64
}

fn plan_memory(memory: &LinuxMemory, writes: &mut Vec<Write>) -> Result<()> {
    let unsupported = [
        ("kernel", memory.kernel().is_some_and(|kernel| kernel > 0)),
        ("kernelTCP", memory.kernel_tcp().is_some_and(|kernel| kernel > 0)),
        ("swappiness", memory.swappiness().is_some()),
        ("disableOOMKiller", memory.disable_oom_killer() == Some(true)),
    ];
    for (field, asked) in unsupported {
        if asked {
            return Err(Error::invalid(
                format!("linux.resources.memory.{field}"),
                "cgroup version 2 has no such control",
            ));
        }
    }
    // Swap first where both shrink or grow is not needed: version 2 counts them apart.
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
        let value = match (swap, memory.limit()) {
            (..0, _) => "max".to_owned(),
            (swap, Some(limit)) if limit > 0 && swap >= limit => (swap - limit).to_string(),
            (_, Some(limit)) if limit > 0 => {
                return Err(Error::invalid("linux.resources.memory.swap", "is less than the memory limit"));
            }
            _ => return Err(Error::invalid("linux.resources.memory.swap", "needs a memory limit")),
        };
        // A kernel without swap keeps any limit of it.
        writes.push(Write { optional: true, ..Write::new("memory.swap.max", value, "memory.swap") });
    }
    if let Some(limit) = memory.limit().filter(|limit| *limit != 0) {
        writes.push(Write::new("memory.max", limit_or_max(limit), "memory.limit"));
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        writes.push(Write::new("memory.low", limit_or_max(reservation), "memory.reservation"));
    }
    Ok(())
}

fn plan_block_io(block_io: &LinuxBlockIo, writes: &mut Vec<Write>) -> Result<()> {
    if block_io.leaf_weight().is_some_and(|weight| weight != 0) {
        return Err(Error::invalid("linux.resources.blockIO.leafWeight", "cgroup version 2 has no such control"));
    }
    // 10 to 1,000 in version 1 with 500 in the middle, 1 to 10,000 with 100 in version 2.
    let weight_of = |weight: u16| 1 + (u64::from(weight).saturating_sub(10)) * 9999 / 990;
    if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
        writes.push(Write::new("io.weight", format!("default {}", weight_of(weight)), "blockIO.weight"));
    }
    for device in block_io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let value = format!("{}:{} {}", device.major(), device.minor(), weight_of(weight));
            writes.push(Write::new("io.weight", value, "blockIO.weightDevice"));
        }
    }
    let throttles: [(&Option<Vec<LinuxThrottleDevice>>, &str, &str); 4] = [
        (block_io.throttle_read_bps_device(), "rbps", "blockIO.throttleReadBpsDevice"),
        (block_io.throttle_write_bps_device(), "wbps", "blockIO.throttleWriteBpsDevice"),
        (block_io.throttle_read_iops_device(), "riops", "blockIO.throttleReadIOPSDevice"),
        (block_io.throttle_write_iops_device(), "wiops", "blockIO.throttleWriteIOPSDevice"),
    ];
    for (devices, key, field) in throttles {
        for device in devices.iter().flatten() {
            let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
            let value = format!("{}:{} {key}={rate}", device.major(), device.minor());
            writes.push(Write::new("io.max", value, field));
        }
    }
    Ok(())
}

fn plan_hugepages(limit: &LinuxHugepageLimit, writes: &mut Vec<Write>) -> Result<()> {
    let size = limit.page_size();
    if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(Error::invalid("linux.resources.hugepageLimits.pageSize", format!("{size:?} is not a size")));
    }
    let value = limit_or_max(limit.limit());
    writes.push(Write::new(format!("hugetlb.{size}.max"), &value, "hugepageLimits"));
    let reserved = Write::new(format!("hugetlb.{size}.rsvd.max"), value, "hugepageLimits");
    writes.push(Write { optional: true, ..reserved });
    Ok(())
}

/// Any file of the cgroup by its name, except those that decide over processes and children instead of resources.
fn plan_unified(file: &str, value: &str, writes: &mut Vec<Write>) -> Result<()> {
    let plain = file.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    let (controller, rest) = file.split_once('.').unwrap_or((file, ""));
    if !plain || rest.is_empty() || controller.is_empty() || controller == "cgroup" {
        return Err(Error::invalid("linux.resources.unified", format!("{file:?} is not the name of a limit")));
    }
    // Several lines are several settings, of several devices for instance.
    for line in value.lines() {
        writes.push(Write::new(file, line, &format!("unified[{file}]")));
    }
    Ok(())
}

/// A limit of the specification, where any negative number stands for none.
fn limit_or_max(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.to_string() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn planned(json: &str, cpu_max: &str) -> Result<Vec<(String, String)>> {
        let writes = plan(&serde_json::from_str(json).unwrap(), cpu_max)?;
        Ok(writes.into_iter().map(|write| (write.file, write.value)).collect())
    }

    fn one(json: &str) -> (String, String) {
        let mut writes = planned(json, "").unwrap();
        assert_eq!(writes.len(), 1, "{writes:?}");
        writes.remove(0)
    }

    fn refused(json: &str) -> String {
        match planned(json, "") {
            Err(Error::Invalid { field, .. }) => field.into_owned(),
            other => panic!("{other:?}"),
        }
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn limits_become_their_files() {
        assert_eq!(one(r#"{"memory":{"limit":1048576}}"#), pair("memory.max", "1048576"));
        assert_eq!(one(r#"{"memory":{"limit":-1}}"#), pair("memory.max", "max"));
        assert_eq!(one(r#"{"pids":{"limit":7}}"#), pair("pids.max", "7"));
        assert_eq!(one(r#"{"cpu":{"cpus":"0-1"}}"#), pair("cpuset.cpus", "0-1"));
        assert_eq!(one(r#"{"unified":{"memory.oom.group":"1"}}"#), pair("memory.oom.group", "1"));
        let throttle = r#"{"blockIO":{"throttleReadBpsDevice":[{"major":253,"minor":0,"rate":1000}]}}"#;
        assert_eq!(one(throttle), pair("io.max", "253:0 rbps=1000"));
    }

    #[test]
    fn swap_is_counted_without_the_memory() {
        let writes = planned(r#"{"memory":{"limit":100,"swap":300}}"#, "").unwrap();
        assert_eq!(writes, [pair("memory.swap.max", "200"), pair("memory.max", "100")]);
        assert_eq!(refused(r#"{"memory":{"limit":100,"swap":50}}"#), "linux.resources.memory.swap");
        assert_eq!(one(r#"{"memory":{"swap":-1}}"#), pair("memory.swap.max", "max"));
    }

    #[test]
    fn half_a_quota_keeps_the_other_half() {
        let quota = r#"{"cpu":{"quota":20000}}"#;
        assert_eq!(planned(quota, "max 50000\n").unwrap(), [pair("cpu.max", "20000 50000")]);
        let period = r#"{"cpu":{"period":200000}}"#;
        assert_eq!(planned(period, "10000 100000\n").unwrap(), [pair("cpu.max", "10000 200000")]);
        assert_eq!(one(r#"{"cpu":{"quota":-1,"period":100000}}"#), pair("cpu.max", "max 100000"));
    }

    #[test]
    fn shares_keep_their_default_and_bounds() {
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(1024), 100);
        assert_eq!(weight_of_shares(262_144), 10_000);
        assert_eq!(weight_of_shares(u64::MAX), 10_000);
    }

    #[test]
    fn what_version_2_lacks_is_refused_by_name() {
        assert_eq!(refused(r#"{"memory":{"disableOOMKiller":true}}"#), "linux.resources.memory.disableOOMKiller");
        assert_eq!(refused(r#"{"memory":{"swappiness":10}}"#), "linux.resources.memory.swappiness");
        assert_eq!(refused(r#"{"cpu":{"realtimeRuntime":5}}"#), "linux.resources.cpu.realtimeRuntime");
        assert_eq!(refused(r#"{"network":{"classID":5}}"#), "linux.resources.network");
        assert_eq!(refused(r#"{"unified":{"cgroup.procs":"1"}}"#), "linux.resources.unified");
        assert_eq!(refused(r#"{"unified":{"../memory.max":"1"}}"#), "linux.resources.unified");
    }

    proptest! {
        #[test]
        fn more_shares_never_weigh_less(shares in 0_u64..300_000, more in 0_u64..300_000) {
            let (low, high) = (weight_of_shares(shares), weight_of_shares(shares + more));
            prop_assert!(low <= high && (1..=10_000).contains(&low));
        }
    }
}
