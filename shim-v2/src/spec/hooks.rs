//! Hooks: `startContainer` names programs of the container, which the guest has; all others name programs of the host.

use oci_spec::runtime::{Hook, Hooks};

use crate::error::{Error, Result};

/// Looks for hooks that nothing in a guest could run.
///
/// # Errors
///
/// Names the first one by its kind and path.
pub(super) fn check(hooks: &Hooks) -> Result<()> {
    let of_the_host = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (kind, list) in of_the_host {
        if let Some(path) = list.iter().flatten().map(Hook::path).next() {
            return Err(Error::Invalid(format!(
                "hooks.{kind}: {} is a program of the host, and the container is in a virtual machine",
                path.display()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn programs_of_the_host_are_refused_by_kind_and_path() {
        for kind in ["prestart", "createRuntime", "createContainer", "poststart", "poststop"] {
            let hooks: Hooks = serde_json::from_value(json!({ (kind): [{ "path": "/bin/true" }] })).unwrap();
            let error = check(&hooks).unwrap_err().to_string();
            assert!(error.contains(&format!("hooks.{kind}: /bin/true")), "{error}");
        }
    }

    #[test]
    fn programs_of_the_container_and_no_hooks_at_all_pass() {
        for hooks in [json!({ "startContainer": [{ "path": "/bin/true" }] }), json!({ "prestart": [] }), json!({})] {
            check(&serde_json::from_value(hooks).unwrap()).unwrap();
        }
    }
}
