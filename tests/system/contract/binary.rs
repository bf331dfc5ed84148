//! The shim's binary: `start`, `delete` and what they print.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use containerd_shim_protos::api::{ConnectRequest, ConnectResponse, DeleteResponse};
use containerd_shim_protos::ttrpc::Request;
use containerd_shim_protos::types::introspection::RuntimeInfo;

use super::*;

/// What is to happen within the time that containerd gives `delete`.
const DELETE_SECONDS: u64 = 5;
/// A logging program that goes to the background as daemons do, once it is there.
const DOUBLE_FORK: &str = "#!/bin/sh
case $2 in
'') setsid \"$0\" \"$1\" middle; until [ -s \"$1.pid\" ]; do sleep 0.1; done; exit 5 ;;
middle) \"$0\" \"$1\" last & exit 4 ;;
last) echo $$ >\"$1.pid\"; exec cat <&3 >\"$1.log\" 5>&- ;;
esac
";

/// `start` as containerd up to 2.2 calls it, with runtime options or nothing on standard input.
fn start_by_flags(id: &str, dir: &Path, input: &[u8]) -> Output {
    let mut command = start_command(id, dir);
    command.env("TTRPC_ADDRESS", NOBODY).env("MAX_SHIM_VERSION", "2").env("GOMAXPROCS", "2");
    output(&mut command, input)
}

/// `delete` of a container.
fn delete(id: &str, dir: &Path) -> DeleteResponse {
    let mut command = Command::new("containerd-shim-hull-v2");
    command.args(["-namespace", "tests", "-id", id, "-bundle", dir.to_str().unwrap(), "delete"]).current_dir(dir);
    let before = std::time::Instant::now();
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "containerd reads both");
    // A lab is slower than any node; that it ends at all is what is asked.
    assert!(before.elapsed() < Duration::from_secs(20 * DELETE_SECONDS));
    DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
}

/// Ends the shim that was started in a directory.
fn end(dir: &Path) {
    let pid = std::fs::read_to_string(dir.join("shim.pid")).unwrap().parse().unwrap();
    nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    fixture::wait_gone(pid);
    delete("flags", dir);
}

#[test]
fn binary_start_stdin_with_options_or_nothing_is_answered_by_json_of_version_2() {
    let dir = tempfile::tempdir().unwrap();
    // Options whose two fields could be a message's first two, and those of a node that was set up for Kata.
    let options = Any { type_url: "containerd.runc.v1.Options".into(), value: b"tests".to_vec(), ..Default::default() };
    let inputs = [Vec::new(), options.write_to_bytes().unwrap(), katas_options().write_to_bytes().unwrap()];
    for input in inputs {
        let output = start_by_flags("flags", dir.path(), &input);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "containerd reads both");
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&answer["version"], &answer["protocol"]), (&json!(2), &json!("ttrpc")));
        let socket = answer["address"].as_str().unwrap().strip_prefix("unix:///run/containerd/s/").unwrap();
        assert_eq!(socket.len(), 64, "{socket}");
        end(dir.path());
    }
}

#[test]
fn binary_start_stdin_with_a_message_is_answered_by_one_of_version_3() {
    let dir = tempfile::tempdir().unwrap();
    let output = start_by_message("flags", dir.path(), NOBODY);
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!((answer.version, answer.protocol.as_str()), (3, "ttrpc"));
    end(dir.path());
    // One for another shim is none for this.
    let params = BootstrapParams {
        instance_id: "another".into(),
        namespace: "tests".into(),
        containerd_ttrpc_address: NOBODY.into(),
        ..Default::default()
    };
    let refused = super::output(&mut start_command("flags", dir.path()), &params.write_to_bytes().unwrap());
    assert!(!refused.status.success() && refused.stdout.is_empty());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("another"));
}

#[test]
fn binary_start_leaves_a_daemon_with_a_socket_a_log_and_a_group_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut log = File::options().read(true).write(true).open(log).unwrap();
    let params = BootstrapParams {
        instance_id: "flags".into(),
        namespace: "tests".into(),
        containerd_ttrpc_address: NOBODY.into(),
        socket_dir: Some(dir.path().to_str().unwrap().into()),
        ..Default::default()
    };
    let mut command = start_command("flags", dir.path());
    let output = super::output(&mut command, &params.write_to_bytes().unwrap());
    let answer = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
    let socket = answer.address.strip_prefix("unix://").unwrap();
    assert!(socket.len() <= 106 && Path::new(socket).starts_with(dir.path()));
    assert_eq!(std::fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600);
    let pid: i32 = std::fs::read_to_string(dir.path().join("shim.pid")).unwrap().parse().unwrap();
    assert_eq!(nix::unistd::getpgid(Some(Pid::from_raw(pid))).unwrap(), Pid::from_raw(pid));
    let score = |pid: &str| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        text.trim().parse::<i32>().unwrap()
    };
    assert_eq!(score(&pid.to_string()), score("self") + 1);

    // It says what it refuses to do without being asked.
    run(async {
        let client = Client::connect(&answer.address).await.unwrap();
        let mut request = CreateSandboxRequest { sandbox_id: "flags".into(), ..Default::default() };
        let unknown = "io.katacontainers.config.hypervisor.no_such_thing";
        request.annotations.insert(unknown.into(), "1".into());
        SandboxClient::new(client).create_sandbox(patience(), &request).await.unwrap();
    });
    let mut text = [0; 4096];
    let count = log.read(&mut text).unwrap();
    assert!(String::from_utf8_lossy(&text[..count]).contains("no_such_thing"));
    end(dir.path());
}

