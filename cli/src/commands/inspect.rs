//! `hull inspect`: all that is known of containers, live figures of the VM included.

use hull_sandbox::control::{Control, Request, Response};
use hull_sandbox::host::Host;
use hull_sandbox::registry::{Phase, Record, Registry};
use serde_json::{Value, json};

use crate::args::Inspect;
use crate::{Error, Outcome, output};

pub(super) fn run(args: &Inspect, host: &Host) -> Outcome {
    let registry = super::registry(host);
    let mut all = Vec::new();
    for reference in &args.containers {
        let record = registry.find(reference)?;
        let mut value = serde_json::to_value(&record)?;
        value["status"] = super::ps::status(&record).into();
        value["directory"] = registry.dir(&record.id).to_string_lossy().into();
        if record.phase == Phase::Running {
            value["vm"] = vm(&registry, &record).unwrap_or_else(|error| json!({ "error": error.to_string() }));
        }
        all.push(value);
    }
    output::json(&all)?;
    Ok(0)
}

fn vm(registry: &Registry, record: &Record) -> Result<Value, Error> {
    let mut control = Control::connect(&registry.dir(&record.id).join("control.sock"))?;
    let mut vm = json!({});
    if let Response::Status(status) = control.call(&Request::Status)? {
        vm["status"] = serde_json::to_value(status)?;
    }
    if let Response::Counters(counters) = control.call(&Request::Counters)? {
        vm["counters"] = serde_json::to_value(counters)?;
    }
    Ok(vm)
}
