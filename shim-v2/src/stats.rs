//! A container's statistics as containerd wants them: those of a cgroup of version 2.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use hull_protocol::agent::{ContainerStatsResponse, Pressure, PressureLine};
use protobuf::MessageField;

/// Most devices that a container's I/O is told of; a guest has a handful.
const MAX_DEVICES: usize = 64;

/// Translates what the guest says.
pub(crate) fn metrics(stats: &ContainerStatsResponse) -> Metrics {
    let memory = stats.memory.get_or_default();
    let stat = |key: &str| memory.stat.get(key).copied().unwrap_or(0);
    let event = |key: &str| memory.events.get(key).copied().unwrap_or(0);
    let cpu = stats.cpu.get_or_default();
    let pids = stats.pids.get_or_default();
    let io = stats.io.iter().take(MAX_DEVICES).map(|io| IOEntry {
        major: io.major.into(),
        minor: io.minor.into(),
        rbytes: io.read_bytes,
        wbytes: io.write_bytes,
        rios: io.reads,
        wios: io.writes,
        ..Default::default()
    });
    Metrics {
        pids: MessageField::some(PidsStat { current: pids.current, limit: pids.limit, ..Default::default() }),
        cpu: MessageField::some(CPUStat {
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
            nr_periods: cpu.nr_periods,
            nr_throttled: cpu.nr_throttled,
            throttled_usec: cpu.throttled_usec,
            psi: pressure(&cpu.pressure),
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: stat("anon"),
            file: stat("file"),
            kernel_stack: stat("kernel_stack"),
            slab: stat("slab"),
            sock: stat("sock"),
            shmem: stat("shmem"),
            file_mapped: stat("file_mapped"),
            file_dirty: stat("file_dirty"),
            file_writeback: stat("file_writeback"),
            anon_thp: stat("anon_thp"),
            inactive_anon: stat("inactive_anon"),
            active_anon: stat("active_anon"),
            inactive_file: stat("inactive_file"),
            active_file: stat("active_file"),
            unevictable: stat("unevictable"),
            slab_reclaimable: stat("slab_reclaimable"),
            slab_unreclaimable: stat("slab_unreclaimable"),
            pgfault: stat("pgfault"),
            pgmajfault: stat("pgmajfault"),
            workingset_refault: stat("workingset_refault_anon").saturating_add(stat("workingset_refault_file")),
            workingset_activate: stat("workingset_activate_anon").saturating_add(stat("workingset_activate_file")),
            workingset_nodereclaim: stat("workingset_nodereclaim"),
            pgrefill: stat("pgrefill"),
            pgscan: stat("pgscan"),
            pgsteal: stat("pgsteal"),
            pgactivate: stat("pgactivate"),
            pgdeactivate: stat("pgdeactivate"),
            pglazyfree: stat("pglazyfree"),
            pglazyfreed: stat("pglazyfreed"),
            thp_fault_alloc: stat("thp_fault_alloc"),
            thp_collapse_alloc: stat("thp_collapse_alloc"),
            usage: memory.usage_bytes,
            usage_limit: memory.limit_bytes,
            swap_usage: memory.swap_usage_bytes,
            swap_limit: memory.swap_limit_bytes,
            max_usage: memory.peak_bytes,
            psi: pressure(&memory.pressure),
            ..Default::default()
        }),
        io: MessageField::some(IOStat { usage: io.collect(), ..Default::default() }),
        memory_events: MessageField::some(MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            oom_group_kill: event("oom_group_kill"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// What is left to say of a container whose machine is gone.
pub(crate) fn last(ran_out_of_memory: bool) -> Metrics {
    let memory_events = MemoryEvents { oom_kill: ran_out_of_memory.into(), ..Default::default() };
    Metrics { memory_events: MessageField::some(memory_events), ..metrics(&ContainerStatsResponse::default()) }
}

fn pressure(pressure: &MessageField<Pressure>) -> MessageField<PSIStats> {
    let Some(pressure) = pressure.as_ref() else { return MessageField::none() };
    MessageField::some(PSIStats { some: line(&pressure.some), full: line(&pressure.full), ..Default::default() })
}

fn line(line: &MessageField<PressureLine>) -> MessageField<PSIData> {
    let Some(line) = line.as_ref() else { return MessageField::none() };
    let percent = |hundredths: u32| f64::from(hundredths) / 100.0;
    MessageField::some(PSIData {
        avg10: percent(line.avg10),
        avg60: percent(line.avg60),
        avg300: percent(line.avg300),
        total: line.total_usec,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use hull_protocol::agent::{CpuStats, MemoryStats};

    use super::*;

    #[test]
    fn what_the_kubelet_reads_is_filled() {
        let memory = MemoryStats {
            usage_bytes: 10,
            limit_bytes: u64::MAX,
            stat: [("anon", 1), ("inactive_file", 2), ("pgfault", 3), ("pgmajfault", 4)]
                .map(|(key, value)| (key.to_owned(), value))
                .into(),
            events: [("oom_kill".to_owned(), 5)].into(),
            ..Default::default()
        };
        let some = PressureLine { avg10: 1234, total_usec: 7, ..Default::default() };
        let cpu = CpuStats {
            usage_usec: 6,
            pressure: MessageField::some(Pressure { some: MessageField::some(some), ..Default::default() }),
            ..Default::default()
        };
        let stats = ContainerStatsResponse {
            cpu: MessageField::some(cpu),
            memory: MessageField::some(memory),
            ..Default::default()
        };
        let metrics = metrics(&stats);
        let memory = &metrics.memory;
        assert_eq!((memory.usage, memory.usage_limit, memory.anon, memory.inactive_file), (10, u64::MAX, 1, 2));
        assert_eq!((memory.pgfault, memory.pgmajfault, metrics.memory_events.oom_kill), (3, 4, 5));
        assert_eq!(metrics.cpu.usage_usec, 6);
        assert_eq!((metrics.cpu.psi.some.avg10, metrics.cpu.psi.some.total), (12.34, 7));
        assert!(metrics.cpu.psi.full.is_none());
    }

    #[test]
    fn a_guest_that_says_nothing_has_zeros() {
        assert_eq!(metrics(&ContainerStatsResponse::default()).memory.usage, 0);
        assert_eq!((last(true).memory_events.oom_kill, last(false).memory_events.oom_kill), (1, 0));
    }
}
