//! An agent on this machine, as it serves in a guest but on Unix sockets, and a client that speaks to it as the host
//! does. Containers run busybox.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hull_protocol::agent::*;
use hull_protocol::agent_ttrpc::{ContainerServiceClient, SandboxServiceClient};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use ttrpc::context::Context;
use ttrpc::{Code, Error};

const BUSYBOX: [&str; 2] = ["/usr/bin/busybox", "/bin/busybox"];
/// Every call ends by then, in the slowest lab.
const TIMEOUT: Duration = Duration::from_secs(60);

static NEXT: AtomicU64 = AtomicU64::new(1);

/// An agent and its client.
pub(crate) struct Guest {
    pub(crate) agent: Child,
    pub(crate) sandbox: SandboxServiceClient,
    pub(crate) containers: ContainerServiceClient,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) cgroup: String,
}

/// The host's ends of a process's streams.
#[derive(Default)]
pub(crate) struct Streams {
    pub(crate) stdin: Option<UnixStream>,
    pub(crate) stdout: Option<UnixStream>,
    pub(crate) stderr: Option<UnixStream>,
}

/// What a process left.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Why this machine cannot run containers, if so.
pub(crate) fn unfit() -> Option<&'static str> {
    if !fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("\nUid:\t0\t0\t")) {
        return Some("this needs root");
    }
    if !fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").is_ok_and(|list| list.contains("memory")) {
        return Some("this needs cgroup version 2 with its controllers");
    }
    if !BUSYBOX.iter().any(|path| Path::new(path).exists()) {
        return Some("this needs busybox-static");
    }
    None
}

/// Says that a test is skipped. The lab has what all of them need, so there is no excuse there.
pub(crate) fn skip(reason: &str) {
    assert!(std::env::var_os("HULL_IN_LAB").is_none(), "{reason}, and the lab is to have it");
    eprintln!("skipped: {reason}; lab/run gives a machine that has it");
}

/// A guest, or the end of the test on a machine that cannot run containers.
macro_rules! guest {
    () => {
        match $crate::fixture::unfit() {
            None => $crate::fixture::Guest::start().await,
            Some(reason) => return $crate::fixture::skip(reason),
        }
    };
}

pub(crate) use guest;

pub(crate) fn context() -> Context {
    ttrpc::context::with_duration(TIMEOUT)
}

/// The code of a call that was refused.
pub(crate) fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> (Code, String) {
    match result {
        Err(Error::RpcStatus(status)) => (status.code.enum_value_or_default(), status.message),
        other => panic!("not refused: {other:?}"),
    }
}

