//! A container's OCI specification: what the agent refuses, changes, and does itself.
//!
//! libcontainer carries out most of a specification. This module stands between: it refuses what neither would
//! honour, by the field's name; it takes out what the agent does better itself (cgroup limits, sysctls of the
//! whole guest); and it spells some fields the way that libcontainer understands.

use std::collections::{BTreeMap, HashSet};
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{
    Arch, Capabilities, Linux, LinuxCapabilities, LinuxNamespaceType, LinuxResources, LinuxSeccomp, LinuxSeccompAction,
    Mount, Process, Spec,
};

use super::{nodes, user};
use crate::error::{Error, Result};
use crate::streams::stdio::{Io, WindowSize};

/// A specification made ready for libcontainer, and the parts of it that are the agent's.
#[derive(Debug)]
pub(crate) struct Adapted {
    pub(crate) spec: Spec,
    pub(crate) resources: LinuxResources,
    /// By name with dots; for namespaces that the container shares with the guest.
    pub(crate) guest_sysctls: BTreeMap<String, String>,
    pub(crate) window: WindowSize,
    pub(crate) has_poststart: bool,
    pub(crate) has_poststop: bool,
}

/// Checks a specification and makes it ready. `cgroup` is the path of the container's cgroup in the hierarchy, `user` whom it is to run
/// as instead of what it says itself.
pub(crate) fn adapt(json: &[u8], io: &Io, cgroup: &Path, user: &str) -> Result<Adapted> {
    let mut spec: Spec = serde_json::from_slice(json).map_err(|error| Error::invalid("spec", error.to_string()))?;
    if !spec.version().starts_with("1.") {
        return Err(Error::invalid("ociVersion", format!("{} is not of version 1", spec.version())));
    }
    let other_systems = [
        ("solaris", spec.solaris().is_some()),
        ("windows", spec.windows().is_some()),
        ("vm", spec.vm().is_some()),
        ("zos", spec.zos().is_some()),
    ];
    if let Some((field, _)) = other_systems.into_iter().find(|(_, present)| *present) {
        return Err(Error::invalid(field, "this is a Linux guest"));
    }
    let root = spec.root().as_ref().ok_or_else(|| Error::invalid("root", "is missing"))?;
    check_path("root.path", root.path())?;
    let root = root.path().clone();

    let mut process = spec.process().clone().ok_or_else(|| Error::invalid("process", "is missing"))?;
    user::apply(&mut process, user, &root)?;
    let window = adapt_process(&mut process, io)?;
    set_home(&mut process, &root);
    spec.set_process(Some(process));

    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        check_mount(index, mount)?;
    }
    let mut linux = spec.linux().clone().ok_or_else(|| Error::invalid("linux", "is missing"))?;
    check_namespaces(&linux)?;
    if spec.hostname().is_some() && !has_namespace(&linux, LinuxNamespaceType::Uts) {
        return Err(Error::invalid("hostname", "needs a uts namespace of the container's own"));
    }
    if linux.intel_rdt().is_some() {
        return Err(Error::invalid("linux.intelRdt", "the guest has no such resources"));
    }
    if let Some(seccomp) = linux.seccomp() {
        check_seccomp(seccomp)?;
    }
    if linux.mount_label().as_ref().is_some_and(|label| !label.is_empty()) {
        tracing::info!("linux.mountLabel is not applied: the guest's kernel has no SELinux");
    }
    linux.set_mount_label(None);
    let guest_sysctls = take_guest_sysctls(&mut linux)?;
    let resources = linux.resources().clone().unwrap_or_default();
    linux.set_resources(None);
    linux.set_cgroups_path(Some(cgroup.to_owned()));
    let bound = nodes::bind(&mut linux, Path::new(nodes::NUMBERS))?;
    spec.set_mounts(Some(spec.mounts().iter().flatten().cloned().chain(bound).collect()));
    spec.set_linux(Some(linux));

    let has = |hooks: Option<&Vec<oci_spec::runtime::Hook>>| hooks.is_some_and(|hooks| !hooks.is_empty());
    let hooks = spec.hooks().as_ref();
    Ok(Adapted {
        has_poststart: has(hooks.and_then(|hooks| hooks.poststart().as_ref())),
        has_poststop: has(hooks.and_then(|hooks| hooks.poststop().as_ref())),
        spec,
        resources,
        guest_sysctls,
        window,
    })
}

/// Reads and checks the `process` of an exec in a container with this root.
pub(crate) fn exec_process(json: &[u8], io: &Io, user: &str, root: &Path) -> Result<(Process, WindowSize)> {
    let mut process: Process =
        serde_json::from_slice(json).map_err(|error| Error::invalid("process", error.to_string()))?;
    user::apply(&mut process, user, root)?;
    let window = adapt_process(&mut process, io)?;
    Ok((process, window))
}

