//! Hull as containerd's runtime, driven by `ctr`. Each test is for a row of what containerd expects of a shim, and its
//! name begins with the row's; `contract` has those that `ctr` cannot drive.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};

use fixture::Said;
use fixture::containerd::{
    BUSYBOX, RUNTIME, RUNTIMES, Task, ctr, ctr_with_stdin, is_of_version_1, run_script, run_script_by, spawn_ctr,
    traces_of,
};
use fixture::cri::eventually;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A pod's annotations and namespaces as CRI gives them to the containers in it.
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id=";
const TYPE: &str = "io.kubernetes.cri.container-type=";

/// Asserts that nothing of a pod is left on the host.
#[track_caller]
fn assert_nothing_left(id: &str) {
    assert_eq!(traces_of("default", id), BTreeSet::new());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.lines().any(|line| line.contains("/run/hull/")), "{mounts}");
}

/// Asserts that `ctr` failed with the shim's words, and with the kind of error that those are of: containerd 1.7 writes it behind them, and 2
/// shows it to programs only.
#[track_caller]
fn assert_refused(said: &Said, words: &str, kind: &str) {
    let kind = if is_of_version_1() { kind } else { "" };
    assert!(said.code != 0 && said.stderr.contains(words) && said.stderr.contains(kind), "{}", said.stderr);
}

/// Asserts that what tells of a pod that has gone would tell of one that has not.
#[track_caller]
fn assert_seen(id: &str) {
    let traces = traces_of("default", id);
    let kinds = [
        "containerd-shim-hull-v2",
        "hull-vmm",
        "/run/hull/",
        "/sys/fs/cgroup/",
        "/run/containerd/s/",
        "/run/containerd/io.containerd.runtime.v2.task/",
    ];
    for kind in kinds {
        assert!(traces.iter().any(|trace| trace.contains(kind)), "{kind} is not in {traces:#?}");
    }
}

#[test]
fn binary_info_and_version_print_nothing_else() {
    let shim = |flag: &str| {
        let mut command = std::process::Command::new("containerd-shim-hull-v2");
        Said::new(command.arg(flag).stdin(std::process::Stdio::null()).output().unwrap())
    };
    assert!(shim("-v").ok().contains("Version"));
    assert!(shim("-info").ok().contains(RUNTIME));
}

#[test]
fn task_create_boots_a_vm_and_start_runs_the_program_in_it() {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let guest = run_script("created", [], "uname -r").ok();
    assert_ne!(guest, host.trim());
    assert_nothing_left("created");
}

#[test]
fn task_create_by_katas_name_and_with_a_file_of_katas_boots_a_vm() {
    let dir = tempfile::tempdir().unwrap();
    let katas = dir.path().join("configuration.toml");
    std::fs::write(&katas, "[hypervisor.qemu]\npath = \"/opt/kata/bin/qemu\"\ndefault_vcpus = 3\n").unwrap();
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    // The file is neither taken for Hull's settings nor missed where it is not there.
    for file in [katas.to_str().unwrap(), "/no/such/configuration.toml"] {
        let options = ["run", "--rm", "--runtime", "io.containerd.kata.v2", "--runtime-config-path", file];
        let said = ctr(options.into_iter().chain([BUSYBOX, "kata", "sh", "-c", "uname -r; nproc"])).ok();
        let (kernel, cpus) = said.split_once('\n').unwrap();
        assert_ne!(kernel, host.trim());
        assert_eq!(cpus, "1");
        assert_nothing_left("kata");
    }
}

#[test]
fn task_create_runs_the_image_that_a_lab_with_containerd_has_on_the_guests_kernel() {
    let image = fixture::containerd::debian();
    let guests = fixture::kernel_version();
    assert_eq!(ctr(["run", "--rm", "--runtime", RUNTIME, image, "t1", "uname", "-r"]).ok(), guests);
}

