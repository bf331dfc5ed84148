//! Whom a process runs as, where the host leaves it to the guest to look that up: the host does not read what is in such a root.

use std::path::Path;

use hull_protocol::user::resolve;
use oci_spec::runtime::{Capabilities, Process, User};

use super::rootfs;
use crate::error::{Error, Result};

/// Makes a process that of `wanted`, `USER[:GROUP]`, as the files below `root` know it; leaves it alone where nobody is wanted.
pub(super) fn apply(process: &mut Process, wanted: &str, root: &Path) -> Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    // What is not there, or is no file, names nobody.
    let read = |path: &str| rootfs::read(root, Path::new(path)).unwrap_or_default().into_bytes();
    let found = resolve(wanted, &read("etc/passwd"), &read("etc/group"));
    let found = found.map_err(|error| Error::invalid("user", error.to_string()))?;
    let mut user = User::default();
    user.set_uid(found.uid).set_gid(found.gid).set_additional_gids(Some(found.additional_gids));
    user.set_umask(process.user().umask());
    process.set_user(user);
    let mut env = process.env().clone().unwrap_or_default();
    if !env.iter().any(|variable| variable.starts_with("HOME=")) {
        env.push(format!("HOME={}", found.home));
        process.set_env(Some(env));
    }
    if let Some(mut capabilities) = process.capabilities().clone() {
        let held = match found.uid {
            0 => capabilities.bounding().clone(),
            _ => Some(Capabilities::new()),
        };
        capabilities.set_effective(held.clone()).set_permitted(held);
        process.set_capabilities(Some(capabilities));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn applied(wanted: &str, env: &[&str]) -> Result<Value> {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/passwd"), "root:x:0:0::/root:\nweb:x:33:44::/srv:\n").unwrap();
        std::fs::write(root.path().join("etc/group"), "log:x:4:web\n").unwrap();
        let mut process: Process = serde_json::from_value(json!({
            "args": ["true"], "cwd": "/", "env": env, "user": { "uid": 7, "gid": 7 },
            "capabilities": { "bounding": ["CAP_KILL"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"] },
        }))
        .unwrap();
        apply(&mut process, wanted, root.path())?;
        Ok(serde_json::to_value(process).unwrap())
    }

    #[test]
    fn a_user_is_whom_the_containers_files_name() {
        let process = applied("web", &["A=b"]).unwrap();
        assert_eq!(
            (&process["user"]["uid"], &process["user"]["gid"], &process["user"]["additionalGids"]),
            (&json!(33), &json!(44), &json!([4]))
        );
        assert_eq!(process["env"], json!(["A=b", "HOME=/srv"]));
        assert_eq!(
            (&process["capabilities"]["effective"], &process["capabilities"]["permitted"]),
            (&json!([]), &json!([]))
        );
    }

    #[test]
    fn root_holds_what_it_may_and_a_home_that_is_given_stays() {
        let process = applied("0", &["HOME=/mine"]).unwrap();
        assert_eq!((&process["user"]["uid"], &process["env"]), (&json!(0), &json!(["HOME=/mine"])));
        assert_eq!(process["capabilities"]["effective"], json!(["CAP_KILL"]));
    }

    #[test]
    fn nobody_wanted_changes_nothing_and_nobody_found_is_an_error() {
        assert_eq!(applied("", &[]).unwrap()["user"]["uid"], 7);
        let error = applied("nobody", &[]).unwrap_err().to_string();
        assert!(error.contains("`nobody`") && error.contains("numeric"), "{error}");
    }
}
