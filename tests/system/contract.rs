//! What containerd relies on of a shim, row by row, asked for as containerd asks: by the binary's flags and over its socket.
//!
//! A test's name begins with its row: `task_METHOD`, `sandbox_METHOD`, `events`, `streams_KIND`, `binary`, `grouping`. The rows that
//! `ctr` and CRI can drive have tests of those names in `containerd` and `cri` as well.

mod bad_input;
mod binary;
mod disks;
mod events;
mod grouping;
mod roots;
mod sandbox;
mod streams;
mod task;

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use containerd_shim_protos::api::{
    CloseIORequest, CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, StartRequest,
    StateRequest, StateResponse, Status, WaitRequest,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{CreateSandboxRequest, ShutdownSandboxRequest, StartSandboxRequest};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc::context::{Context, with_duration};
use containerd_shim_protos::ttrpc::{Code, Error};
use fixture::cri::eventually;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};

/// What the small programs of a bundle's root are called; all are busybox.
const PROGRAMS: [&str; 5] = ["sh", "cat", "sleep", "stty", "dd"];
/// Where nobody takes events.
const NOBODY: &str = "/nobody/listens/here";

/// A shim that was started as containerd 2.3 starts one, without containerd.
struct Shim {
    dir: PathBuf,
    id: String,
    client: Client,
    /// Shared ones stay for the tests to come.
    is_shared: bool,
}

/// Where a shim is found again.
struct Address {
    dir: PathBuf,
    socket: String,
    vmm: u32,
}

impl Shim {
    async fn start(id: &str) -> Self {
        Self::start_telling(id, |_| NOBODY.to_owned()).await
    }

    /// One that sends its events to what `events` makes of its directory.
    async fn start_telling(id: &str, events: impl FnOnce(&Path) -> String) -> Self {
        let dir = tempfile::tempdir().unwrap().keep();
        let output = start_by_message(id, &dir, &events(&dir));
        Self::started(id, dir, &output).await
    }

    /// One that is started by a command that `change` has had.
    async fn start_with(id: &str, change: impl FnOnce(&mut Command) -> &mut Command) -> Self {
        let dir = tempfile::tempdir().unwrap().keep();
        let output = output(change(&mut start_command(id, &dir)), &bootstrap_message(id, &dir, NOBODY));
        Self::started(id, dir, &output).await
    }

    async fn started(id: &str, dir: PathBuf, output: &Output) -> Self {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let answer = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
        let client = Client::connect(&answer.address).await.unwrap();
        Self { dir, id: id.to_owned(), client, is_shared: false }
    }

    /// With its sandbox running; the process of its VM.
    async fn with_sandbox(id: &str) -> (Self, u32) {
        let shim = Self::start(id).await;
        let create = CreateSandboxRequest { sandbox_id: id.into(), ..Default::default() };
        shim.sandbox().create_sandbox(patience(), &create).await.unwrap();
        let start = StartSandboxRequest { sandbox_id: id.into(), ..Default::default() };
        let started = shim.sandbox().start_sandbox(patience(), &start).await.unwrap();
        (shim, started.pid)
    }

    /// The one that tests share which only have containers in it, and the process of its VM. A boot is dear in the lab.
    async fn shared() -> (Self, u32) {
        static SHARED: OnceLock<Address> = OnceLock::new();
        const ID: &str = "shared";
        let found = SHARED.get_or_init(|| {
            // On a thread of its own, since one runtime cannot wait within another.
            std::thread::spawn(|| {
                let mut found = None;
                run(async {
                    let (mut shim, vmm) = Self::with_sandbox(ID).await;
                    shim.is_shared = true;
                    let socket = std::fs::read_to_string(shim.dir.join("shim.socket")).unwrap();
                    found = Some(Address { dir: shim.dir.clone(), socket: format!("unix://{socket}"), vmm });
                });
                let found = found.unwrap();
                // Nothing is dropped at the end of a process, but its pipes are closed, however it ends.
                let script = "cat >/dev/null; kill -KILL \"$(cat \"$0/shim.pid\")\"; cd \"$0\"
                    containerd-shim-hull-v2 -namespace tests -id \"$1\" -bundle \"$0\" delete >/dev/null
                    cd /; rm -r \"$0\"";
                let mut guard = Command::new("sh");
                let guard = guard.args(["-c", script]).arg(&found.dir).arg(ID).stdin(Stdio::piped()).spawn();
                std::mem::forget(guard.unwrap());
                found
            })
            .join()
            .unwrap()
        });
        let client = Client::connect(&found.socket).await.unwrap();
        (Self { dir: found.dir.clone(), id: ID.to_owned(), client, is_shared: true }, found.vmm)
    }