#[test]
fn task_create_refuses_what_is_the_hosts_and_names_it() {
    let said = run_script("hostnet", ["--net-host"], "true");
    assert_refused(&said, "hostNetwork", "invalid argument");
    assert_nothing_left("hostnet");
}

#[test]
fn task_create_names_a_program_that_is_not_there() {
    for runtime in RUNTIMES {
        let said = ctr(["run", "--rm", "--runtime", runtime, BUSYBOX, "noprogram", "/no/such/program"]);
        assert_ne!(said.code, 0, "{runtime}");
        assert!(said.stderr.contains("/no/such/program"), "{runtime}: {}", said.stderr);
    }
    assert_nothing_left("noprogram");
}

#[test]
fn task_create_names_a_mount_source_that_vanished() {
    let mount = "type=bind,src=/no/such/source,dst=/data,options=rbind:ro";
    for runtime in RUNTIMES {
        let said = run_script_by(runtime, "nosource", ["--mount", mount], "true");
        assert_ne!(said.code, 0, "{runtime}");
        assert!(said.stderr.contains("/no/such/source"), "{runtime}: {}", said.stderr);
    }
    assert_nothing_left("nosource");
}

#[test]
fn task_create_takes_a_mount_that_is_read_only_with_what_is_below_it() {
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("below");
    std::fs::create_dir(&below).unwrap();
    mount(None::<&str>, &below, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    std::fs::write(below.join("file"), "seen\n").unwrap();
    let option = format!("type=bind,src={},dst=/data,options=rbind:rro", dir.path().display());
    let said = run_script("rro", ["--mount", &option], "cat /data/below/file; touch /data/x /data/below/x");
    umount2(&below, MntFlags::MNT_DETACH).unwrap();
    assert_eq!(said.text(), "seen\n", "{}", said.stderr);
    assert_eq!(said.stderr.matches("Read-only file system").count(), 2, "{}", said.stderr);
}

#[test]
fn task_create_starts_with_a_limit_of_16_mib() {
    for runtime in RUNTIMES {
        let said = run_script_by(runtime, "tiny", ["--memory-limit", "16777216"], "echo fits");
        assert_eq!(said.ok(), "fits", "{runtime}");
    }
}

#[test]
fn task_wait_answers_the_exit_status() {
    for runtime in RUNTIMES {
        assert_eq!(run_script_by(runtime, "status", [], "exit 7").code, 7, "{runtime}");
        let task = Task::start_by(runtime, "signalled", [], "sleep 1000");
        ctr(["task", "kill", "-s", "KILL", "signalled"]).ok();
        while task.listed().is_some_and(|(_, state)| state != "STOPPED") {}
        assert!(ctr(["task", "rm", "signalled"]).stderr.contains("exit code 137"), "{runtime}");
    }
}

#[test]
fn streams_fifo_carries_every_byte_in_both_directions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("input");
    let bytes: Vec<u8> = (0..8_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(&path, &bytes).unwrap();
    for runtime in RUNTIMES {
        let said = ctr_with_stdin(["run", "--rm", "--runtime", runtime, BUSYBOX, "echoed", "cat"], &path);
        assert_eq!((said.code, said.stderr.as_str()), (0, ""), "{runtime}");
        assert!(said.stdout == bytes, "{runtime}: {} of {} bytes, or others", said.stdout.len(), bytes.len());
    }
}

#[test]
fn task_exec_runs_beside_the_first_process_with_its_own_streams_and_status() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("input");
    std::fs::write(&path, vec![b'x'; 1_000_000]).unwrap();
    for runtime in RUNTIMES {
        let task = Task::start_by(runtime, "execs", [], "sleep 1000");
        let said = task.exec("one", "echo out; echo err >&2; exit 3");
        assert_eq!((said.code, said.text().as_str()), (3, "out\n"), "{runtime}");
        assert!(said.stderr.contains("err"), "{runtime}: {}", said.stderr);
        let counted = ctr_with_stdin(["task", "exec", "--exec-id", "two", "execs", "wc", "-c"], &path);
        assert_eq!(counted.ok(), "1000000", "{runtime}");
    }
}

