//! `hull stats`: what containers use, as the guest's cgroups and the VMM say.

use hull_sandbox::container::Process;
use hull_sandbox::control::{Control, Request, Response};
use hull_sandbox::host::Host;
use hull_sandbox::registry::{Phase, Record, Registry};
use serde::Serialize;

use crate::args::Stats;
use crate::{Error, Outcome, output};

#[derive(Debug, Serialize)]
struct Row {
    id: String,
    name: Option<String>,
    cpu_usage_us: u64,
    memory_usage_bytes: u64,
    memory_of_vm_bytes: u64,
    /// What the guest keeps of the host's memory.
    guest_resident_bytes: u64,
    pids: u64,
}

pub(super) fn run(args: &Stats, host: &Host) -> Outcome {
    let registry = super::registry(host);
    let records = if args.containers.is_empty() {
        let mut records = registry.list()?;
        records.retain(|record| record.phase == Phase::Running);
        records
    } else {
        args.containers.iter().map(|name| super::find_running(&registry, name)).collect::<Result<_, _>>()?
    };
    let runtime = super::runtime()?;
    let rows =
        records.iter().map(|record| runtime.block_on(row(&registry, record))).collect::<Result<Vec<Row>, Error>>()?;
    if args.json {
        output::json(&rows)?;
        return Ok(0);
    }
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.id.clone(),
                row.name.clone().unwrap_or_default(),
                format!("{:.3} s", row.cpu_usage_us as f64 / 1e6),
                output::bytes(row.memory_usage_bytes),
                output::bytes(row.memory_of_vm_bytes),
                output::bytes(row.guest_resident_bytes),
                row.pids.to_string(),
            ]
        })
        .collect();
    output::table(&["ID", "NAME", "CPU TIME", "MEMORY", "OF", "RESIDENT", "PIDS"], &cells)?;
    Ok(0)
}

async fn row(registry: &Registry, record: &Record) -> Result<Row, Error> {
    let agent = super::connect(registry, record).await?;
    let stats = Process::init(&agent, &record.id).stats().await?;
    let vm = agent.stats().await?;
    let mut control = Control::connect(&registry.dir(&record.id).join("control.sock"))?;
    let guest_resident_bytes = match control.call(&Request::Counters)? {
        Response::Counters(counters) => counters.guest_resident_bytes,
        _ => 0,
    };
    Ok(Row {
        id: record.id.clone(),
        name: record.name.clone(),
        cpu_usage_us: stats.cpu.usage_usec,
        memory_usage_bytes: stats.memory.usage_bytes,
        memory_of_vm_bytes: vm.memory_total_bytes,
        guest_resident_bytes,
        pids: stats.pids.current,
    })
}
