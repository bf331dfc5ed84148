//! The methods of the sandbox service.

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::sandbox_api::{
    PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest, SandboxStatusResponse,
    StopSandboxRequest, WaitSandboxRequest,
};
use fixture::cri::api::PodSandboxConfig;

use super::*;

impl Shim {
    pub(super) async fn sandbox_status(&self) -> SandboxStatusResponse {
        let request = SandboxStatusRequest { sandbox_id: self.id.clone(), verbose: true, ..Default::default() };
        self.sandbox().sandbox_status(patience(), &request).await.unwrap()
    }

    async fn create_sandbox(&self, change: impl FnOnce(&mut CreateSandboxRequest)) -> Result<(), Error> {
        let mut request = CreateSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() };
        change(&mut request);
        self.sandbox().create_sandbox(patience(), &request).await.map(drop)
    }

    async fn start_sandbox(&self) -> u32 {
        let start = StartSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() };
        let started = self.sandbox().start_sandbox(patience(), &start).await.unwrap();
        assert!(started.created_at.seconds > 0);
        started.pid
    }
}

#[test]
fn sandbox_create_needs_neither_annotations_nor_config_json_and_boots_nothing() {
    run(async {
        let shim = Shim::start("created").await;
        assert!(!shim.dir.join("config.json").exists());
        let missing = shim.create_sandbox(|request| request.netns_path = "/no/such/netns".into()).await;
        let (code, message) = refused(missing);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains("/no/such/netns"), "{message}");
        let another = refused(shim.create_sandbox(|request| request.sandbox_id = "another".into()).await);
        assert_eq!(another.0, Code::NOT_FOUND, "{}", another.1);

        let mut config = PodSandboxConfig::new();
        config.hostname = "from-the-options".into();
        let options = Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.write_to_bytes().unwrap(),
            ..Default::default()
        };
        shim.create_sandbox(|request| request.options = Some(options).into()).await.unwrap();
        let status = shim.sandbox_status().await;
        assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_NOTREADY", 0));

        // What the options ask for is there when it has started.
        shim.start_sandbox().await;
        let out = shim.run_telling("one", "cat /proc/sys/kernel/hostname; sleep 1000").await;
        says(&out, "from-the-options\n");
        shim.end().await;
    });
}

#[test]
fn sandbox_start_answers_a_pid_whose_namespaces_can_be_named() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        for kind in ["net", "ipc", "uts", "pid"] {
            assert!(std::fs::read_link(format!("/proc/{vmm}/ns/{kind}")).is_ok(), "{kind}");
        }
        let again = StartSandboxRequest { sandbox_id: shim.id.clone(), ..Default::default() };
        let (code, message) = refused(shim.sandbox().start_sandbox(patience(), &again).await);
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
    });
}

#[test]
fn sandbox_platform_is_known_before_anything_runs() {
    run(async {
        let shim = Shim::start("platform").await;
        let platform = shim.sandbox().platform(patience(), &PlatformRequest::new()).await.unwrap().platform;
        let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        assert_eq!((platform.os.as_str(), platform.architecture.as_str()), ("linux", architecture));
        shim.end().await;
    });
}

#[test]
fn sandbox_stop_ends_all_and_may_be_asked_for_again() {
    run(async {
        let (shim, vmm) = Shim::with_sandbox("stopping").await;
        shim.run("one", "sleep 1000").await;
        let stop = |id: &str| StopSandboxRequest { sandbox_id: id.into(), timeout_secs: 10, ..Default::default() };
        assert_eq!(refused(shim.sandbox().stop_sandbox(patience(), &stop("another")).await).0, Code::NOT_FOUND);
        let request = WaitSandboxRequest { sandbox_id: shim.id.clone(), ..Default::default() };
        let (sandbox, request_to_stop) = (shim.sandbox(), stop("stopping"));
        let mut waiting = Box::pin(sandbox.wait_sandbox(patience(), &request));
        tokio::select! {
            biased;
            answer = &mut waiting => panic!("it runs, and {answer:?} was answered"),
            // An answer to what was asked later, on the same connection.
            status = shim.sandbox_status() => assert_eq!(status.state, "SANDBOX_READY"),
        }
        sandbox.stop_sandbox(patience(), &request_to_stop).await.unwrap();
        fixture::wait_gone(vmm.try_into().unwrap());
        assert_eq!(waiting.await.unwrap().exit_status, 0);
        assert_eq!(shim.wait_task("one", "").await, 137);
        let status = shim.sandbox_status().await;
        assert_eq!(status.state, "SANDBOX_NOTREADY");
        assert!(status.exited_at.seconds > 0);
        sandbox.stop_sandbox(patience(), &request_to_stop).await.unwrap();
        shim.end().await;
    });
}

