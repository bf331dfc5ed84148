//! From the OCI specification that containerd wrote for this host to the one that the guest gets.
//!
//! What the host's kernel would have done by namespaces the guest does by being a machine of its own: a namespace that a
//! container shares with its pod is the guest's, and one that is new is new in the guest. Network is always the guest's.

mod devices;
mod hooks;
mod mounts;
mod resources;
pub(crate) mod user_namespace;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use hull_settings::HostNamespaces;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Mount, Process, Spec};

use crate::error::{Error, Result};

pub(crate) use devices::{renumber, renumber_rules, take_block_devices};
pub(crate) use mounts::Placed;
pub(crate) use resources::fit;

/// Reads config.json from a bundle.
///
/// # Errors
///
/// Says what is wrong with the file.
pub(crate) fn read(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let json = std::fs::read(&path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Error::Invalid(format!("{} is missing", path.display())),
        _ => Error::host(format!("cannot read {}", path.display()))(source),
    })?;
    serde_json::from_slice(&json).map_err(|error| Error::Invalid(format!("{} is broken: {error}", path.display())))
}

/// Looks for what would have to be the host's: its network, processes or System V objects are not in the guest.
///
/// # Errors
///
/// Names the namespace that the specification leaves to the host, unless the settings say to ignore that.
pub(crate) fn check_host_namespaces(spec: &Spec, setting: HostNamespaces) -> Result<()> {
    let kinds = [
        (LinuxNamespaceType::Network, "network (hostNetwork)"),
        (LinuxNamespaceType::Pid, "processes (hostPID)"),
        (LinuxNamespaceType::Ipc, "System V IPC (hostIPC)"),
    ];
    let wanted = kinds.into_iter().filter(|(kind, _)| namespace(spec, *kind).is_none());
    wanted.map(|(_, name)| name).try_for_each(|name| host_namespace_wanted(name, setting))
}

/// Whether there is to be a user namespace of its own.
pub(crate) fn has_user_namespace(spec: &Spec) -> bool {
    namespace(spec, LinuxNamespaceType::User).is_some()
}

/// Whether a container's processes are in a namespace of its own, or in one that is there.
pub(crate) fn owns_processes(spec: &Spec) -> Option<bool> {
    namespace(spec, LinuxNamespaceType::Pid).map(|namespace| namespace.path().is_none())
}

/// Has a container's processes be in the PID namespace of the guest's process `pid`.
pub(crate) fn join_processes(spec: &mut Spec, pid: u32) {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(LinuxNamespaceType::Pid).set_path(Some(format!("/proc/{pid}/ns/pid").into()));
    if let Some(linux) = spec.linux_mut() {
        linux.namespaces_mut().get_or_insert_default().push(namespace);
    }
}

/// Sysctls, by name with dots.
pub(crate) fn sysctls(spec: &Spec) -> HashMap<String, String> {
    let sysctls = spec.linux().as_ref().and_then(|linux| linux.sysctl().as_ref());
    sysctls.map(with_dots).unwrap_or_default()
}

/// Sysctls may be written as paths too.
pub(crate) fn with_dots(sysctls: &HashMap<String, String>) -> HashMap<String, String> {
    sysctls.iter().map(|(name, value)| (name.replace('/', "."), value.clone())).collect()
}

/// What becomes of a pod that wants the host's `name`.
///
/// # Errors
///
/// Fails unless the settings say to ignore it.
pub(crate) fn host_namespace_wanted(name: &str, setting: HostNamespaces) -> Result<()> {
    match setting {
        HostNamespaces::Refuse => Err(Error::Invalid(format!(
            "a pod in a virtual machine cannot use the host's {name}; use another runtime class for it, or set \
             pod.host_namespaces = \"ignore\" on the node"
        ))),
        HostNamespaces::Ignore => {
            tracing::warn!("the pod is not given the host's {name}, but its own");
            Ok(())
        }
    }
}

/// The network namespace that has been made for the pod; none where it is to be a new one.
pub(crate) fn network_namespace(spec: &Spec) -> Option<PathBuf> {
    namespace(spec, LinuxNamespaceType::Network).and_then(|namespace| namespace.path().clone())
}

/// What the pod is accounted to on the host.
pub(crate) fn cgroup(spec: &Spec) -> Option<String> {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    path.and_then(|path| path.to_str()).map(str::to_owned)
}

fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().find(|namespace| namespace.typ() == kind)
}

/// A file that containers get unless they bring their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodFile {
    /// In `/etc`.
    pub(crate) name: &'static str,
    pub(crate) text: String,
}

