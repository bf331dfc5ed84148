//! What can be done with a container, from its creation to its removal.

use std::time::Duration;

use hull_protocol::agent::*;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use ttrpc::Code;

use crate::fixture::{self, code, container, context, guest, process, read_until, shell};

#[tokio::test]
async fn a_container_runs_from_creation_to_removal() {
    let guest = guest!();
    let handshake = HandshakeRequest { major: 1, minor: 0, ..Default::default() };
    assert_eq!(guest.sandbox.handshake(context(), &handshake).await.unwrap().major, 1);
    let wrong = HandshakeRequest { major: 2, ..Default::default() };
    assert_eq!(code(guest.sandbox.handshake(context(), &wrong).await).0, Code::FAILED_PRECONDITION);

    let (io, streams) = guest.pipes().await;
    let spec = guest.spec("echo out; echo err >&2; exit 7");
    let pid = guest.create("c", &spec, io.clone()).await.unwrap();
    assert!(pid > 1);
    assert_eq!(code(guest.create("c", &spec, Io::default()).await).0, Code::ALREADY_EXISTS);
    assert_eq!(code(guest.remove("c", "").await).0, Code::FAILED_PRECONDITION);
    guest.begin("c").await;
    let output = guest.finish("c", "", streams).await;
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!((output.status.code, output.status.signal, output.status.oom_killed), (7, 0, false));

    // After the end: waiting answers again, statistics last, starting and signalling are over.
    assert_eq!(guest.wait("c", "").await.exited_at_ns, output.status.exited_at_ns);
    assert!(guest.stats("c").await.cpu.usage_usec > 0);
    assert_eq!(code(guest.containers.start_container(context(), &container("c")).await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(guest.signal("c", "", 15, false).await).0, Code::NOT_FOUND);
    assert_eq!(code(guest.exec_process("c", "e", &shell("true"), Io::default()).await).0, Code::FAILED_PRECONDITION);

    let events = guest.events(0).await;
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].number, events[0].container_id.as_str(), events[0].exit().status.code), (1, "c", 7));

    guest.remove("c", "").await.unwrap();
    assert_eq!(code(guest.remove("c", "").await).0, Code::NOT_FOUND);
    assert_eq!(code(guest.containers.wait_process(context(), &process("c", "")).await).0, Code::NOT_FOUND);
    assert!(!guest.cgroup_directory().join("c").exists());
    assert!(!guest.directory.path().join("state/c").exists());
    assert_eq!(guest.run("c", &guest.spec("echo again")).await.stdout, "again\n");
}

#[tokio::test]
async fn bytes_pass_both_ways_exactly_and_without_end_on_the_agents_memory() {
    let guest = guest!();
    // 1 GiB each way where somebody asks for it; a lab without hardware takes minutes for that.
    let mib: usize = std::env::var("HULL_STREAM_MIB").ok().and_then(|mib| mib.parse().ok()).unwrap_or(16);
    let streams = guest.launch("c", &guest.spec("cat")).await;
    let (mut stdin, mut stdout) = (streams.stdin.unwrap(), streams.stdout.unwrap());
    let chunk = |number: usize| -> Vec<u8> {
        (0..1 << 20).map(|position: usize| (position.wrapping_mul(31) >> 3 ^ position ^ number) as u8).collect()
    };
    let write = async move {
        for number in 0..mib {
            stdin.write_all(&chunk(number)).await.unwrap();
        }
        stdin.shutdown().await.unwrap();
    };
    let read = async move {
        let mut read = vec![0; 1 << 20];
        for number in 0..mib {
            stdout.read_exact(&mut read).await.unwrap();
            assert!(read == chunk(number), "MiB {number} differs");
        }
        assert_eq!(stdout.read(&mut read).await.unwrap(), 0);
    };
    tokio::join!(write, read);
    assert_eq!(guest.wait("c", "").await.code, 0);
    let (_, peak_kib) = guest.resident_kib();
    assert!(peak_kib < 24 * 1024, "{peak_kib} KiB");
}