#[test]
fn sandbox_wait_tells_the_death_of_the_vm() {
    run(async {
        let (shim, vmm) = Shim::with_sandbox("waited").await;
        nix::sys::signal::kill(Pid::from_raw(vmm.try_into().unwrap()), Signal::SIGKILL).unwrap();
        let request = WaitSandboxRequest { sandbox_id: shim.id.clone(), ..Default::default() };
        // Each time that it is asked, before the end or after it.
        for _ in 0..2 {
            let exit = shim.sandbox().wait_sandbox(patience(), &request).await.unwrap();
            assert_eq!(exit.exit_status, 137);
            assert!(exit.exited_at.seconds > 0);
        }
        assert_eq!(shim.sandbox_status().await.state, "SANDBOX_NOTREADY");
        shim.end().await;
    });
}

#[test]
fn sandbox_status_is_in_cris_words_and_its_info_is_json() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        let status = shim.sandbox_status().await;
        assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_READY", vmm));
        assert_eq!(status.sandbox_id, shim.id);
        assert!(status.created_at.seconds > 0);
        let info: Value = serde_json::from_str(&status.info["info"]).unwrap();
        assert_eq!(info["pid"], vmm);
        let brief = SandboxStatusRequest { sandbox_id: shim.id.clone(), ..Default::default() };
        assert!(shim.sandbox().sandbox_status(patience(), &brief).await.unwrap().info.is_empty());
        let other = SandboxStatusRequest { sandbox_id: "another".into(), ..Default::default() };
        assert_eq!(refused(shim.sandbox().sandbox_status(patience(), &other).await).0, Code::NOT_FOUND);
    });
}

#[test]
fn sandbox_ping_is_answered() {
    run(async {
        let (shim, _) = Shim::shared().await;
        let request = PingRequest { sandbox_id: shim.id.clone(), ..Default::default() };
        shim.sandbox().ping_sandbox(patience(), &request).await.unwrap();
    });
}

#[test]
fn sandbox_shutdown_ends_the_shim_with_all_that_is_in_it() {
    run(async {
        let (shim, vmm) = Shim::with_sandbox("shut").await;
        shim.run("one", "sleep 1000").await;
        let socket = std::fs::read_to_string(shim.dir.join("shim.socket")).unwrap();
        let other = ShutdownSandboxRequest { sandbox_id: "another".into(), ..Default::default() };
        assert_eq!(refused(shim.sandbox().shutdown_sandbox(patience(), &other).await).0, Code::NOT_FOUND);
        assert!(Path::new(&socket).exists());
        shim.end().await;
        fixture::wait_gone(vmm.try_into().unwrap());
        assert!(!Path::new(&socket).exists());
    });
}

#[test]
fn sandbox_metrics_are_the_guests_as_a_whole() {
    run(async {
        let (shim, _) = Shim::shared().await;
        shim.run("metrics", "sleep 1000").await;
        let measure = async || {
            let request = SandboxMetricsRequest { sandbox_id: shim.id.clone(), ..Default::default() };
            let metric = shim.sandbox().sandbox_metrics(patience(), &request).await.unwrap().metrics.unwrap();
            assert_eq!(metric.data.type_url, "io.containerd.cgroups.v2.Metrics");
            assert!(metric.id == "shared" && metric.timestamp.seconds > 0, "{metric}");
            Metrics::parse_from_bytes(&metric.data.value).unwrap()
        };
        let metrics = measure().await;
        assert!(metrics.memory.usage > 0 && metrics.memory.usage < metrics.memory.usage_limit, "{metrics}");
        assert!(metrics.cpu.usage_usec > 0 && metrics.pids.current >= 1, "{metrics}");

        // A container that reads more than the guest uses otherwise, and goes. What it read can go, too, so it is not what the pod needs.
        shim.run("reader", "dd if=/dev/zero of=/file bs=1M count=80; dd if=/file of=/dev/null bs=1M").await;
        shim.wait_task("reader", "").await;
        let before = measure().await;
        let cached = before.memory.inactive_file;
        assert!(cached > 64 << 20 && before.memory.usage > cached + before.memory.anon, "{before}");
        shim.remove_task("reader").await;
        let after = measure().await;
        assert!(after.cpu.usage_usec >= before.cpu.usage_usec, "{before} and then {after}");
        shim.remove_task("metrics").await;
    });
}
