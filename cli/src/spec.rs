//! The OCI runtime specification of a container that `hull run` makes.
//!
//! The defaults are those of podman and docker where they make sense in a VM of one's own: the capabilities, the masked and read-only
//! paths. There is no seccomp profile: the wall is the VM.

use serde_json::{Value, json};

use crate::Error;

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
}

/// A mount of the container whose source lies in the guest.
#[derive(Clone, Debug)]
pub(crate) struct BindMount {
    /// In the guest.
    pub source: String,
    /// In the container.
    pub destination: String,
    pub read_only: bool,
}

/// docker's and podman's default capabilities; of `CAP_NET_RAW`, which ping needs in many images, only docker's.
const CAPABILITIES: [&str; 12] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// The `process` object.
pub(crate) fn process(program: &Program) -> Value {
    // What a user other than root gets by exec is decided by the file, so only root's sets are filled.
    let held: &[&str] = if program.uid == 0 { &CAPABILITIES } else { &[] };
    json!({
        "terminal": program.terminal,
        "user": { "uid": program.uid, "gid": program.gid, "additionalGids": program.additional_gids },
        "args": program.args,
        "env": program.env,
        "cwd": program.workdir,
        "capabilities": {
            "bounding": CAPABILITIES, "effective": held, "permitted": held, "inheritable": [], "ambient": [],
        },
        "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 1024 }],
        "noNewPrivileges": false,
    })
}

/// The whole specification; `root` is the container's root in the guest.
pub(crate) fn container(
    program: &Program,
    root: &str,
    read_only: bool,
    hostname: &str,
    binds: &[BindMount],
) -> Result<oci_spec::runtime::Spec, Error> {
    let mut mounts = vec![
        json!({ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }),
        json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] }),
        json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] }),
        json!({ "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"] }),
        json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs",
            "options": ["nosuid", "noexec", "nodev", "ro"] }),
        json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] }),
    ];
    for bind in binds {
        let access = if bind.read_only { "ro" } else { "rw" };
        mounts.push(json!({
            "destination": bind.destination, "type": "bind", "source": bind.source, "options": ["rbind", access],
        }));
    }
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": { "path": root, "readonly": read_only },
        "hostname": hostname,
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
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
        },
    });
    Ok(serde_json::from_value(spec)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(uid: u32) -> Program {
        Program {
            args: vec!["sh".into()],
            env: vec!["A=b".into()],
            workdir: "/".into(),
            uid,
            gid: uid,
            additional_gids: vec![7],
            terminal: false,
        }
    }

    #[test]
    fn the_specification_is_one() {
        let binds = [BindMount { source: "/s".into(), destination: "/d".into(), read_only: true }];
        let spec = container(&program(0), "/root", true, "host", &binds).unwrap();
        let last = spec.mounts().as_ref().unwrap().last().unwrap().clone();
        assert_eq!(last.options().as_ref().unwrap(), &["rbind", "ro"]);
        assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(true));
    }

    #[test]
    fn only_root_holds_capabilities() {
        for (uid, held) in [(0, CAPABILITIES.len()), (1000, 0)] {
            let process = process(&program(uid));
            assert_eq!(process["capabilities"]["effective"].as_array().unwrap().len(), held);
        }
    }
}
