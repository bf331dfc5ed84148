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
    let process = process(&record, &args.process, args.command, &registry.root(&record))?;
    let user = guest_user(&record, &args.process);
    let process: oci_spec::runtime::Process = serde_json::from_value(process)?;
    let streams = super::run::streams(&args.process)?;
    super::runtime()?.block_on(async {
        let mut signals = Signals::new()?;
        let agent = super::connect(&registry, &record).await?;
        let exec_id = super::run::random_id()?;
        let (process, connections) = Process::exec(&agent, &record.id, &exec_id, &process, streams, &user).await?;
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
    if let Some(user) = options.user.as_ref().filter(|_| record.guest_user.is_none()) {
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
    let given = |variable: &String| variable == "HOME" || variable.starts_with("HOME=");
    if record.guest_user.is_some() && options.user.is_some() && !options.env.iter().any(given) {
        // The guest finds that of the other user.
        env.retain(|variable| !variable.starts_with("HOME="));
    }
    process["env"] = env.into();
    Ok(process)
}

/// Whom the guest is to look up: the one that is asked for, or whom the container runs as. Nobody where that is the host's to do.
fn guest_user(record: &Record, options: &ProcessOptions) -> String {
    let own = record.guest_user.as_ref();
    own.map(|own| options.user.as_ref().unwrap_or(own).clone()).unwrap_or_default()
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
    fn whom_the_guest_looks_up_the_host_does_not() {
        let options = |user: Option<&str>| ProcessOptions {
            interactive: false,
            tty: false,
            env: Vec::new(),
            workdir: None,
            user: user.map(str::to_owned),
        };
        assert_eq!(guest_user(&record(), &options(Some("web"))), "");
        let in_guest = Record { guest_user: Some("www:log".to_owned()), ..record() };
        assert_eq!(guest_user(&in_guest, &options(None)), "www:log");
        assert_eq!(guest_user(&in_guest, &options(Some("web"))), "web");
        let process =
            process(&in_guest, &options(Some("web")), vec!["true".to_owned()], Path::new("/nowhere")).unwrap();
        assert_eq!((&process["user"], &process["env"]), (&record().process["user"], &json!([])));
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
