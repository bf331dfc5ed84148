//! `start`: finds the pod's shim, or starts one in the background.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use hull_settings::Settings;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use rustix::io::Errno;
use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};

use crate::annotations::{self, Role};
use crate::bootstrap::{self, Start, address};
use crate::flags::Flags;
use crate::{Trouble, rootfs, spec};

/// Named in the bundle of the container that the shim was started for, so that `delete` can tell it from others.
pub(crate) const PID_FILE: &str = "shim.pid";
/// Beside it, the path of the socket.
pub(crate) const SOCKET_FILE: &str = "shim.socket";
/// Beside them, what the pod is accounted to on the host, as an OCI specification has it.
pub(crate) const CGROUP_FILE: &str = "cgroup";
/// In each container's bundle, where containerd 1.7 finds the shim again after a restart of its own; version 2 keeps what it was answered.
const ADDRESS_FILE: &str = "address";
/// In what `-info` prints: the types of mounts that containerd hands over unmounted.
const ALLOW_MOUNTS: &str = "containerd.io/runtime-allow-mounts";
/// In the environment, where containerd is to have the pod's threads share cores with each other only.
const SCHED_CORE: &str = "SCHED_CORE";
/// The kernel's highest OOM score adjustment.
const MAX_OOM_SCORE: i32 = 1000;

/// Starts the pod's shim and returns what is to be printed.
pub(crate) fn start(flags: &Flags) -> Result<Vec<u8>, Trouble> {
    let start = bootstrap::parse(&bootstrap::read_input()?, flags, |name| std::env::var(name).ok())?;
    let bundle = std::env::current_dir()?;
    // With the sandbox service there may be none: then the shim is for the sandbox of this identifier.
    let role = match spec::read(&bundle) {
        Ok(spec) => annotations::role(&spec.annotations().clone().unwrap_or_default())?,
        Err(_) if !bundle.join("config.json").exists() => Role::Sandbox,
        Err(error) => return Err(error.into()),
    };
    if let Role::Member(sandbox) = role {
        let socket = start.socket_path(&flags.namespace, &sandbox);
        return match UnixStream::connect(&socket) {
            Ok(_) => {
                note(&bundle.join(ADDRESS_FILE), &address(&socket))?;
                Ok(start.answer(&socket))
            }
            Err(error) => Err(format!("the shim of the pod {sandbox} does not answer at {socket}: {error}").into()),
        };
    }
    // The daemon reads them, but its words go to the log, and these to whoever wants the pod.
    Settings::load()?;
    let socket = start.socket_path(&flags.namespace, &flags.id);
    let listener = listen(&socket)?;
    let noted =
        note(&bundle.join(SOCKET_FILE), &socket).and_then(|()| note(&bundle.join(ADDRESS_FILE), &address(&socket)));
    match noted.and_then(|()| spawn(flags, &start, &bundle, listener)) {
        Ok(()) => Ok(start.answer(&socket)),
        Err(error) => {
            let _ = std::fs::remove_file(&socket);
            Err(error)
        }
    }
}

/// Writes down what `delete` or containerd goes by.
fn note(path: &Path, text: &str) -> Result<(), Trouble> {
    std::fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()).into())
}

/// Listens at `path`, where a dead shim may have left its socket.
fn listen(path: &str) -> Result<UnixListener, Trouble> {
    if let Some(dir) = Path::new(path).parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(format!("a shim already exists for this container: it listens at {path}").into());
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        outcome => outcome,
    };
    let listener = listener.map_err(|error| format!("cannot listen at {path}: {error}"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Starts the daemon, which inherits the socket as standard input and containerd's log as standard error.
fn spawn(flags: &Flags, start: &Start, bundle: &Path, listener: UnixListener) -> Result<(), Trouble> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &start.grpc_address])
        .args(["-pod", &flags.id])
        .current_dir(bundle)
        .env("TTRPC_ADDRESS", &start.ttrpc_address)
        // One thread needs one arena.
        .env("MALLOC_ARENA_MAX", "1")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(log(bundle))
        .process_group(0);
    if start.debug {
        command.arg("-debug");
    }
    if std::env::var_os(SCHED_CORE).is_some_and(|value| !value.is_empty()) {
        have_cores_alone()?;
    }
    let mut child = command.spawn()?;
    let noted = note(&bundle.join(PID_FILE), &child.id().to_string());
    if let Err(error) = noted.and_then(|()| Ok(set_oom_score(child.id())?)) {
        child.kill()?;
        child.wait()?;
        return Err(error);
    }
    Ok(())
}

/// Has no other pod's thread run on the other half of a core while one of this pod's runs: what this process starts from now on shares
/// cores with its own kind alone, the virtual machine included (core scheduling).
fn have_cores_alone() -> Result<(), Trouble> {
    match create_core_scheduling_cookie(rustix::process::getpid(), CoreSchedulingScope::Thread) {
        // Cores without halves are nobody else's anyway.
        Ok(()) | Err(Errno::NODEV) => Ok(()),
        Err(error) => {
            Err(format!("cannot have cores alone, which sched_core in containerd's settings asks for: {error}").into())
        }
    }
}

/// containerd's log. For reading too, so that it survives containerd's restart, and never blocking: a log that nobody
/// reads is not worth a pod's standstill.
fn log(bundle: &Path) -> Stdio {
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits();
    let flags = i32::try_from(nonblocking).unwrap_or(0);
    match File::options().read(true).write(true).custom_flags(flags).open(bundle.join("log")) {
        Ok(log) => log.into(),
        Err(_) => Stdio::null(),
    }
}

/// A shim is a little dearer to the kernel than what it serves and a little less than containerd.
fn set_oom_score(pid: u32) -> std::io::Result<()> {
    let parent = rustix::process::getppid().map_or(1, |pid| pid.as_raw_nonzero().get());
    let score = std::fs::read_to_string(format!("/proc/{parent}/oom_score_adj")).unwrap_or_default();
    let score = score.trim().parse::<i32>().unwrap_or(0).saturating_add(1).min(MAX_OOM_SCORE);
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
}

/// What `-info` prints.
pub(crate) fn info() -> Result<Vec<u8>, Trouble> {
    // Options may be on standard input, and there are none that change the answer.
    bootstrap::read_input()?;
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..Default::default() };
    let annotations = [(ALLOW_MOUNTS.to_owned(), rootfs::ALLOWED.to_owned())];
    let info = RuntimeInfo {
        name: "io.containerd.hull.v2".to_owned(),
        version: MessageField::some(version),
        features: MessageField::some(features()?),
        annotations: annotations.into(),
        ..Default::default()
    };
    Ok(info.write_to_bytes()?)
}

/// What containerd tells the kubelet that pods may ask for, as the OCI runtime specification has it (features.md). Go packs what is not
/// a message as JSON.
fn features() -> Result<Any, Trouble> {
    let features = serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["startContainer"],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "noatime", "nodev", "nodiratime", "noexec",
            "norelatime", "nosuid", "private", "rbind", "relatime", "ro", "rprivate", "rro", "rslave", "rw", "slave", "strictatime",
            "suid", "sync",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    });
    Ok(Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features".to_owned(),
        value: serde_json::to_vec(&features)?,
        ..Default::default()
    })
}
