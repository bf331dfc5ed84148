//! `hull ps`: lists containers.

use std::time::{SystemTime, UNIX_EPOCH};

use hull_sandbox::host::Host;
use hull_sandbox::registry::{Phase, Record};

use crate::args::Ps;
use crate::{Outcome, output};

pub(super) fn run(args: &Ps, host: &Host) -> Outcome {
    let mut records = super::registry(host).list()?;
    records.retain(|record| args.all || record.phase != Phase::Exited);
    if args.json {
        output::json(&records)?;
        return Ok(0);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let rows: Vec<Vec<String>> = records.iter().map(|record| row(record, now)).collect();
    output::table(&["ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS", "CPUS", "MEMORY"], &rows)?;
    Ok(0)
}

fn row(record: &Record, now: u64) -> Vec<String> {
    vec![
        record.id.clone(),
        record.name.clone().unwrap_or_default(),
        record.image.clone(),
        shortened(&record.command.join(" ")),
        output::ago(now.saturating_sub(record.created_at_s)),
        status(record),
        record.cpus.to_string(),
        format!("{} MiB", record.memory_mib),
    ]
}

/// The phase in words.
pub(super) fn status(record: &Record) -> String {
    match (record.phase, record.exit_code) {
        (Phase::Created, _) => "starting".to_owned(),
        (Phase::Running, _) => "running".to_owned(),
        (Phase::Exited, Some(code)) => format!("exited ({code})"),
        (Phase::Exited, None) => "failed".to_owned(),
    }
}

fn shortened(text: &str) -> String {
    const MAX_CHARS: usize = 32;
    let printable: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if printable.chars().count() <= MAX_CHARS {
        return printable;
    }
    printable.chars().take(MAX_CHARS - 1).chain(['…']).collect()
}
