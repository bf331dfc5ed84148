//! The shim's sandbox service and version 3 of the task service, spoken to as containerd 2 does.

mod bad_input;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, StartRequest, WaitRequest};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest, ShutdownSandboxRequest,
    StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc::context::{Context, with_duration};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// A shim that was started as containerd 2.3 starts one, without containerd.
struct Shim {
    dir: tempfile::TempDir,
    id: String,
    client: Client,
}

impl Shim {
    async fn start(id: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let output = Self::try_start(id, dir.path());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let answer = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!((answer.version, answer.protocol.as_str()), (3, "ttrpc"));
        let client = Client::connect(&answer.address).await.unwrap();
        Self { dir, id: id.to_owned(), client }
    }

    /// What `start` in this directory answers.
    fn try_start(id: &str, dir: &Path) -> Output {
        let params = BootstrapParams {
            instance_id: id.to_owned(),
            namespace: "tests".to_owned(),
            containerd_ttrpc_address: "/nobody/listens/here".to_owned(),
            socket_dir: Some(dir.to_str().unwrap().to_owned()),
            ..Default::default()
        };
        let mut child = Command::new("containerd-shim-hull-v2")
            .args(["-namespace", "tests", "-id", id, "start"])
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&params.write_to_bytes().unwrap()).unwrap();
        child.wait_with_output().unwrap()
    }

    fn sandbox(&self) -> SandboxClient {
        SandboxClient::new(self.client.clone())
    }

    fn tasks(&self) -> TaskClient {
        TaskClient::new(self.client.clone())
    }

    /// A bundle with a root from the small image, unpacked by hull itself.
    fn bundle(&self, name: &str, args: &[&str]) -> PathBuf {
        let bundle = self.dir.path().join(name);
        let root = bundle.join("rootfs");
        std::fs::create_dir_all(root.join("bin")).unwrap();
        std::fs::create_dir_all(root.join("proc")).unwrap();
        std::fs::create_dir_all(root.join("dev")).unwrap();
        std::fs::copy("/bin/busybox", root.join("bin/sh")).unwrap();
        let spec = json!({
            "ociVersion": "1.1.0",
            "root": { "path": "rootfs" },
            "process": { "args": args, "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "annotations": {
                "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": self.id,
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] },
            ],
            "linux": { "namespaces": [{ "type": "mount" }, { "type": "pid" }] },
        });
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        // Of use where a test failed; otherwise it has gone.
        let pid = std::fs::read_to_string(self.dir.path().join("shim.pid")).ok().and_then(|pid| pid.parse().ok());
        if let Some(pid) = pid {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn patience() -> Context {
    with_duration(Duration::from_secs(120))
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

#[test]
fn a_sandbox_lives_from_create_to_shutdown_with_containers_in_it() {
    run(async {
        let shim = Shim::start("service").await;
        let (sandbox, tasks) = (shim.sandbox(), shim.tasks());
        let id = || "service".to_owned();
        let status = || SandboxStatusRequest { sandbox_id: id(), verbose: true, ..Default::default() };
        sandbox
            .create_sandbox(patience(), &CreateSandboxRequest { sandbox_id: id(), ..Default::default() })
            .await
            .unwrap();
        assert_eq!(sandbox.sandbox_status(patience(), &status()).await.unwrap().state, "SANDBOX_NOTREADY");

        let started = sandbox
            .start_sandbox(patience(), &StartSandboxRequest { sandbox_id: id(), ..Default::default() })
            .await
            .unwrap();
        assert!(PathBuf::from(format!("/proc/{}/ns/net", started.pid)).exists());
        let answer = sandbox.sandbox_status(patience(), &status()).await.unwrap();
        assert_eq!((answer.state.as_str(), answer.pid), ("SANDBOX_READY", started.pid));
        serde_json::from_str::<serde_json::Value>(&answer.info["info"]).unwrap();
        let platform = sandbox.platform(patience(), &PlatformRequest::new()).await.unwrap();
        assert_eq!(platform.platform.os, "linux");

        let bundle = shim.bundle("one", &["/bin/sh", "-c", "exit 5"]).to_str().unwrap().to_owned();
        let create = CreateTaskRequest { id: "one".into(), bundle, ..Default::default() };
        tasks.create(patience(), &create).await.unwrap();
        tasks.start(patience(), &StartRequest { id: "one".into(), ..Default::default() }).await.unwrap();
        let ended = tasks.wait(patience(), &WaitRequest { id: "one".into(), ..Default::default() }).await.unwrap();
        assert_eq!(ended.exit_status, 5);
        let metrics = SandboxMetricsRequest { sandbox_id: id(), ..Default::default() };
        let metrics = sandbox.sandbox_metrics(patience(), &metrics).await.unwrap().metrics;
        assert_eq!(metrics.data.type_url, "io.containerd.cgroups.v2.Metrics");
        tasks.delete(patience(), &DeleteRequest { id: "one".into(), ..Default::default() }).await.unwrap();
        // With the last container gone the sandbox is still there.
        assert_eq!(sandbox.sandbox_status(patience(), &status()).await.unwrap().state, "SANDBOX_READY");

        let wait = WaitSandboxRequest { sandbox_id: id(), ..Default::default() };
        let stop = StopSandboxRequest { sandbox_id: id(), ..Default::default() };
        let (waited, stopped) =
            tokio::join!(sandbox.wait_sandbox(patience(), &wait), sandbox.stop_sandbox(patience(), &stop),);
        stopped.unwrap();
        assert_eq!(waited.unwrap().exit_status, 0);
        assert_eq!(sandbox.sandbox_status(patience(), &status()).await.unwrap().state, "SANDBOX_NOTREADY");
        let shutdown = ShutdownSandboxRequest { sandbox_id: id(), ..Default::default() };
        sandbox.shutdown_sandbox(patience(), &shutdown).await.unwrap();
        let shim: i32 = std::fs::read_to_string(shim.dir.path().join("shim.pid")).unwrap().parse().unwrap();
        fixture::wait_gone(shim);
    });
}

#[test]
fn a_network_namespace_that_does_not_exist_is_an_invalid_argument() {
    run(async {
        let shim = Shim::start("netns").await;
        let request = CreateSandboxRequest {
            sandbox_id: "netns".into(),
            netns_path: "/no/such/netns".into(),
            ..Default::default()
        };
        let error = shim.sandbox().create_sandbox(patience(), &request).await.unwrap_err().to_string();
        assert!(error.contains("/no/such/netns"), "{error}");
        let shutdown = ShutdownSandboxRequest { sandbox_id: "netns".into(), ..Default::default() };
        shim.sandbox().shutdown_sandbox(patience(), &shutdown).await.unwrap();
    });
}