#[test]
fn binary_start_leaves_a_daemon_that_takes_orphans_in_and_waits_for_them() {
    run(async {
        let (shim, vmm) = Shim::with_sandbox("orphans").await;
        let (logger, log) = (shim.dir.join("logger"), shim.dir.join("orphan"));
        std::fs::write(&logger, DOUBLE_FORK).unwrap();
        std::fs::set_permissions(&logger, std::fs::Permissions::from_mode(0o700)).unwrap();
        let stdout = format!("binary://{}?{}", logger.display(), log.display());
        let bundle = shim.bundle("one", &["/bin/sh", "-c", "echo out; read line; exit 6"]);
        let stdin = shim.dir.join("in");
        nix::unistd::mkfifo(&stdin, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let request = CreateTaskRequest { stdin: stdin.to_str().unwrap().into(), stdout, ..create("one", &bundle) };
        shim.tasks().create(patience(), &request).await.unwrap();
        shim.start_task("one", "").await.unwrap();
        says(&log.with_extension("log"), "out\n");
        let orphan: i32 = std::fs::read_to_string(log.with_extension("pid")).unwrap().trim().parse().unwrap();
        let has_children = |wanted: &[i32]| {
            eventually("its children", || match children(shim.pid()) {
                found if found == wanted.iter().copied().collect::<BTreeSet<_>>() => Ok(()),
                found => Err(format!("{found:?} and not {wanted:?}")),
            });
        };
        let vmm = vmm.try_into().unwrap();
        // What was started has ended, and what that left is the shim's.
        has_children(&[orphan, vmm]);

        // Its end comes with that of what it reads, and nothing is left of it.
        tokio::task::spawn_blocking(move || std::fs::write(stdin, "go on\n").unwrap()).await.unwrap();
        assert_eq!(shim.wait_task("one", "").await, 6);
        shim.delete_task("one", "").await.unwrap();
        has_children(&[vmm]);
        // What others wait for is left to them: why the machine ended is known.
        shim.run("two", "sleep 1000").await;
        nix::sys::signal::kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
        assert_eq!(shim.wait_task("two", "").await, 137);
        let (_, message) = refused(shim.tasks().create(patience(), &create("three", &bundle)).await);
        assert!(message.contains("was killed by signal 9"), "{message}");
        has_children(&[]);
        shim.delete_task("two", "").await.unwrap();
        shim.end().await;
    });
}

/// The children of a process, also those that have ended and that it has not waited for.
fn children(parent: i32) -> BTreeSet<i32> {
    let statuses = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|process| {
        let pid = process.file_name().to_str()?.parse().ok()?;
        // Gone meanwhile, it may be.
        Some((pid, std::fs::read_to_string(process.path().join("status")).ok()?))
    });
    let line = format!("\nPPid:\t{parent}\n");
    statuses.filter(|(_, status)| status.contains(&line)).map(|(pid, _)| pid).collect()
}

#[test]
fn binary_start_whose_daemon_nobody_asks_to_create_anything_ends_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    assert!(start_by_flags("flags", dir.path(), b"").status.success());
    let pid = std::fs::read_to_string(dir.path().join("shim.pid")).unwrap().parse().unwrap();
    // containerd was killed before it could, and holds a connection again, but knows of no pod to ask for.
    let socket = std::fs::read_to_string(dir.path().join("shim.socket")).unwrap();
    let _held = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    // The bundle goes with what it did not know of.
    drop(dir);
    fixture::wait_gone_within(pid, Duration::from_secs(120));
    assert!(!Path::new(&socket).exists());
}