pub(crate) fn token() -> Vec<u8> {
    let mut token = vec![0; hull_protocol::STREAM_TOKEN_BYTES];
    token[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    token
}

impl Guest {
    pub(crate) async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        make_root(&path("root"));
        let cgroup = format!("/hull-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // HULL_AGENT has another build of the agent tried, the static one of a guest say.
        let agent = std::env::var("HULL_AGENT").unwrap_or_else(|_| env!("CARGO_BIN_EXE_hull-agent").into());
        let agent = Command::new(agent)
            .arg("--no-init")
            .args(["--listen", &format!("unix:{}", path("rpc").display())])
            .args(["--streams", &format!("unix:{}", path("streams").display())])
            .arg("--state")
            .arg(path("state"))
            .args(["--cgroup", &cgroup])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        // The second socket is made after the first.
        while UnixStream::connect(path("streams")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let client = ttrpc::r#async::Client::connect(&format!("unix://{}", path("rpc").display())).await.unwrap();
        let sandbox = SandboxServiceClient::new(client.clone());
        let containers = ContainerServiceClient::new(client);
        Self { agent, sandbox, containers, directory, cgroup }
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    pub(crate) fn cgroup_directory(&self) -> PathBuf {
        PathBuf::from(format!("/sys/fs/cgroup{}", self.cgroup))
    }

    /// A specification like those that containerd makes, for a shell script.
    pub(crate) fn spec(&self, script: &str) -> Value {
        let capabilities =
            json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_MKNOD", "CAP_SETUID", "CAP_SETGID"]);
        json!({
            "ociVersion": "1.2.0",
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "args": ["sh", "-c", script],
                "env": ["PATH=/bin"],
                "cwd": "/",
                "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
                "noNewPrivileges": true,
            },
            "root": { "path": self.root() },
            "hostname": "box",
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
                { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                  "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
            ],
            "linux": {
                "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" }],
                "maskedPaths": ["/proc/kcore", "/proc/timer_list"],
                "readonlyPaths": ["/proc/sys"],
            },
        })
    }

    /// Opens a stream under a new token.
    pub(crate) async fn stream(&self) -> (Vec<u8>, UnixStream) {
        let token = token();
        let mut stream = UnixStream::connect(self.directory.path().join("streams")).await.unwrap();
        stream.write_all(&token).await.unwrap();
        (token, stream)
    }

    /// Three streams, and the request's word on them.
    pub(crate) async fn pipes(&self) -> (Io, Streams) {
        let (stdin, stdout, stderr) = (self.stream().await, self.stream().await, self.stream().await);
        let io = Io { stdin: stdin.0, stdout: stdout.0, stderr: stderr.0, ..Default::default() };
        (io, Streams { stdin: Some(stdin.1), stdout: Some(stdout.1), stderr: Some(stderr.1) })
    }

    pub(crate) async fn terminal(&self, columns: u32, rows: u32) -> (Io, UnixStream) {
        let (token, stream) = self.stream().await;
        let size = Some(WindowSize { columns, rows, ..Default::default() }).into();
        (Io { stdout: token, terminal: true, size, ..Default::default() }, stream)
    }

    pub(crate) async fn create(&self, id: &str, spec: &Value, io: Io) -> Result<u32, Error> {
        self.create_with(id, spec, io, Vec::new()).await
    }

    pub(crate) async fn create_with(
        &self,
        id: &str,
        spec: &Value,
        io: Io,
        storages: Vec<Storage>,
    ) -> Result<u32, Error> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: spec.to_string().into_bytes(),
            io: Some(io).into(),
            storages,
            ..Default::default()
        };
        self.containers.create_container(context(), &request).await.map(|answer| answer.pid)
    }

    /// Creates, starts and awaits a container with a volume in memory.
    pub(crate) async fn run_with_volume(&self, id: &str, spec: &Value, volume: MemoryVolume) -> Output {
        let (io, streams) = self.pipes().await;
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: spec.to_string().into_bytes(),
            io: Some(io).into(),
            volumes: vec![volume],
            ..Default::default()
        };
        self.containers.create_container(context(), &request).await.unwrap();
        self.begin(id).await;
        self.finish(id, "", streams).await
    }

    pub(crate) async fn begin(&self, id: &str) {
        self.containers.start_container(context(), &container(id)).await.unwrap();
    }

    /// Creates and starts a container.
    pub(crate) async fn launch(&self, id: &str, spec: &Value) -> Streams {
        let (io, streams) = self.pipes().await;
        self.create(id, spec, io).await.unwrap();
        self.begin(id).await;
        streams
    }

    /// Runs a container to its end and removes it.
    pub(crate) async fn run(&self, id: &str, spec: &Value) -> Output {
        let output = self.finish(id, "", self.launch(id, spec).await).await;
        self.remove(id, "").await.unwrap();
        output
    }

    /// Runs a container of a script with a changed specification.
    pub(crate) async fn run_changed(&self, id: &str, script: &str, change: impl FnOnce(&mut Value)) -> Output {
        let mut spec = self.spec(script);
        change(&mut spec);
        self.run(id, &spec).await
    }

    /// Reads a process's outputs to their ends and waits for its own.
    pub(crate) async fn finish(&self, id: &str, exec_id: &str, mut streams: Streams) -> Output {
        drop(streams.stdin.take());
        let (mut out, mut err) = (streams.stdout.take().unwrap(), streams.stderr.take().unwrap());
        let (mut stdout, mut stderr) = (String::new(), String::new());
        let (first, second) = tokio::join!(out.read_to_string(&mut stdout), err.read_to_string(&mut stderr));
        first.unwrap();
        second.unwrap();
        Output { status: self.wait(id, exec_id).await, stdout, stderr }
    }

    pub(crate) async fn exec_process(&self, id: &str, exec_id: &str, process: &Value, io: Io) -> Result<u32, Error> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: process.to_string().into_bytes(),
            io: Some(io).into(),
            ..Default::default()
        };
        self.containers.exec_process(context(), &request).await.map(|answer| answer.pid)
    }

    /// Runs a process in a container to its end.
    pub(crate) async fn exec(&self, id: &str, exec_id: &str, process: &Value) -> Output {
        let (io, streams) = self.pipes().await;
        self.exec_process(id, exec_id, process, io).await.unwrap();
        self.finish(id, exec_id, streams).await
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> ExitStatus {
        self.containers.wait_process(context(), &process(id, exec_id)).await.unwrap().status.unwrap()
    }

    pub(crate) async fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<Empty, Error> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal,
            all,
            ..Default::default()
        };
        self.containers.signal_process(context(), &request).await
    }

    pub(crate) async fn remove(&self, id: &str, exec_id: &str) -> Result<Empty, Error> {
        self.containers.remove_container(context(), &process(id, exec_id)).await
    }

    /// Kills a container and removes it.
    pub(crate) async fn discard(&self, id: &str) {
        self.signal(id, "", 9, true).await.unwrap();
        self.wait(id, "").await;
        self.remove(id, "").await.unwrap();
    }

    pub(crate) async fn stats(&self, id: &str) -> ContainerStatsResponse {
        self.containers.container_stats(context(), &container(id)).await.unwrap()
    }

    pub(crate) async fn events(&self, after: u64) -> Vec<Event> {
        let request = NextEventsRequest { after, ..Default::default() };
        self.sandbox.next_events(context(), &request).await.unwrap().events
    }

    /// What the agent has in memory, and had at most, in KiB.
    pub(crate) fn resident_kib(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.agent.id())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        (field("VmRSS:"), field("VmHWM:"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup_directory().join("cgroup.kill"), "1");
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        // Killed processes take a moment to leave.
        for _ in 0..100 {
            remove_cgroup(&self.cgroup_directory());
            if !self.cgroup_directory().exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // What is in a guest's memory goes with its machine, which there is none of here.
        for volume in fs::read_dir(self.directory.path().join("state/volumes")).into_iter().flatten().flatten() {
            let _ = rustix::mount::unmount(volume.path(), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

fn remove_cgroup(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(directory);
}

pub(crate) fn container(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.into(), ..Default::default() }
}

pub(crate) fn process(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() }
}

/// The `process` of an exec that runs a shell script.
pub(crate) fn shell(script: &str) -> Value {
    json!({ "user": { "uid": 0, "gid": 0 }, "args": ["/bin/sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/" })
}

/// A root file system with busybox and a second user.
fn make_root(root: &Path) {
    for directory in ["bin", "dev", "etc", "proc", "sys", "tmp", "home/web"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let busybox = BUSYBOX.iter().find(|path| Path::new(path).exists()).unwrap();
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    let applets = Command::new(busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(applets.stdout).unwrap().lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/home/web:/bin/sh\n").unwrap();
}

/// Reads from a stream until it has shown a text.
pub(crate) async fn read_until(stream: &mut UnixStream, text: &str) -> String {
    let mut seen = String::new();
    let mut chunk = [0; 4096];
    while !seen.contains(text) {
        let read = tokio::time::timeout(TIMEOUT, stream.read(&mut chunk)).await;
        let length = read.unwrap_or_else(|_| panic!("no {text:?} in {seen:?}")).unwrap();
        assert!(length > 0, "the stream ended before {text:?}: {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&chunk[..length]));
    }
    seen
}