/// Checks a process and makes it explicit. Answers its terminal's size.
fn adapt_process(process: &mut Process, io: &Io) -> Result<WindowSize> {
    if process.args().as_ref().is_none_or(|args| args.first().is_none_or(String::is_empty)) {
        return Err(Error::invalid("process.args", "names nothing to run"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::invalid("process.cwd", "is not absolute"));
    }
    for word in process.args().iter().flatten().chain(process.env().iter().flatten()) {
        if word.contains('\0') {
            return Err(Error::invalid("process.args", "has a zero byte"));
        }
    }
    for (field, label) in [("apparmorProfile", process.apparmor_profile()), ("selinuxLabel", process.selinux_label())] {
        if label.as_ref().is_some_and(|label| !label.is_empty()) {
            tracing::info!("process.{field} is not applied: the guest's kernel has no such module");
        }
    }
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    // The request's word on the terminal counts, since it says how many streams there are.
    process.set_terminal(Some(io.terminal));
    let mut window = io.size;
    if let (WindowSize { columns: 0, rows: 0 }, Some(size)) = (window, process.console_size()) {
        let clamp = |size: u64| u16::try_from(size).unwrap_or(u16::MAX);
        window = WindowSize { columns: clamp(size.width()), rows: clamp(size.height()) };
    }
    // libcontainer takes an explicit "no" for a filter to be loaded after the capability to load it is gone.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // No capabilities named means none, not all that the agent has.
    let mut capabilities = process.capabilities().clone().unwrap_or_else(|| {
        let mut none = LinuxCapabilities::default();
        none.set_bounding(None).set_effective(None).set_permitted(None).set_inheritable(None).set_ambient(None);
        none
    });
    let explicit = |set: &Option<Capabilities>| Some(set.clone().unwrap_or_default());
    let sets = [
        explicit(capabilities.bounding()),
        explicit(capabilities.effective()),
        explicit(capabilities.permitted()),
        explicit(capabilities.inheritable()),
        explicit(capabilities.ambient()),
    ];
    let [bounding, effective, permitted, inheritable, ambient] = sets;
    capabilities
        .set_bounding(bounding)
        .set_effective(effective)
        .set_permitted(permitted)
        .set_inheritable(inheritable)
        .set_ambient(ambient);
    process.set_capabilities(Some(capabilities));
    Ok(window)
}

/// Gives the process its user's home, as every runtime does. Done here and not by libcontainer, which would ask the
/// C library, which would load the container's name service modules into a static binary.
fn set_home(process: &mut Process, root: &Path) {
    let mut env = process.env().clone().unwrap_or_default();
    if env.iter().any(|variable| variable.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        return;
    }
    env.retain(|variable| !variable.starts_with("HOME="));
    let passwd = super::rootfs::read(root, Path::new("etc/passwd")).unwrap_or_default();
    env.push(format!("HOME={}", home_of(&passwd, process.user().uid())));
    process.set_env(Some(env));
}

/// A user's home by passwd(5), or the root directory.
pub(crate) fn home_of(passwd: &str, uid: u32) -> &str {
    passwd
        .lines()
        .filter_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            (fields.len() == 7 && fields[2].parse() == Ok(uid)).then(|| fields[5])
        })
        .find(|home| !home.is_empty())
        .unwrap_or("/")
}

fn check_mount(index: usize, mount: &Mount) -> Result<()> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    check_path(&field("destination"), mount.destination())?;
    let options = mount.options().as_deref().unwrap_or_default();
    for option in options {
        let reason = match option.as_str() {
            "shared" | "rshared" => "mounts do not propagate out of a container",
            "idmap" | "ridmap" => "idmapped mounts are not supported in the guest",
            "tmpcopyup" => "is not supported",
            _ => continue,
        };
        return Err(Error::invalid(field("options"), format!("{option}: {reason}")));
    }
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        return Err(Error::invalid(field("uidMappings"), "idmapped mounts are not supported in the guest"));
    }
    let bind =
        mount.typ().as_deref() == Some("bind") || options.iter().any(|option| option == "bind" || option == "rbind");
    if bind {
        let source = mount.source().as_ref().ok_or_else(|| Error::invalid(field("source"), "is missing"))?;
        check_path(&field("source"), source)?;
        if !source.exists() {
            return Err(Error::invalid(field("source"), format!("{} does not exist in the guest", source.display())));
        }
    }
    Ok(())
}