#[test]
fn task_exec_in_a_stopped_container_is_a_failed_precondition() {
    // runc's shim of containerd 1.7 has no kind for it.
    for (runtime, words, kind) in
        [(RUNTIMES[0], "stopped has stopped", "failed precondition"), (RUNTIMES[1], "stopped", "")]
    {
        let task = Task::start_by(runtime, "stopped", [], "exit 0");
        while task.listed().is_some_and(|(_, state)| state != "STOPPED") {}
        assert_refused(&task.exec("late", "true"), words, kind);
    }
}

#[test]
fn task_kill_passes_signals_on_and_knows_what_has_ended() {
    for (runtime, words) in RUNTIMES.into_iter().zip(["killed has ended", ""]) {
        let task = Task::start_by(runtime, "killed", [], "trap 'exit 9' TERM; while :; do sleep 0.2; done");
        // A first process that has not come to its trap yet takes no signal.
        eventually("it ends", || {
            let _ = ctr(["task", "kill", "-s", "TERM", "killed"]);
            match task.listed() {
                Some((_, state)) if state == "STOPPED" => Ok(()),
                listed => Err(format!("{runtime}: {listed:?}")),
            }
        });
        assert_refused(&ctr(["task", "kill", "-s", "TERM", "killed"]), words, "not found");
        let removed = ctr(["task", "rm", "killed"]);
        assert!(removed.stderr.contains("exit code 9"), "{runtime}: {}", removed.stderr);
    }
}

#[test]
fn task_pids_and_state_are_told_and_the_pid_is_alive() {
    for runtime in RUNTIMES {
        let task = Task::start_by(runtime, "listed", [], "sleep 1000");
        let (pid, state) = task.listed().unwrap();
        assert_eq!(state, "RUNNING", "{runtime}");
        kill(Pid::from_raw(pid), None).unwrap();
        assert!(ctr(["task", "ps", "listed"]).ok().lines().count() > 1, "{runtime}");
    }
}

#[test]
fn task_pause_resume_freeze_and_thaw() {
    for runtime in RUNTIMES {
        let task = Task::start_by(runtime, "paused", [], "sleep 1000");
        ctr(["task", "pause", "paused"]).ok();
        assert_eq!(task.listed().unwrap().1, "PAUSED", "{runtime}");
        ctr(["task", "resume", "paused"]).ok();
        assert_eq!(task.listed().unwrap().1, "RUNNING", "{runtime}");
        assert_eq!(task.exec("thawed", "echo alive").ok(), "alive", "{runtime}");
    }
}

#[test]
fn task_checkpoint_is_not_implemented() {
    let _task = Task::start("checkpoint", [], "sleep 1000");
    assert_refused(&ctr(["task", "checkpoint", "checkpoint"]), "cannot be checkpointed", "not implemented");
}

#[test]
fn task_stats_are_those_of_cgroups_version_2() {
    for runtime in RUNTIMES {
        let _task = Task::start_by(runtime, "stats", ["--memory-limit", "33554432"], "sleep 1000");
        let said = ctr(["task", "metrics", "stats"]).ok();
        let value = |name: &str| {
            let line = said.lines().find(|line| line.split_whitespace().next() == Some(name));
            let value = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
            value.unwrap_or_else(|| panic!("{runtime}: {said}"))
        };
        assert_eq!(value("memory.usage_limit"), 33_554_432, "{runtime}");
        let counts = ["memory.usage", "cpu.usage_usec", "pids.current"].map(value);
        assert!(counts.iter().all(|count| *count > 0), "{runtime}: {counts:?}");
    }
}