    fn pid(&self) -> i32 {
        std::fs::read_to_string(self.dir.join("shim.pid")).unwrap().parse().unwrap()
    }

    fn sandbox(&self) -> SandboxClient {
        SandboxClient::new(self.client.clone())
    }

    fn tasks(&self) -> TaskClient {
        TaskClient::new(self.client.clone())
    }

    /// A bundle of a member of the pod with a root of busybox alone.
    fn bundle(&self, name: &str, args: &[&str]) -> PathBuf {
        let bundle = self.dir.join(name);
        let root = bundle.join("rootfs");
        for dir in ["bin", "proc", "dev", "sys"] {
            std::fs::create_dir_all(root.join(dir)).unwrap();
        }
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for program in PROGRAMS {
            // There already where a test makes a bundle anew.
            let _ = std::os::unix::fs::symlink("busybox", root.join("bin").join(program));
        }
        let spec = json!({
            "ociVersion": "1.1.0",
            "root": { "path": "rootfs" },
            "process": process(args),
            "annotations": {
                "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": self.id,
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"] },
            ],
            "linux": { "namespaces": [{ "type": "mount" }, { "type": "pid" }] },
        });
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    /// A bundle of a container that is a pod of its own.
    fn single_bundle(&self, script: &str) -> PathBuf {
        let bundle = self.bundle(&self.id, &["/bin/sh", "-c", script]);
        change(&bundle, |spec| {
            spec.as_object_mut().unwrap().remove("annotations");
            for kind in ["ipc", "network"] {
                spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": kind }));
            }
        });
        bundle
    }

    /// Creates and starts a container that runs a shell script.
    async fn run(&self, id: &str, script: &str) {
        let bundle = self.bundle(id, &["/bin/sh", "-c", script]);
        self.tasks().create(patience(), &create(id, &bundle)).await.unwrap();
        self.start_task(id, "").await.unwrap();
    }

    /// The same, with its output to a file.
    async fn run_telling(&self, id: &str, script: &str) -> PathBuf {
        let bundle = self.bundle(id, &["/bin/sh", "-c", script]);
        let out = self.dir.join(id).join("out");
        let stdout = format!("file://{}", out.display());
        self.tasks().create(patience(), &CreateTaskRequest { stdout, ..create(id, &bundle) }).await.unwrap();
        self.start_task(id, "").await.unwrap();
        out
    }

    async fn start_task(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let request = StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.tasks().start(patience(), &request).await.map(|answer| answer.pid)
    }

    /// Registers and starts another process of a container, a shell script.
    async fn exec(&self, id: &str, exec_id: &str, script: &str) {
        self.tasks().exec(patience(), &exec(id, exec_id, script)).await.unwrap();
        self.start_task(id, exec_id).await.unwrap();
    }

    async fn kill(&self, id: &str, exec_id: &str, signal: Signal) -> Result<(), Error> {
        let (id, exec_id, signal) = (id.into(), exec_id.into(), signal as u32);
        let request = KillRequest { id, exec_id, signal, ..Default::default() };
        self.tasks().kill(patience(), &request).await.map(drop)
    }

    async fn wait_task(&self, id: &str, exec_id: &str) -> u32 {
        let request = WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.tasks().wait(patience(), &request).await.unwrap().exit_status
    }

    /// As a client does that has no more to write.
    async fn close_input(&self, id: &str, exec_id: &str) {
        let request = CloseIORequest { id: id.into(), exec_id: exec_id.into(), stdin: true, ..Default::default() };
        self.tasks().close_io(patience(), &request).await.unwrap();
    }

    async fn state(&self, id: &str, exec_id: &str) -> Result<StateResponse, Error> {
        let request = StateRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.tasks().state(patience(), &request).await
    }

    async fn status(&self, id: &str, exec_id: &str) -> Status {
        self.state(id, exec_id).await.unwrap().status.enum_value().unwrap()
    }

    async fn delete_task(&self, id: &str, exec_id: &str) -> Result<DeleteResponse, Error> {
        let request = DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.tasks().delete(patience(), &request).await
    }

    /// Kills a container and removes it.
    async fn remove_task(&self, id: &str) {
        // It may have ended.
        let _ = self.kill(id, "", Signal::SIGKILL).await;
        self.wait_task(id, "").await;
        self.delete_task(id, "").await.unwrap();
    }

    /// Ends the sandbox and the shim; asserts that nothing of them is left.
    async fn end(self) {
        let shutdown = ShutdownSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() };
        self.sandbox().shutdown_sandbox(patience(), &shutdown).await.unwrap();
        fixture::wait_gone(self.pid());
        self.assert_nothing_left();
    }