#[test]
fn binary_start_by_environment_keeps_to_its_processors_and_shares_cores_only_where_it_may() {
    let cookie = |pid: i32| {
        rustix::thread::core_scheduling_cookie(
            rustix::process::Pid::from_raw(pid).unwrap(),
            rustix::thread::CoreSchedulingScope::Thread,
        )
    };
    // As containerd has its setting `sched_core`: on, off, and off as containerd never says it.
    for (sched_core, is_on) in [(Some("1"), true), (None, false), (Some(""), false)] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = start_command("flags", dir.path());
        command.env("TTRPC_ADDRESS", NOBODY).env("GOMAXPROCS", "2").envs(sched_core.map(|value| ("SCHED_CORE", value)));
        let output = output(&mut command, b"");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let own = cookie(std::process::id().cast_signed());
        if is_on && own == Err(rustix::io::Errno::INVAL) {
            // A kernel without core scheduling: what is asked for cannot be had.
            assert!(!output.status.success() && said.contains("sched_core"), "{said}");
            continue;
        }
        assert!(output.status.success(), "{said}");
        let pid: i32 = std::fs::read_to_string(dir.path().join("shim.pid")).unwrap().parse().unwrap();
        match (own, cookie(pid)) {
            (Ok(own), Ok(shims)) => assert_eq!(shims != own, is_on, "{sched_core:?}: {own} and {shims}"),
            // On a machine whose cores have one thread each nobody has a cookie.
            (own, shims) => assert!(own.is_err() && shims.is_err(), "{own:?} and {shims:?}"),
        }
        // What is not Go has as many threads as it likes; this one has no use for more than it may.
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
        assert!(threads <= 2, "{threads} threads");
        end(dir.path());
    }
}

#[test]
fn binary_serves_both_versions_of_the_task_service() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
            let mut request = Request::new();
            (request.service, request.method) = (service.to_owned(), "Connect".to_owned());
            request.payload = ConnectRequest::new().write_to_bytes().unwrap();
            let answer = shim.client.request(request).await.unwrap();
            assert_eq!(ConnectResponse::parse_from_bytes(&answer.payload).unwrap().task_pid, vmm, "{service}");
        }
        let mut request = Request::new();
        (request.service, request.method) = ("containerd.task.v3.Task".to_owned(), "NoSuchMethod".to_owned());
        let code = match shim.client.request(request).await {
            Err(Error::RpcStatus(status)) => status.code.enum_value_or_default(),
            Ok(answer) => answer.status.code.enum_value_or_default(),
            Err(other) => panic!("{other}"),
        };
        assert_eq!(code, Code::UNIMPLEMENTED);
    });
}

#[test]
fn binary_info_is_a_runtime_info_whatever_is_on_standard_input() {
    for input in [b"".as_slice(), b"options of some kind"] {
        let mut command = Command::new("containerd-shim-hull-v2");
        command.arg("-info");
        let output = output(&mut command, input);
        assert!(output.status.success() && output.stderr.is_empty());
        let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(info.name, fixture::containerd::RUNTIME);
        assert!(!info.version.version.is_empty());
        // What containerd is to hand over unmounted, so that the guest mounts it.
        assert_eq!(info.annotations.get("containerd.io/runtime-allow-mounts").unwrap(), "erofs,format/*,mkdir/*");
        // As containerd reads it: what pods may ask for.
        assert_eq!(info.features.type_url, "types.containerd.io/opencontainers/runtime-spec/1/features/Features");
        let features: Value = serde_json::from_slice(&info.features.value).unwrap();
        assert!(features["mountOptions"].as_array().unwrap().contains(&json!("rro")), "{features}");
        assert!(features["linux"]["namespaces"].as_array().unwrap().contains(&json!("user")), "{features}");
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], json!(true));
    }
}

#[test]
fn binary_delete_of_another_container_leaves_the_pod_alone() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        shim.run("kept", "sleep 1000").await;
        let bundle = shim.dir.join("kept");
        let answer = delete("kept", &bundle);
        assert_eq!((answer.exit_status, answer.pid), (137, 0));
        assert!(answer.exited_at.seconds > 0);
        // With an exec's name, or one that nobody knows, no more.
        delete("unknown", &bundle);
        assert_eq!(shim.status("kept", "").await, Status::RUNNING);
        assert!(Path::new(&format!("/proc/{vmm}")).exists());
        shim.remove_task("kept").await;
    });
}

#[test]
fn binary_delete_clears_up_after_a_shim_that_died_and_again() {
    run(async {
        let (shim, vmm) = Shim::with_sandbox("dead").await;
        shim.run("one", "sleep 1000").await;
        let socket = std::fs::read_to_string(shim.dir.join("shim.socket")).unwrap();
        nix::sys::signal::kill(Pid::from_raw(shim.pid()), Signal::SIGKILL).unwrap();
        fixture::wait_gone(shim.pid());
        fixture::wait_gone(vmm.try_into().unwrap());
        for _ in 0..2 {
            assert_eq!(delete("dead", &shim.dir).exit_status, 137);
            assert!(!Path::new(&socket).exists());
        }
        shim.assert_nothing_left();
        // The root is as it was: only mounts are taken away.
        assert!(std::fs::metadata(shim.dir.join("one/rootfs/bin/busybox")).unwrap().size() > 0);
    });
}