#[test]
fn events_order_is_kept() {
    let mut events = spawn_ctr(["events"]);
    let mut lines = BufReader::new(events.stdout.take().unwrap()).lines();
    for runtime in RUNTIMES {
        run_script_by(runtime, "ordered", [], "true").ok();
        let mut topics = Vec::new();
        while topics.last().map(String::as_str) != Some("/tasks/delete") {
            let line = lines.next().unwrap().unwrap();
            if line.contains("\"ordered\"") {
                topics.extend(line.split_whitespace().find(|word| word.starts_with("/tasks/")).map(str::to_owned));
            }
        }
        assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"], "{runtime}");
    }
    events.kill().unwrap();
    events.wait().unwrap();
}

#[test]
fn events_oom_is_told_and_counted() {
    let mut events = spawn_ctr(["events"]);
    let mut lines = BufReader::new(events.stdout.take().unwrap()).lines();
    let script = "dd if=/dev/zero of=/dev/shm/filled bs=1M count=60; sleep 1000";
    let _task = Task::start("hungry", ["--memory-limit", "33554432"], script);
    assert!(lines.any(|line| line.is_ok_and(|line| line.contains("/tasks/oom") && line.contains("\"hungry\""))));
    events.kill().unwrap();
    events.wait().unwrap();
    let metrics = ctr(["task", "metrics", "--format", "json", "hungry"]).ok();
    let metrics: serde_json::Value = serde_json::from_str(&metrics).unwrap();
    assert!(metrics["memory_events"]["oom_kill"].as_u64().unwrap() > 0, "{metrics}");
}

#[test]
fn task_delete_leaves_nothing() {
    let task = Task::start("deleted", [], "sleep 1000");
    assert_seen("deleted");
    task.remove();
    assert!(task.listed().is_none());
    assert_nothing_left("deleted");
}

#[test]
fn binary_delete_leaves_nothing_of_a_shim_that_died() {
    let task = Task::start("orphan", [], "sleep 1000");
    let (vmm, _) = task.listed().unwrap();
    let shim = task.shim();
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    fixture::wait_gone(shim);
    fixture::wait_gone(vmm);
    while task.listed().is_some() {}
    assert_nothing_left("orphan");
}

#[test]
fn task_wait_tells_the_death_of_the_vmm_as_a_kill() {
    let task = Task::start("doomed", [], "sleep 1000");
    let (vmm, _) = task.listed().unwrap();
    kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
    while task.listed().is_some_and(|(_, state)| state != "STOPPED") {}
    assert!(ctr(["task", "rm", "doomed"]).stderr.contains("exit code 137"));
    assert_nothing_left("doomed");
}

#[test]
fn grouping_puts_the_containers_of_a_pod_into_one_vm() {
    let annotate = |kind: &str| [format!("{TYPE}{kind}"), format!("{SANDBOX}pod")];
    let [kind, id] = annotate("sandbox");
    let sandbox = Task::start("pod", ["--annotation", &kind, "--annotation", &id], "unused");
    let (vmm, _) = sandbox.listed().unwrap();
    let namespace = |name: &str| format!("{name}:/proc/{vmm}/ns/{}", if name == "network" { "net" } else { name });
    let (network, ipc, uts) = (namespace("network"), namespace("ipc"), namespace("uts"));
    let [kind, id] = annotate("container");
    let member = |name: &str, script: &str| {
        let options = ["--annotation", &kind, "--annotation", &id, "--with-ns", &network, "--with-ns", &ipc];
        let args = ["run", "--rm", "--runtime", RUNTIME].into_iter().chain(options);
        ctr(args.chain(["--with-ns", &uts, BUSYBOX, name, "sh", "-c", script])).ok()
    };
    let boot = "cat /proc/sys/kernel/random/boot_id; hostname";
    assert_eq!(member("first", boot), member("second", boot));
    assert_eq!(sandbox.listed().unwrap().1, "RUNNING");
    sandbox.remove();
    assert_nothing_left("pod");
}