fn check_namespaces(linux: &Linux) -> Result<()> {
    let mut seen = HashSet::new();
    for namespace in linux.namespaces().iter().flatten() {
        if !seen.insert(namespace.typ()) {
            return Err(Error::invalid("linux.namespaces", format!("{} appears twice", namespace.typ())));
        }
        if let Some(path) = namespace.path() {
            check_path("linux.namespaces.path", path)?;
            if !path.exists() {
                let reason = format!("{} does not exist in the guest", path.display());
                return Err(Error::invalid("linux.namespaces.path", reason));
            }
        }
    }
    if !seen.contains(&LinuxNamespaceType::Mount) {
        return Err(Error::invalid("linux.namespaces", "a container needs a mount namespace"));
    }
    Ok(())
}

fn has_namespace(linux: &Linux, typ: LinuxNamespaceType) -> bool {
    linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == typ)
}

fn check_seccomp(seccomp: &LinuxSeccomp) -> Result<()> {
    if seccomp.listener_path().is_some() {
        return Err(Error::invalid("linux.seccomp.listenerPath", "nobody listens in the guest"));
    }
    let notifies = seccomp.syscalls().iter().flatten().any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify);
    if notifies || seccomp.default_action() == LinuxSeccompAction::ScmpActNotify {
        return Err(Error::invalid("linux.seccomp", "SCMP_ACT_NOTIFY needs a listener, and the guest has none"));
    }
    for architecture in seccomp.architectures().iter().flatten() {
        let runs_here = match architecture {
            Arch::ScmpArchNative => true,
            Arch::ScmpArchX86 | Arch::ScmpArchX86_64 | Arch::ScmpArchX32 => cfg!(target_arch = "x86_64"),
            Arch::ScmpArchArm | Arch::ScmpArchAarch64 => cfg!(target_arch = "aarch64"),
            _ => false,
        };
        if !runs_here {
            let reason = format!("{architecture:?} does not run on this guest");
            return Err(Error::invalid("linux.seccomp.architectures", reason));
        }
    }
    Ok(())
}

/// Takes out the sysctls of namespaces that the container shares with the guest, and of none. The guest is the pod's
/// own, so what would be the whole host's elsewhere, vm.max_map_count for instance, is the pod's here.
fn take_guest_sysctls(linux: &mut Linux) -> Result<BTreeMap<String, String>> {
    const OF_IPC: [&str; 8] = ["msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"];
    let mut guest = BTreeMap::new();
    let mut own = std::collections::HashMap::new();
    for (name, value) in linux.sysctl().iter().flatten() {
        let name = name.replace('/', ".");
        check_sysctl(&name)?;
        let namespace = match name.split_once('.') {
            Some(("net", _)) => Some(LinuxNamespaceType::Network),
            Some(("user", _)) => Some(LinuxNamespaceType::User),
            Some(("fs", rest)) if rest.starts_with("mqueue.") => Some(LinuxNamespaceType::Ipc),
            Some(("kernel", rest)) if OF_IPC.contains(&rest) => Some(LinuxNamespaceType::Ipc),
            Some(("kernel", "domainname")) => Some(LinuxNamespaceType::Uts),
            Some(("kernel", "hostname")) => {
                return Err(Error::invalid("linux.sysctl.kernel.hostname", "is the specification's hostname"));
            }
            _ => None,
        };
        match namespace {
            Some(namespace) if has_namespace(linux, namespace) => own.insert(name, value.clone()),
            _ => guest.insert(name, value.clone()),
        };
    }
    linux.set_sysctl((!own.is_empty()).then_some(own));
    Ok(guest)
}

/// A sysctl's name must stay below /proc/sys.
pub(crate) fn check_sysctl(name: &str) -> Result<()> {
    let plain = name.split('.').all(|part| !part.is_empty() && !part.contains(['/', '\0']));
    if plain { Ok(()) } else { Err(Error::invalid("sysctl", format!("{name:?} is not a name"))) }
}

/// Sets sysctls of the guest as a whole.
pub(crate) fn set_sysctls<'a>(sysctls: impl IntoIterator<Item = (&'a String, &'a String)>) -> Result<()> {
    for (name, value) in sysctls {
        check_sysctl(name)?;
        let path = PathBuf::from("/proc/sys").join(name.replace('.', "/"));
        std::fs::write(&path, value)
            .map_err(|error| Error::invalid(format!("sysctl {name}"), format!("{value:?}: {error}")))?;
    }
    Ok(())
}

