//! `hull exec`: another program in a running container.

use hull_sandbox::container::Process;
use hull_sandbox::host::Host;
use hull_sandbox::registry::Record;
use serde_json::{Value, json};

use crate::args::{Exec, ProcessOptions};
use crate::streams::Attach;
use crate::supervise::{Signals, attend};
use crate::{Error, Outcome};

pub(super) fn run(args: Exec, host: &Host) -> Outcome {
    let registry = super::registry(host);
    let record = super::find_running(&registry, &args.container)?;
    let process = process(&record, &args.process, args.command)?;
    let process: oci_spec::runtime::Process = serde_json::from_value(process)?;
    let streams = super::run::streams(&args.process)?;
    super::runtime()?.block_on(async {
        let mut signals = Signals::new()?;
        let agent = super::connect(&registry, &record).await?;
        let exec_id = super::run::random_id()?;
        let (process, connections) = Process::exec(&agent, &record.id, &exec_id, &process, streams).await?;
        let code = attend(&process, connections, streams, Attach::Own, None, &mut signals).await?;
        // The process has ended and its status is known; an agent that keeps its record does no harm.
        if let Err(error) = process.remove().await {
            tracing::debug!("not removed: {error}");
        }
        Ok(code)
    })
}

/// The container's own `process` with what the options change.
fn process(record: &Record, options: &ProcessOptions, command: Vec<String>) -> Result<Value, Error> {
    let mut process = record.process.clone();
    process["args"] = command.into();
    process["terminal"] = options.tty.into();
    if let Some(workdir) = &options.workdir {
        process["cwd"] = workdir.as_str().into();
    }
    let mut env: Vec<String> = serde_json::from_value(process["env"].clone())?;
    super::run::apply_env(&mut env, &options.env);
    process["env"] = env.into();
    if let Some(user) = &options.user {
        let (uid, gid) = numeric_user(user)?;
        process["user"] = json!({ "uid": uid, "gid": gid });
        if uid != 0 {
            process["capabilities"]["effective"] = json!([]);
            process["capabilities"]["permitted"] = json!([]);
        } else {
            let bounding = process["capabilities"]["bounding"].clone();
            process["capabilities"]["effective"] = bounding.clone();
            process["capabilities"]["permitted"] = bounding;
        }
    }
    Ok(process)
}

/// Only the container's owner sees its files, so names cannot be looked up from here.
fn numeric_user(user: &str) -> Result<(u32, u32), Error> {
    let (uid, gid) = user.split_once(':').unwrap_or((user, "0"));
    match (uid.parse(), gid.parse()) {
        (Ok(uid), Ok(gid)) => Ok((uid, gid)),
        _ => Err(format!("{user}: exec takes users by number only: UID or UID:GID").into()),
    }
}
