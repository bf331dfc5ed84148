//! The OCI runtime specification of a container that `hull run` makes.
//!
//! The defaults are those of podman and docker where they make sense in a VM of one's own: the capabilities, the masked and read-only
//! paths. There is no seccomp profile: the wall is the VM.

use serde_json::{Value, json};

use crate::Error;
use crate::ulimit::{self, Limit};

/// What a program needs besides its container.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub workdir: String,
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
    pub terminal: bool,
    pub limits: Vec<Limit>,
    /// What root of the container may have.
    pub capabilities: Vec<&'static str>,
}

/// A mount of the container, beside the usual ones.
#[derive(Clone, Debug)]
pub(crate) struct GuestMount {
    /// `bind`, `tmpfs` or a disk's file system.
    pub kind: String,
    /// In the guest.
    pub source: String,
    /// In the container.
    pub destination: String,
    pub options: Vec<String>,
}

impl GuestMount {
    /// Something of the guest in another place.
    pub(crate) fn bind(source: String, destination: String, options: &[String]) -> Self {
        let options = std::iter::once("rbind".to_owned()).chain(options.iter().cloned()).collect();
        Self { kind: "bind".to_owned(), source, destination, options }
    }
}

/// What a container has besides its program.
#[derive(Clone, Debug)]
pub(crate) struct Container {
    /// Refuse changes to its root.
    pub read_only: bool,
    pub hostname: String,
    /// Size of /dev/shm in bytes; 0 is no limit.
    pub shm_bytes: u64,
    /// How many of the guest's disks it sees.
    pub disks: usize,
}

/// A disk's device node, in the guest and in the container.
pub(crate) fn disk_node(index: usize) -> String {
    // Sixteen at the most.
    let letter = char::from(b'a' + (index % 26) as u8);
    format!("/dev/vd{letter}")
}

/// The `process` object.
pub(crate) fn process(program: &Program) -> Value {
    // What a user other than root gets by exec is decided by the file, so only root's sets are filled.
    let held: &[&str] = if program.uid == 0 { &program.capabilities } else { &[] };
    json!({
        "terminal": program.terminal,
        "user": { "uid": program.uid, "gid": program.gid, "additionalGids": program.additional_gids },
        "args": program.args,
        "env": program.env,
        "cwd": program.workdir,
        "capabilities": {
            "bounding": program.capabilities, "effective": held, "permitted": held, "inheritable": [], "ambient": [],
        },
        "rlimits": ulimit::rlimits(&program.limits),
        "noNewPrivileges": false,
    })
}

/// The whole specification; `root` is the container's root in the guest. What `extra` mounts takes the place of a usual mount
/// at the same destination.
pub(crate) fn container(
    program: &Program,
    root: &str,
    container: &Container,
    extra: &[GuestMount],
) -> Result<oci_spec::runtime::Spec, Error> {
    let mut mounts = vec![
        json!({ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }),
        json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] }),
        json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", format!("size={}", container.shm_bytes)] }),
        json!({ "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"] }),
        json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs",
            "options": ["nosuid", "noexec", "nodev", "ro"] }),
        json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] }),
    ];
    let normal = |path: &str| std::path::Path::new(path).components().collect::<std::path::PathBuf>();
    mounts.retain(|usual| {
        let usual = usual["destination"].as_str().unwrap_or_default();
        extra.iter().all(|mount| normal(&mount.destination) != normal(usual))
    });
    for index in 0..container.disks {
        // The container's /dev is its own, with nothing of the guest's.
        let node = disk_node(index);
        mounts.push(json!({ "destination": node, "type": "bind", "source": node, "options": ["bind", "rw"] }));
    }
    for GuestMount { kind, source, destination, options } in extra {
        mounts.push(json!({ "destination": destination, "type": kind, "source": source, "options": options }));
    }
    let mut devices = vec![
        json!({ "allow": false, "access": "rwm" }),
        // Whoever has the capability may make device nodes, and use none, as with docker and containerd.
        json!({ "allow": true, "type": "c", "access": "m" }),
        json!({ "allow": true, "type": "b", "access": "m" }),
    ];
    if container.disks > 0 {
        // All block devices of the guest that can be written to are the container's disks; their major number is not known.
        devices.push(json!({ "allow": true, "type": "b", "access": "rw" }));
    }
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": { "path": root, "readonly": container.read_only },
        "hostname": container.hostname,
        "process": process(program),
        "mounts": mounts,
        "linux": {
            // The guest has no network but this container's, so it needs no network namespace of its own.
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" },
            ],
            // As docker and podman: ping without a privilege of its own, and ports below 1024 for everybody.
            "sysctl": {
                "net.ipv4.ping_group_range": "0 2147483647",
                "net.ipv4.ip_unprivileged_port_start": "0",
            },
            "maskedPaths": [
                "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            "resources": { "devices": devices },
        },
    });
    Ok(serde_json::from_value(spec)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capabilities;

    fn program(uid: u32) -> Program {
        Program {
            args: vec!["sh".into()],
            env: vec!["A=b".into()],
            workdir: "/".into(),
            uid,
            gid: uid,
            additional_gids: vec![7],
            terminal: false,
            limits: Vec::new(),
            capabilities: capabilities::held(&[], &[]).unwrap(),
        }
    }

    fn made(disks: usize, extra: &[GuestMount]) -> oci_spec::runtime::Spec {
        let settings = Container { read_only: true, hostname: "host".into(), shm_bytes: 4096, disks };
        container(&program(0), "/root", &settings, extra).unwrap()
    }

    #[test]
    fn the_specification_is_one() {
        let spec = made(0, &[GuestMount::bind("/s".into(), "/d".into(), &["ro".into()])]);
        let mounts = spec.mounts().as_ref().unwrap();
        assert_eq!(mounts.last().unwrap().options().as_ref().unwrap(), &["rbind", "ro"]);
        assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(true));
        let shm = mounts.iter().find(|mount| mount.destination().ends_with("shm")).unwrap();
        assert!(shm.options().as_ref().unwrap().contains(&"size=4096".to_owned()));
    }

    #[test]
    fn a_mount_takes_the_place_of_a_usual_one() {
        let extra = GuestMount {
            kind: "tmpfs".into(),
            source: "tmpfs".into(),
            destination: "/dev/shm/".into(),
            options: vec!["size=1".into()],
        };
        let (usual, changed) = (made(0, &[]), made(0, &[extra]));
        let count = |spec: &oci_spec::runtime::Spec| spec.mounts().as_ref().unwrap().len();
        assert_eq!(count(&usual), count(&changed));
    }

    #[test]
    fn only_a_container_with_disks_may_use_block_devices() {
        let rules = |disks| {
            let spec = made(disks, &[]);
            let linux = spec.linux().clone().unwrap();
            linux.resources().clone().unwrap().devices().clone().unwrap().len()
        };
        assert_eq!((rules(0), rules(2)), (3, 4));
        let spec = made(2, &[]);
        let nodes = spec.mounts().as_ref().unwrap().iter().filter(|mount| mount.destination().starts_with("/dev/vda"));
        assert_eq!(nodes.count(), 1);
    }

    #[test]
    fn only_root_holds_capabilities() {
        for (uid, held) in [(0, 12), (1000, 0)] {
            let process = process(&program(uid));
            assert_eq!(process["capabilities"]["effective"].as_array().unwrap().len(), held);
            assert_eq!(process["capabilities"]["bounding"].as_array().unwrap().len(), 12);
        }
    }
}