/// An absolute path that does not go back up.
pub(crate) fn check_path(field: &str, path: &Path) -> Result<()> {
    if !path.is_absolute() {
        return Err(Error::invalid(field.to_owned(), format!("{} is not absolute", path.display())));
    }
    if path.components().any(|component| component == Component::ParentDir) {
        return Err(Error::invalid(field.to_owned(), format!("{} has a ..", path.display())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn base() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "root": { "path": "/nowhere" },
            "process": { "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "linux": { "namespaces": [{ "type": "mount" }, { "type": "uts" }] },
        })
    }

    fn adapted(change: impl FnOnce(&mut Value)) -> Result<Adapted> {
        let mut spec = base();
        change(&mut spec);
        adapt(spec.to_string().as_bytes(), &Io::default(), Path::new("/containers/c"), "")
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        match adapted(change) {
            Err(Error::Invalid { field, .. }) => field.into_owned(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        assert_eq!(refused(|spec| spec["ociVersion"] = json!("2.0.0")), "ociVersion");
        assert_eq!(refused(|spec| spec["root"]["path"] = json!("rootfs")), "root.path");
        assert_eq!(refused(|spec| spec["root"]["path"] = json!("/a/../b")), "root.path");
        assert_eq!(refused(|spec| spec["process"]["args"] = json!([])), "process.args");
        assert_eq!(refused(|spec| spec["process"]["cwd"] = json!("tmp")), "process.cwd");
        assert_eq!(refused(|spec| spec["linux"]["intelRdt"] = json!({ "closID": "x" })), "linux.intelRdt");
        assert_eq!(refused(|spec| spec["linux"]["namespaces"] = json!([{ "type": "pid" }])), "linux.namespaces");
        assert_eq!(refused(|spec| spec["linux"]["namespaces"] = json!([{ "type": "other" }])), "spec");
        assert_eq!(
            refused(|spec| spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_S390X"] })),
            "linux.seccomp.architectures"
        );
        assert_eq!(
            refused(|spec| spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x" })),
            "linux.seccomp.listenerPath"
        );
        assert_eq!(
            refused(|spec| spec["mounts"] = json!([{
            "destination": "/x", "type": "bind", "source": "/not/there" }])),
            "mounts[0].source"
        );
        assert_eq!(
            refused(|spec| spec["mounts"] = json!([{
            "destination": "/x", "type": "bind", "source": "/", "options": ["rshared"] }])),
            "mounts[0].options"
        );
        assert_eq!(
            refused(|spec| {
                spec["hostname"] = json!("h");
                spec["linux"]["namespaces"] = json!([{ "type": "mount" }]);
            }),
            "hostname"
        );
    }

    #[test]
    fn labels_are_dropped_and_privileges_made_explicit() {
        let spec = adapted(|spec| {
            spec["process"]["apparmorProfile"] = json!("some");
            spec["process"]["selinuxLabel"] = json!("some");
            spec["process"]["noNewPrivileges"] = json!(false);
            spec["linux"]["mountLabel"] = json!("some");
        });
        let spec = spec.unwrap().spec;
        let process = spec.process().as_ref().unwrap();
        assert!(process.apparmor_profile().is_none() && process.selinux_label().is_none());
        assert_eq!(process.no_new_privileges(), None);
        assert_eq!(process.capabilities().as_ref().unwrap().effective().as_ref().unwrap().len(), 0);
        assert!(spec.linux().as_ref().unwrap().mount_label().is_none());
    }

    #[test]
    fn sysctls_go_to_the_guest_where_the_namespace_is_shared() {
        let adapted = adapted(|spec| {
            spec["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "ipc" }]);
            spec["linux"]["sysctl"] =
                json!({ "net.ipv4.ip_forward": "1", "kernel.shmmax": "5", "vm/max_map_count": "262144" });
        })
        .unwrap();
        let names: Vec<_> = adapted.guest_sysctls.keys().map(String::as_str).collect();
        assert_eq!(names, ["net.ipv4.ip_forward", "vm.max_map_count"]);
        let own = adapted.spec.linux().as_ref().unwrap().sysctl().clone().unwrap();
        assert_eq!(own.keys().map(String::as_str).collect::<Vec<_>>(), ["kernel.shmmax"]);
        assert!(check_sysctl("net..ipv4").is_err() && check_sysctl("../x").is_err());
    }

    #[test]
    fn the_console_size_of_the_specification_fills_in_for_the_requests() {
        let json = json!({ "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 },
            "consoleSize": { "height": 5, "width": 70000 } });
        let io = Io { terminal: true, ..Io::default() };
        let (process, window) = exec_process(json.to_string().as_bytes(), &io, "", Path::new("/")).unwrap();
        assert_eq!(window, WindowSize { columns: u16::MAX, rows: 5 });
        assert_eq!(process.terminal(), Some(true));
        let io = Io { size: WindowSize { columns: 80, rows: 24 }, ..io };
        assert_eq!(exec_process(json.to_string().as_bytes(), &io, "", Path::new("/")).unwrap().1, io.size);
    }

    #[test]
    fn a_users_home_is_looked_up_or_the_root() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/false\nx:x:7:7:::\n";
        assert_eq!(home_of(passwd, 33), "/var/www");
        assert_eq!(home_of(passwd, 7), "/");
        assert_eq!(home_of(passwd, 1000), "/");
    }
}