#[tokio::test]
async fn a_host_that_does_not_read_holds_the_process_back_and_one_that_left_breaks_its_pipe() {
    let guest = guest!();
    let mut streams = guest.launch("c", &guest.spec("trap '' HUP; yes | head -c 100000000; echo end >&2")).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (resident_kib, _) = guest.resident_kib();
    assert!(resident_kib < 24 * 1024, "{resident_kib} KiB");
    // Leaving: the writers get SIGPIPE and the shell goes on.
    drop(streams.stdout.take());
    let mut stderr = String::new();
    streams.stderr.take().unwrap().read_to_string(&mut stderr).await.unwrap();
    assert_eq!(stderr, "end\n");
}

#[tokio::test]
async fn closing_stdin_by_request_ends_the_input() {
    let guest = guest!();
    let mut streams = guest.launch("c", &guest.spec("cat; echo end")).await;
    let stdin = streams.stdin.as_mut().unwrap();
    stdin.write_all(b"input\n").await.unwrap();
    read_until(streams.stdout.as_mut().unwrap(), "input\n").await;
    guest.containers.close_stdin(context(), &process("c", "")).await.unwrap();
    read_until(streams.stdout.as_mut().unwrap(), "end\n").await;
    guest.containers.close_stdin(context(), &process("c", "")).await.unwrap();
    guest.wait("c", "").await;
}