/// Has a container see the pod's files of those that it does not bring, from copies in its bundle.
///
/// # Errors
///
/// Fails where a file cannot be written.
pub(crate) fn give_files(spec: &mut Spec, bundle: &Path, files: &[PodFile]) -> Result<()> {
    let access = if spec.root().as_ref().is_some_and(|root| root.readonly() == Some(true)) { "ro" } else { "rw" };
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for PodFile { name, text } in files {
        let destination = Path::new("/etc").join(name);
        if mounts.iter().any(|mount| *mount.destination() == destination) {
            continue;
        }
        let copy = bundle.join(name);
        std::fs::write(&copy, text)
            .map_err(|source| Error::Host { what: format!("cannot write {}", copy.display()), source })?;
        let mut mount = Mount::default();
        mount.set_destination(destination).set_typ(Some("bind".into())).set_source(Some(copy));
        mount.set_options(Some(["rbind", "rprivate", access].map(str::to_owned).into()));
        mounts.push(mount);
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

/// Makes the guest's specification out of the host's. `root` is the container's root in the guest; `place` brings a file
/// or directory of the host into the guest.
///
/// # Errors
///
/// Names what cannot be done in a guest.
pub(crate) fn translate(mut spec: Spec, root: &str, mut place: impl FnMut(&Placed) -> Result<String>) -> Result<Spec> {
    if let Some(hooks) = spec.hooks() {
        hooks::check(hooks)?;
    }
    if let Some(spec_root) = spec.root_mut() {
        spec_root.set_path(root.into());
    }
    if let Some(process) = spec.process_mut() {
        drop_labels(process);
    }
    let shares_memory = namespace(&spec, LinuxNamespaceType::Ipc).is_some_and(|namespace| namespace.path().is_some());
    if let Some(mounts) = spec.mounts_mut() {
        if shares_memory {
            mounts::share_memory(mounts);
        }
        mounts::translate(mounts, &mut place)?;
    }
    let mut owns_uts = false;
    if let Some(linux) = spec.linux_mut() {
        let namespaces = linux.namespaces().iter().flatten();
        let kept: Vec<LinuxNamespace> = namespaces.filter(|namespace| is_kept(namespace)).cloned().collect();
        owns_uts = kept.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Uts);
        linux.set_namespaces(Some(kept));
        linux.set_mount_label(None);
        linux.set_cgroups_path(None);
        linux.set_rootfs_propagation(None);
        if let Some(resources) = linux.resources_mut() {
            resources::fit(resources);
        }
    }
    if !owns_uts {
        // The guest has the pod's name already.
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    Ok(spec)
}

/// Takes out what only the host's kernel could apply.
pub(crate) fn drop_labels(process: &mut Process) {
    for (kind, label) in [("AppArmor", process.apparmor_profile()), ("SELinux", process.selinux_label())] {
        if label.as_ref().is_some_and(|label| !label.is_empty()) {
            tracing::info!("the {kind} label is not applied in the guest");
        }
    }
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
}

/// Whether a container gets a namespace of its own in the guest.
fn is_kept(namespace: &LinuxNamespace) -> bool {
    match namespace.typ() {
        LinuxNamespaceType::Network => false,
        // With a path it is one of the pod's, which is the guest's own.
        _ => namespace.path().is_none(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn host_spec() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "root": { "path": "rootfs" },
            "hostname": "pod",
            "process": { "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 },
                "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "x" },
            "mounts": [{ "destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro"] }],
            "linux": {
                "cgroupsPath": "/kubepods/x",
                "maskedPaths": ["/proc/kcore"],
                "namespaces": [
                    { "type": "mount" }, { "type": "pid" }, { "type": "uts", "path": "/proc/7/ns/uts" },
                    { "type": "ipc", "path": "/proc/7/ns/ipc" }, { "type": "network", "path": "/proc/7/ns/net" },
                ],
            },
        })
    }

    fn translated(spec: &Value) -> Result<Value> {
        let spec = serde_json::from_value(spec.clone()).unwrap();
        let guest = translate(spec, "/run/root", |placed| Ok(format!("/shared{}", placed.volume.source.display())))?;
        Ok(serde_json::to_value(guest).unwrap())
    }

    #[test]
    fn what_a_pod_shares_is_the_guests_and_the_rest_is_new() {
        let guest = translated(&host_spec()).unwrap();
        assert_eq!(guest["root"]["path"], "/run/root");
        assert_eq!(guest["linux"]["namespaces"], json!([{ "type": "mount" }, { "type": "pid" }]));
        assert_eq!(guest["hostname"], Value::Null);
        assert_eq!(guest["mounts"][0]["source"], "/shared/srv");
        assert_eq!(guest["process"]["apparmorProfile"], Value::Null);
        assert_eq!(guest["process"]["selinuxLabel"], Value::Null);
        assert_eq!(guest["linux"]["cgroupsPath"], Value::Null);
    }

    #[test]
    fn a_containers_own_user_namespace_is_made_in_the_guest() {
        let mut spec = host_spec();
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
        assert_eq!(translated(&spec).unwrap()["linux"]["namespaces"][2], json!({ "type": "user" }));
    }

    #[test]
    fn processes_are_a_containers_own_or_anothers_of_the_guest() {
        let mut spec = host_spec();
        let parse = |spec: &Value| serde_json::from_value::<Spec>(spec.clone()).unwrap();
        assert_eq!(owns_processes(&parse(&spec)), Some(true));
        spec["linux"]["namespaces"][1]["path"] = json!("/proc/7/ns/pid");
        assert_eq!(owns_processes(&parse(&spec)), Some(false));
        let mut guest: Spec = serde_json::from_value(translated(&spec).unwrap()).unwrap();
        assert_eq!(owns_processes(&guest), None);
        join_processes(&mut guest, 42);
        let expected = json!([{ "type": "mount" }, { "type": "pid", "path": "/proc/42/ns/pid" }]);
        assert_eq!(serde_json::to_value(guest).unwrap()["linux"]["namespaces"], expected);
    }

    #[test]
    fn a_container_of_its_own_keeps_its_name() {
        let mut spec = host_spec();
        spec["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "uts" }]);
        assert_eq!(translated(&spec).unwrap()["hostname"], "pod");
    }

    #[test]
    fn a_container_gets_the_files_of_its_pod_that_it_does_not_bring() {
        let bundle = tempfile::tempdir().unwrap();
        let mut spec = host_spec();
        spec["root"]["readonly"] = json!(true);
        spec["mounts"] = json!([{ "destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts" }]);
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        let file = |name, text: &str| PodFile { name, text: text.to_owned() };
        give_files(&mut spec, bundle.path(), &[file("hostname", "web\n"), file("hosts", "the pod's")]).unwrap();
        let mounts = serde_json::to_value(spec.mounts()).unwrap();
        assert_eq!(mounts.as_array().unwrap().len(), 2);
        assert_eq!(mounts[0]["source"], "/kubelet/hosts");
        assert_eq!(mounts[1]["destination"], "/etc/hostname");
        assert_eq!(mounts[1]["options"], json!(["rbind", "rprivate", "ro"]));
        let source = mounts[1]["source"].as_str().unwrap();
        assert_eq!(std::fs::read_to_string(source).unwrap(), "web\n");
    }

    #[test]
    fn the_hosts_namespaces_are_refused_with_a_reason_or_ignored() {
        for (kind, word) in [("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")] {
            let mut spec = host_spec();
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != kind);
            let spec: Spec = serde_json::from_value(spec).unwrap();
            let error = check_host_namespaces(&spec, HostNamespaces::Refuse).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
            check_host_namespaces(&spec, HostNamespaces::Ignore).unwrap();
        }
        let spec: Spec = serde_json::from_value(host_spec()).unwrap();
        check_host_namespaces(&spec, HostNamespaces::Refuse).unwrap();
        assert_eq!(network_namespace(&spec), Some("/proc/7/ns/net".into()));
    }

    #[test]
    fn hooks_of_the_container_are_the_guests_and_others_are_refused() {
        let mut spec = host_spec();
        spec["hooks"] = json!({ "startContainer": [{ "path": "/bin/true" }] });
        assert_eq!(translated(&spec).unwrap()["hooks"], spec["hooks"]);
        spec["hooks"]["createRuntime"] = json!([{ "path": "/bin/true" }]);
        assert!(translated(&spec).unwrap_err().to_string().contains("hooks.createRuntime"));
    }

    #[test]
    fn a_broken_or_missing_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).unwrap_err().to_string().contains("config.json is missing"));
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(read(dir.path()).unwrap_err().to_string().contains("is broken"));
    }

    proptest! {
        #[test]
        fn no_text_in_the_place_of_a_specification_makes_the_reader_panic(json in "\\PC*") {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("config.json"), json).unwrap();
            if let Ok(spec) = read(dir.path()) {
                let _ = translate(spec, "/r", |_| Ok(String::new()));
            }
        }

        #[test]
        fn no_mount_makes_the_translation_panic(
            destination in "\\PC*", source in proptest::option::of("\\PC*"), options in proptest::collection::vec("\\PC*", 0..3)
        ) {
            let mut spec = host_spec();
            spec["mounts"] = json!([{ "destination": destination, "source": source, "type": "bind", "options": options }]);
            let _ = translated(&spec);
        }
    }
}
