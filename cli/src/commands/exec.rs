//! `hull exec`: another program in a running container.

use std::path::Path;

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
    let root = registry.root(&record);
    let process = process(&record, &args.process, args.command, &root)?;
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

/// The container's own `process` with what the options change. Users are looked up in the container's root.
fn process(record: &Record, options: &ProcessOptions, command: Vec<String>, root: &Path) -> Result<Value, Error> {
    let mut process = record.process.clone();
    process["args"] = command.into();
    process["terminal"] = options.tty.into();
    if let Some(workdir) = &options.workdir {
        process["cwd"] = workdir.as_str().into();
    }
    let mut env: Vec<String> = serde_json::from_value(process["env"].clone())?;
    super::run::apply_env(&mut env, &options.env);
    if let Some(user) = &options.user {
        let user = crate::image::user::resolve(user, &[root.to_owned()])?;
        process["user"] = json!({ "uid": user.uid, "gid": user.gid, "additionalGids": user.additional_gids });
        let has_home = options.env.iter().any(|variable| variable == "HOME" || variable.starts_with("HOME="));
        if !has_home {
            super::run::apply_env(&mut env, &[format!("HOME={}", user.home)]);
        }
        if user.uid != 0 {
            process["capabilities"]["effective"] = json!([]);
            process["capabilities"]["permitted"] = json!([]);
        } else {
            let bounding = process["capabilities"]["bounding"].clone();
            process["capabilities"]["effective"] = bounding.clone();
            process["capabilities"]["permitted"] = bounding;
        }
    }
    process["env"] = env.into();
    Ok(process)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        serde_json::from_value(json!({
            "id": "a", "name": null, "phase": "running", "created_at_s": 0, "owner_pid": 1, "vmm_pid": null,
            "image": "", "command": [], "cpus": 1, "memory_mib": 64, "terminal": false, "stop_signal": 15,
            "exit_code": null, "failure": null,
            "process": { "env": ["HOME=/root"], "user": { "uid": 0, "gid": 0 }, "capabilities": { "bounding": ["CAP_KILL"] } },
        }))
        .unwrap()
    }

    fn as_user(user: &str, env: &[&str], root: &Path) -> Result<Value, Error> {
        let options = ProcessOptions {
            interactive: false,
            tty: false,
            env: env.iter().map(ToString::to_string).collect(),
            workdir: None,
            user: Some(user.to_owned()),
        };
        process(&record(), &options, vec!["true".to_owned()], root)
    }

    fn root() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/passwd"), "web:x:33:44::/srv:\n").unwrap();
        std::fs::write(dir.path().join("etc/group"), "web:x:44:\nlog:x:4:web\n").unwrap();
        dir
    }

    #[test]
    fn a_user_is_whom_the_containers_files_name() {
        let root = root();
        let process = as_user("web", &[], root.path()).unwrap();
        assert_eq!(process["user"], json!({ "uid": 33, "gid": 44, "additionalGids": [4] }));
        assert_eq!(process["env"], json!(["HOME=/srv"]));
        assert_eq!(process["capabilities"]["effective"], json!([]));
        let process = as_user("0:log", &["HOME=/mine"], root.path()).unwrap();
        assert_eq!(process["user"], json!({ "uid": 0, "gid": 4, "additionalGids": [] }));
        assert_eq!(process["env"], json!(["HOME=/mine"]));
        assert_eq!(process["capabilities"]["effective"], json!(["CAP_KILL"]));
        assert!(as_user("nobody", &[], root.path()).unwrap_err().to_string().contains("`nobody`"));
    }

    #[test]
    fn links_in_a_container_do_not_lead_to_the_hosts_users() {
        let root = root();
        let passwd = root.path().join("etc/passwd");
        for target in ["/etc/passwd", "../../../../../../../../etc/passwd", "/proc/1/root/etc/passwd"] {
            std::fs::remove_file(&passwd).unwrap();
            std::os::unix::fs::symlink(target, &passwd).unwrap();
            assert!(as_user("daemon", &[], root.path()).is_err(), "{target}");
        }
    }
}