#[tokio::test]
async fn another_process_runs_in_the_container() {
    let guest = guest!();
    let _streams = guest.launch("c", &guest.spec("sleep 1000")).await;
    let output = guest.exec("c", "e1", &shell("hostname; cat; echo $HOME; id -u; exit 3")).await;
    assert_eq!((output.stdout.as_str(), output.status.code), ("box\n/root\n0\n", 3));
    // Its id is free again after its removal only.
    assert_eq!(code(guest.exec_process("c", "e1", &shell("true"), Io::default()).await).0, Code::ALREADY_EXISTS);
    guest.remove("c", "e1").await.unwrap();
    assert_eq!(code(guest.remove("c", "e1").await).0, Code::NOT_FOUND);

    let mut other = shell("id -u; id -g; id -G; umask; pwd; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status");
    other["user"] = json!({ "uid": 33, "gid": 44, "additionalGids": [5, 6], "umask": 0o77 });
    other["cwd"] = json!("/tmp");
    other["noNewPrivileges"] = json!(true);
    other["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 64, "hard": 128 }]);
    let output = guest.exec("c", "e1", &other).await;
    let expected = "33\n44\n44 5 6\n0077\n/tmp\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t0\n";
    assert_eq!(output.stdout, expected, "{}", output.stderr);

    // What cannot be executed is told at once.
    let mut missing = shell("");
    missing["args"] = json!(["not-there"]);
    let (refusal, message) = code(guest.exec_process("c", "e2", &missing, Io::default()).await);
    assert_eq!(refusal, Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("not-there"), "{message}");
    missing["args"] = json!(["/etc/passwd"]);
    assert_eq!(code(guest.exec_process("c", "e2", &missing, Io::default()).await).0, Code::INVALID_ARGUMENT);
    missing = shell("true");
    missing["cwd"] = json!("/not/there");
    assert_eq!(code(guest.exec_process("c", "e2", &missing, Io::default()).await).0, Code::INVALID_ARGUMENT);

    // The processes are listed with the exec that started them.
    let (io, streams) = guest.pipes().await;
    let pid = guest.exec_process("c", "e3", &shell("sleep 1000 & echo; wait"), io).await.unwrap();
    read_until(&mut { streams }.stdout.take().unwrap(), "\n").await;
    let pids = guest.containers.list_pids(context(), &container("c")).await.unwrap().pids;
    assert_eq!(pids.len(), 3, "{pids:?}");
    let of_exec: Vec<_> = pids.iter().filter(|pid| pid.exec_id == "e3").map(|pid| pid.pid).collect();
    assert_eq!(of_exec, [pid]);
    guest.signal("c", "e3", 15, false).await.unwrap();
    let status = guest.wait("c", "e3").await;
    assert_eq!((status.code, status.signal), (143, 15));

    // With the container all of its processes end, and its own end is told last.
    let (io, _streams) = guest.pipes().await;
    guest.exec_process("c", "e4", &shell("sleep 1000"), io).await.unwrap();
    guest.signal("c", "", 9, false).await.unwrap();
    assert_eq!(guest.wait("c", "").await.code, 137);
    let events = guest.events(0).await;
    let last: Vec<_> = events.iter().rev().take(2).map(|event| event.exit().exec_id.as_str()).collect();
    assert_eq!(last, ["", "e4"]);
    guest.remove("c", "").await.unwrap();
}

#[tokio::test]
async fn signals_reach_one_process_or_all() {
    let guest = guest!();
    let script = "trap 'echo got it; exit 5' USR1; echo ready; while :; do sleep 0.05; done";
    let mut streams = guest.launch("c", &guest.spec(script)).await;
    read_until(streams.stdout.as_mut().unwrap(), "ready\n").await;
    assert_eq!(code(guest.signal("c", "", 0, false).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(code(guest.signal("c", "", 65, false).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(code(guest.signal("c", "x", 9, false).await).0, Code::NOT_FOUND);
    assert_eq!(code(guest.signal("c", "x", 9, true).await).0, Code::INVALID_ARGUMENT);
    guest.signal("c", "", 10, true).await.unwrap();
    read_until(streams.stdout.as_mut().unwrap(), "got it\n").await;
    assert_eq!(guest.wait("c", "").await.code, 5);

    // A container that was never started ends as well, and can be removed then.
    guest.create("d", &guest.spec("true"), Io::default()).await.unwrap();
    guest.discard("d").await;
    // Without a PID namespace of its own, a container's processes end with its first one all the same.
    let mut spec = guest.spec("sleep 1000 & echo; read x");
    spec["linux"]["namespaces"] = json!([{ "type": "uts" }, { "type": "mount" }, { "type": "cgroup" }]);
    let mut streams = guest.launch("e", &spec).await;
    read_until(streams.stdout.as_mut().unwrap(), "\n").await;
    drop(streams.stdin.take());
    assert_eq!(guest.wait("e", "").await.code, 1);
    guest.remove("e", "").await.unwrap();
}

#[tokio::test]
async fn a_terminal_has_a_size_and_survives_the_end_of_input() {
    let guest = guest!();
    let (io, mut terminal) = guest.terminal(100, 30).await;
    let script = "trap 'stty size' WINCH; stty size; echo on > /dev/stdout; echo c > /dev/console; echo ready; while :; do read line && echo \"<$line>\"; done";
    let mut spec = guest.spec(script);
    spec["process"]["user"] = json!({ "uid": 33, "gid": 33 });
    guest.create("c", &spec, io).await.unwrap();
    guest.begin("c").await;
    let seen = read_until(&mut terminal, "ready").await;
    assert!(seen.starts_with("30 100\r\non\r\nc\r\n"), "{seen:?}");
    let size = Some(WindowSize { columns: 120, rows: 40, ..Default::default() }).into();
    let resize = ResizeTtyRequest { container_id: "c".into(), size, ..Default::default() };
    guest.containers.resize_tty(context(), &resize).await.unwrap();
    terminal.write_all(b"hello\n").await.unwrap();
    let seen = read_until(&mut terminal, "<hello>").await;
    assert!(seen.contains("40 120"), "{seen:?}");

    // A second terminal in the same container.
    let (io, mut second) = guest.terminal(90, 20).await;
    let mut process = shell("stty size; tty; echo x > $(tty)");
    process["user"] = json!({ "uid": 33, "gid": 33 });
    guest.exec_process("c", "e", &process, io).await.unwrap();
    let mut seen = String::new();
    second.read_to_string(&mut seen).await.unwrap();
    assert_eq!(seen, "20 90\r\n/dev/pts/1\r\nx\r\n");
    assert_eq!(guest.wait("c", "e").await.code, 0);
    guest.containers.resize_tty(context(), &ResizeTtyRequest { exec_id: "e".into(), ..resize }).await.unwrap();

    // The end of the host's input is not the end of the terminal; its control character is.
    terminal.write_all(b"last\n").await.unwrap();
    terminal.shutdown().await.unwrap();
    read_until(&mut terminal, "<last>").await;
    guest.containers.close_stdin(context(), &fixture::process("c", "")).await.unwrap();
    guest.signal("c", "", 9, false).await.unwrap();
    guest.wait("c", "").await;
    guest.remove("c", "").await.unwrap();
}

#[tokio::test]
async fn limits_hold_and_can_be_changed() {
    let guest = guest!();
    let mut spec = guest.spec("cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight memory.low; read x; cat memory.max cpu.max pids.max");
    spec["linux"]["resources"] = json!({
        "memory": { "limit": 64 << 20, "reservation": 16 << 20 },
        "pids": { "limit": 50 },
        "cpu": { "quota": 50000, "period": 100000, "shares": 1024 },
    });
    let mut streams = guest.launch("c", &spec).await;
    let seen = read_until(streams.stdout.as_mut().unwrap(), "16777216\n").await;
    assert_eq!(seen, "67108864\n50\n50000 100000\n100\n16777216\n");
    let stats = guest.stats("c").await;
    assert_eq!((stats.memory.limit_bytes, stats.pids.limit), (64 << 20, 50));
    assert!(stats.memory.usage_bytes > 0 && stats.pids.current >= 1 && stats.memory.stat.contains_key("inactive_file"));

    let update = |resources: serde_json::Value| UpdateContainerRequest {
        container_id: "c".into(),
        resources: resources.to_string().into_bytes(),
        ..Default::default()
    };
    let wanted = json!({ "memory": { "limit": 128 << 20 }, "cpu": { "quota": -1 } });
    guest.containers.update_container(context(), &update(wanted)).await.unwrap();
    let refused =
        code(guest.containers.update_container(context(), &update(json!({ "memory": { "swappiness": 1 } }))).await);
    assert_eq!(refused.0, Code::INVALID_ARGUMENT);
    assert!(refused.1.contains("swappiness"), "{}", refused.1);
    streams.stdin.as_mut().unwrap().write_all(b"\n").await.unwrap();
    let output = guest.finish("c", "", streams).await;
    assert_eq!(output.stdout, "134217728\nmax 100000\n50\n");
    assert_eq!(guest.stats("c").await.memory.limit_bytes, 128 << 20);
}

#[tokio::test]
async fn running_out_of_memory_is_told_before_the_end_it_causes() {
    let guest = guest!();
    let mut spec = guest.spec("tail /dev/zero");
    spec["process"]["args"] = json!(["tail", "/dev/zero"]);
    spec["linux"]["resources"] = json!({ "memory": { "limit": 24 << 20, "swap": 24 << 20 } });
    let _streams = guest.launch("c", &spec).await;
    let status = guest.wait("c", "").await;
    assert_eq!((status.code, status.signal, status.oom_killed), (137, 9, true));
    let events = guest.events(0).await;
    assert_eq!(events[0].oom().kills, 1);
    assert!(events[1].exit().status.oom_killed);
    assert_eq!(guest.stats("c").await.memory.events["oom_kill"], 1);
    guest.remove("c", "").await.unwrap();

    // A process that is not the first one is told of while the container goes on.
    let mut spec = guest.spec("tail /dev/zero; echo survived; sleep 1000");
    spec["linux"]["resources"] = json!({ "memory": { "limit": 24 << 20, "swap": 24 << 20 } });
    let mut streams = guest.launch("d", &spec).await;
    read_until(streams.stdout.as_mut().unwrap(), "survived").await;
    let events = guest.events(events.last().unwrap().number).await;
    assert_eq!((events[0].container_id.as_str(), events[0].oom().kills), ("d", 1));
    guest.discard("d").await;
}

#[tokio::test]
async fn a_paused_container_stands_still() {
    let guest = guest!();
    let mut streams = guest.launch("c", &guest.spec("while :; do echo tick; sleep 0.01; done")).await;
    let stdout = streams.stdout.as_mut().unwrap();
    read_until(stdout, "tick").await;
    guest.containers.pause_container(context(), &container("c")).await.unwrap();
    assert_eq!(code(guest.containers.pause_container(context(), &container("c")).await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(guest.exec_process("c", "e", &shell("true"), Io::default()).await).0, Code::FAILED_PRECONDITION);
    // What was on its way arrives; then there is silence.
    let mut rest = vec![0; 1 << 16];
    while tokio::time::timeout(Duration::from_millis(200), stdout.read(&mut rest)).await.is_ok() {}
    assert!(tokio::time::timeout(Duration::from_millis(300), stdout.read(&mut rest)).await.is_err());
    guest.containers.resume_container(context(), &container("c")).await.unwrap();
    read_until(stdout, "tick").await;
    assert_eq!(code(guest.containers.resume_container(context(), &container("c")).await).0, Code::FAILED_PRECONDITION);
    guest.containers.pause_container(context(), &container("c")).await.unwrap();
    guest.discard("c").await;
}

#[tokio::test]
async fn what_fails_to_be_created_leaves_nothing() {
    let guest = guest!();
    let refused = async |change: fn(&mut serde_json::Value)| {
        let mut spec = guest.spec("true");
        change(&mut spec);
        let refused = code(guest.create("c", &spec, Io::default()).await);
        assert!(!guest.cgroup_directory().join("c").exists(), "{refused:?}");
        assert!(!guest.directory.path().join("state/c").exists(), "{refused:?}");
        refused
    };
    let (kind, message) = refused(|spec| spec["process"]["args"] = json!(["not-there"])).await;
    assert_eq!(kind, Code::INVALID_ARGUMENT);
    assert!(message.contains("process.args") && message.contains("not-there"), "{message}");
    let (kind, message) = refused(|spec| spec["root"]["path"] = json!("/not/there")).await;
    assert_eq!(kind, Code::INTERNAL, "{message}");
    let (kind, message) = refused(|spec| spec["linux"]["resources"] = json!({ "cpu": { "cpus": "900" } })).await;
    assert_eq!(kind, Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("cpu.cpus"), "{message}");
    let (kind, message) = refused(|spec| {
        spec["mounts"]
            .as_array_mut()
            .unwrap()
            .push(json!({ "destination": "/x", "type": "not-a-type", "source": "x" }));
    })
    .await;
    assert_eq!(kind, Code::INTERNAL);
    assert!(message.contains("not-a-type"), "{message}");
    let (kind, message) = refused(|spec| {
        spec["hooks"] = json!({ "createRuntime": [{ "path": "/bin/false" }] });
    })
    .await;
    assert_eq!(kind, Code::INTERNAL, "{message}");
    // A token that no stream brings.
    let io = Io { stdout: fixture::token(), ..Default::default() };
    assert_eq!(code(guest.create("c", &guest.spec("true"), io).await).0, Code::DEADLINE_EXCEEDED);
    for id in ["", "..", "a/b", &"x".repeat(129)] {
        assert_eq!(code(guest.create(id, &guest.spec("true"), Io::default()).await).0, Code::INVALID_ARGUMENT, "{id}");
    }
    assert_eq!(guest.run("c", &guest.spec("echo fine")).await.stdout, "fine\n");
}

#[tokio::test]
async fn many_containers_at_once_keep_apart_and_leave_no_zombies() {
    let guest = guest!();
    let long = "y".repeat(128);
    let ids: Vec<String> = (0..7).map(|number| format!("c{number}")).chain([long]).collect();
    let runs = ids.iter().map(|id| {
        let guest = &guest;
        async move {
            // An orphan of a shared PID namespace ends up with the agent.
            let spec = guest.spec(&format!("(sleep 0.2 &) ; echo {id}; for i in 1 2 3; do (exit $i) & done; wait"));
            assert_eq!(guest.run(id, &spec).await.stdout, format!("{id}\n"));
        }
    });
    let mut tasks: Vec<_> = runs.map(Box::pin).collect();
    // The client is one connection; all calls are under way together.
    std::future::poll_fn(|context| {
        tasks.retain_mut(|task| task.as_mut().poll(context).is_pending());
        if tasks.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    let mut events = Vec::new();
    while events.len() < 8 {
        events.extend(guest.events(events.len() as u64).await);
    }
    assert_eq!(events.len(), 8);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let pid = guest.agent.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    assert_eq!(children, "");
    let (resident_kib, peak_kib) = guest.resident_kib();
    eprintln!("agent: {resident_kib} KiB resident, {peak_kib} KiB at most");
}

#[tokio::test]
async fn a_shutdown_ends_everything_after_its_answer() {
    let mut guest = guest!();
    let _streams = guest.launch("c", &guest.spec("sleep 1000")).await;
    guest.sandbox.shutdown(context(), &Empty::new()).await.unwrap();
    for _ in 0..500 {
        if guest.agent.try_wait().unwrap().is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(guest.agent.try_wait().unwrap().unwrap().success());
    let left = std::fs::read_to_string(guest.cgroup_directory().join("c/cgroup.procs")).unwrap();
    assert_eq!(left, "");
}