    /// Asserts that nothing of a container is mounted in the tree that the guest sees.
    #[track_caller]
    fn assert_no_mounts_of(&self, id: &str) {
        let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", self.pid())).unwrap();
        let left: Vec<_> = mounts.lines().filter(|line| line.contains(&format!("/shared/{id}/"))).collect();
        assert!(left.is_empty(), "{left:#?}");
    }

    /// Asserts that nothing of the pod is left but what its caller made.
    #[track_caller]
    fn assert_nothing_left(&self) {
        assert_eq!(fixture::containerd::traces_of("tests", &self.id), BTreeSet::new());
        let socket = std::fs::read_to_string(self.dir.join("shim.socket")).unwrap();
        assert!(!Path::new(&socket).exists(), "{socket}");
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        if self.is_shared {
            return;
        }
        // Of use where a test failed; otherwise it has gone.
        let pid = std::fs::read_to_string(self.dir.join("shim.pid")).ok().and_then(|pid| pid.parse().ok());
        if let Some(pid) = pid {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The binary with `start`, as far as all versions of containerd call it alike.
fn start_command(id: &str, dir: &Path) -> Command {
    let mut command = Command::new("containerd-shim-hull-v2");
    command.args(["-namespace", "tests", "-id", id, "start"]).current_dir(dir);
    command
}

/// Runs a command with this standard input.
fn output(command: &mut Command, input: &[u8]) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// What `start` answers to containerd 2.3 and later.
fn start_by_message(id: &str, dir: &Path, events: &str) -> Output {
    output(&mut start_command(id, dir), &bootstrap_message(id, dir, events))
}

/// What those write to the standard input of `start`.
fn bootstrap_message(id: &str, dir: &Path, events: &str) -> Vec<u8> {
    let params = BootstrapParams {
        instance_id: id.to_owned(),
        namespace: "tests".to_owned(),
        containerd_ttrpc_address: events.to_owned(),
        socket_dir: Some(dir.to_str().unwrap().to_owned()),
        ..Default::default()
    };
    params.write_to_bytes().unwrap()
}

fn patience() -> Context {
    with_duration(Duration::from_secs(120))
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

/// What a refusal says: its code and its message.
#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Error>) -> (Code, String) {
    match answer {
        Err(Error::RpcStatus(status)) => (status.code.enum_value_or_default(), status.message),
        other => panic!("not refused: {other:?}"),
    }
}

fn create(id: &str, bundle: &Path) -> CreateTaskRequest {
    CreateTaskRequest { id: id.into(), bundle: bundle.to_str().unwrap().into(), ..Default::default() }
}

/// How often a process has a file open.
fn opened(pid: u32, path: &str) -> usize {
    // Not by name: what a VMM only reads it has through a mount that is nowhere.
    let wanted = std::fs::metadata(path).unwrap();
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let is_it = |fd: std::fs::Metadata| (fd.dev(), fd.ino()) == (wanted.dev(), wanted.ino());
    fds.filter(|fd| std::fs::metadata(fd.path()).is_ok_and(is_it)).count()
}

/// Waits until a file has this text.
#[track_caller]
fn says(file: &Path, wanted: &str) {
    eventually("what a program says", || match std::fs::read_to_string(file).unwrap_or_default() {
        text if text == wanted => Ok(()),
        text => Err(text),
    });
}

/// A process of an OCI specification.
fn process(args: &[&str]) -> Value {
    json!({ "args": args, "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": ["PATH=/bin"] })
}

fn any(kind: &str, value: &Value) -> Any {
    Any {
        type_url: format!("types.containerd.io/opencontainers/runtime-spec/1/{kind}"),
        value: value.to_string().into_bytes(),
        ..Default::default()
    }
}

/// Runtime options as containerd makes them of `ConfigPath` in the table of Kata's handler (runtimeoptions.v1.Options): the file is
/// Kata's.
fn katas_options() -> Any {
    let path = "/opt/kata/share/defaults/kata-containers/configuration.toml";
    let strings = [(1, "runtimeoptions.v1.Options"), (2, path)];
    let mut value = Vec::new();
    for (field, text) in strings {
        // The wire type of strings, and lengths that are one byte.
        value.extend([field << 3 | 2, u8::try_from(text.len()).unwrap()]);
        value.extend(text.as_bytes());
    }
    Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Default::default() }
}

fn exec(id: &str, exec_id: &str, script: &str) -> ExecProcessRequest {
    ExecProcessRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        spec: Some(any("Process", &process(&["/bin/sh", "-c", script]))).into(),
        ..Default::default()
    }
}

fn change(bundle: &Path, change: impl FnOnce(&mut Value)) {
    let path = bundle.join("config.json");
    let mut spec = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut spec);
    std::fs::write(path, spec.to_string()).unwrap();
}
