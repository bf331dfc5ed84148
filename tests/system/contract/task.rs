//! The methods of the task service.

use std::fs::File;
use std::io::{Read, Write};

use containerd_shim_protos::api::{
    CheckpointTaskRequest, ConnectRequest, PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StatsRequest, UpdateTaskRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::shim::oci::ProcessDetails;
use futures_util::future::join_all;

use super::*;

/// What waits for signals.
const SLEEP: &str = "sleep 1000";

fn fifo(path: &Path) -> String {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    path.to_str().unwrap().to_owned()
}

impl Shim {
    async fn stats(&self, id: &str) -> Result<Metrics, Error> {
        let request = StatsRequest { id: id.into(), ..Default::default() };
        let stats = self.tasks().stats(patience(), &request).await?.stats;
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        Ok(Metrics::parse_from_bytes(&stats.value).unwrap())
    }
}

#[test]
fn task_create_has_its_own_root_under_an_id_that_has_just_become_free() {
    run(async {
        let (shim, _) = Shim::shared().await;
        for round in ["first", "second"] {
            let bundle = shim.bundle("reborn", &["/bin/cat", "/round"]);
            std::fs::write(bundle.join("rootfs/round"), round).unwrap();
            let out = bundle.join(round);
            let stdout = format!("file://{}", out.display());
            shim.tasks().create(patience(), &CreateTaskRequest { stdout, ..create("reborn", &bundle) }).await.unwrap();
            shim.start_task("reborn", "").await.unwrap();
            says(&out, round);
            shim.remove_task("reborn").await;
            // The next is another directory.
            std::fs::rename(bundle.join("rootfs"), bundle.join(format!("root of the {round}"))).unwrap();
        }
    });
}

#[test]
fn task_state_tells_each_state_the_streams_and_the_exit() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        let stdout = format!("file://{}", shim.dir.join("state.out").display());
        let bundle = shim.bundle("state", &["/bin/sh", "-c", SLEEP]);
        let request = CreateTaskRequest { stdout: stdout.clone(), ..create("state", &bundle) };
        shim.tasks().create(patience(), &request).await.unwrap();
        let created = shim.state("state", "").await.unwrap();
        assert_eq!(created.status.enum_value(), Ok(Status::CREATED));
        assert_eq!((created.id.as_str(), created.pid, created.stdout), ("state", vmm, stdout));
        assert_eq!(created.bundle, bundle.to_str().unwrap());
        shim.start_task("state", "").await.unwrap();
        assert_eq!(shim.status("state", "").await, Status::RUNNING);
        shim.tasks().pause(patience(), &PauseRequest { id: "state".into(), ..Default::default() }).await.unwrap();
        assert_eq!(shim.status("state", "").await, Status::PAUSED);
        shim.tasks().resume(patience(), &ResumeRequest { id: "state".into(), ..Default::default() }).await.unwrap();

        assert_eq!(refused(shim.state("state", "unknown").await).0, Code::NOT_FOUND);
        assert_eq!(refused(shim.state("unknown", "").await).0, Code::NOT_FOUND);
        shim.kill("state", "", Signal::SIGKILL).await.unwrap();
        shim.wait_task("state", "").await;
        let stopped = shim.state("state", "").await.unwrap();
        assert_eq!((stopped.status.enum_value(), stopped.exit_status), (Ok(Status::STOPPED), 137));
        assert!(stopped.exited_at.seconds > 0);
        shim.delete_task("state", "").await.unwrap();
        assert_eq!(refused(shim.state("state", "").await).0, Code::NOT_FOUND);
    });
}

#[test]
fn task_create_answers_a_live_pid_and_is_never_unimplemented() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        let bundle = shim.bundle("create", &["/bin/sh", "-c", SLEEP]);
        // Either is not there, and UNIMPLEMENTED would tell containerd that the method is not.
        let wrong = [
            (CreateTaskRequest { checkpoint: "/some/where".into(), ..create("create", &bundle) }, "checkpoint"),
            (CreateTaskRequest { stdout: "carrier://pigeon".into(), ..create("create", &bundle) }, "carrier://"),
        ];
        for (request, word) in wrong {
            let (code, message) = refused(shim.tasks().create(patience(), &request).await);
            assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
            assert!(message.contains(word), "{message}");
        }
        // Options are accepted, those of a handler that was Kata's too, and mean nothing.
        let request = CreateTaskRequest { options: Some(katas_options()).into(), ..create("create", &bundle) };
        let created = shim.tasks().create(patience(), &request).await.unwrap();
        assert_eq!(created.pid, vmm);
        nix::sys::signal::kill(Pid::from_raw(vmm.try_into().unwrap()), None).unwrap();
        let again = refused(shim.tasks().create(patience(), &create("create", &bundle)).await);
        assert_eq!(again.0, Code::ALREADY_EXISTS, "{}", again.1);
        // One that was never started ends with its deletion.
        shim.delete_task("create", "").await.unwrap();
        assert_eq!(refused(shim.state("create", "").await).0, Code::NOT_FOUND);
    });
}

#[test]
fn task_start_is_for_init_or_an_exec_once_and_while_init_runs() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        shim.run("start", SLEEP).await;
        let (code, message) = refused(shim.start_task("start", "").await);
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        shim.tasks().exec(patience(), &exec("start", "in-time", SLEEP)).await.unwrap();
        assert_eq!(shim.start_task("start", "in-time").await.unwrap(), vmm);
        assert_eq!(refused(shim.start_task("start", "unknown").await).0, Code::NOT_FOUND);
        shim.tasks().exec(patience(), &exec("start", "late", SLEEP)).await.unwrap();
        let mut waiting = Box::pin(shim.wait_task("start", "late"));
        shim.kill("start", "", Signal::SIGKILL).await.unwrap();
        shim.wait_task("start", "").await;
        tokio::select! {
            biased;
            exit = &mut waiting => panic!("it was never started, and {exit} was answered"),
            started = shim.start_task("start", "late") => {
                let (code, message) = refused(started);
                assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
            }
        }
        shim.remove_task("start").await;
        // With its container it is gone for good.
        assert_eq!(waiting.await, 137);
    });
}

#[test]
fn task_start_runs_the_hooks_of_the_container_in_it_before_its_program() {
    run(async {
        let (shim, _) = Shim::shared().await;
        let out = shim.dir.join("hooked.out");
        let bundle = shim.bundle("hooked", &["/bin/sh", "-c", "cat /told; echo and then the program"]);
        let hook = |script: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin", "WHAT=hook"] }]);
        change(&bundle, |spec| {
            // Its standard input is the container's state.
            spec["hooks"] = json!({ "startContainer": hook("{ cat; echo; echo a $WHAT; } >/told") });
        });
        let stdout = format!("file://{}", out.display());
        let request = CreateTaskRequest { stdout, ..create("hooked", &bundle) };
        shim.tasks().create(patience(), &request).await.unwrap();
        assert!(!bundle.join("rootfs/told").exists(), "before the start");
        shim.start_task("hooked", "").await.unwrap();
        assert_eq!(shim.wait_task("hooked", "").await, 0);
        shim.delete_task("hooked", "").await.unwrap();
        let text = std::fs::read_to_string(&out).unwrap();
        let (state, rest) = text.split_once('\n').unwrap();
        let state: Value = serde_json::from_str(state).unwrap();
        assert_eq!((state["id"].as_str(), rest), (Some("hooked"), "a hook\nand then the program\n"), "{state}");

        // One that fails keeps the program from running.
        change(&bundle, |spec| spec["hooks"] = json!({ "startContainer": hook("exit 3") }));
        std::fs::write(&out, "").unwrap();
        shim.tasks().create(patience(), &request).await.unwrap();
        if shim.start_task("hooked", "").await.is_ok() {
            assert_ne!(shim.wait_task("hooked", "").await, 0);
        }
        shim.delete_task("hooked", "").await.unwrap();
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "");
    });
}

#[test]
fn task_delete_with_an_exec_id_deletes_that_exec_alone() {
    run(async {
        let (shim, _) = Shim::shared().await;
        shim.run("delete", SLEEP).await;
        shim.exec("delete", "one", "exit 4").await;
        shim.exec("delete", "two", SLEEP).await;
        shim.wait_task("delete", "one").await;
        let deleted = shim.delete_task("delete", "one").await.unwrap();
        assert_eq!(deleted.exit_status, 4);
        assert!(deleted.exited_at.seconds > 0 && deleted.pid > 0);
        assert_eq!(refused(shim.delete_task("delete", "one").await).0, Code::NOT_FOUND);
        assert_eq!(shim.status("delete", "").await, Status::RUNNING);
        assert_eq!(shim.status("delete", "two").await, Status::RUNNING);
        for exec_id in ["", "two"] {
            let (code, message) = refused(shim.delete_task("delete", exec_id).await);
            assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        }
        shim.kill("delete", "", Signal::SIGKILL).await.unwrap();
        shim.wait_task("delete", "").await;
        assert_eq!(shim.delete_task("delete", "").await.unwrap().exit_status, 137);
        assert_eq!(refused(shim.delete_task("delete", "").await).0, Code::NOT_FOUND);
    });
}

#[test]
fn task_pids_are_never_none_and_name_their_execs() {
    run(async {
        let (shim, _) = Shim::shared().await;
        let pids = async |id: &str| {
            let request = PidsRequest { id: id.into(), ..Default::default() };
            shim.tasks().pids(patience(), &request).await.map(|answer| answer.processes)
        };
        let bundle = shim.bundle("pids", &["/bin/sh", "-c", SLEEP]);
        shim.tasks().create(patience(), &create("pids", &bundle)).await.unwrap();
        assert!(!pids("pids").await.unwrap().is_empty(), "of what has not been started");
        shim.start_task("pids", "").await.unwrap();
        shim.exec("pids", "beside", SLEEP).await;
        let listed = pids("pids").await.unwrap();
        let named: Vec<String> = listed
            .iter()
            .filter_map(|process| process.info.as_ref())
            .map(|info| {
                assert!(info.type_url.ends_with("ProcessDetails"), "{}", info.type_url);
                ProcessDetails::parse_from_bytes(&info.value).unwrap().exec_id
            })
            .collect();
        assert_eq!(named, ["beside"], "{listed:?}");
        assert!(listed.len() >= 2 && listed.iter().all(|process| process.pid > 0), "{listed:?}");
        shim.kill("pids", "", Signal::SIGKILL).await.unwrap();
        shim.wait_task("pids", "").await;
        // containerd takes none for a container that is gone, when it has been restarted.
        assert!(!pids("pids").await.unwrap().is_empty(), "of what has ended");
        shim.delete_task("pids", "").await.unwrap();
        assert_eq!(refused(pids("pids").await).0, Code::NOT_FOUND);
    });
}

#[test]
fn task_pause_resume_hold_every_process_of_the_container_and_no_other() {
    run(async {
        let (shim, _) = Shim::shared().await;
        let out = shim.run_telling("paused", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done").await;
        says(&out, "ready\n");
        shim.run("unpaused", SLEEP).await;
        let request = PauseRequest { id: "paused".into(), ..Default::default() };
        shim.tasks().pause(patience(), &request).await.unwrap();
        shim.kill("paused", "", Signal::SIGTERM).await.unwrap();
        assert_eq!(shim.status("unpaused", "").await, Status::RUNNING);
        shim.exec("unpaused", "alive", "sleep 1; exit 3").await;
        assert_eq!(shim.wait_task("unpaused", "alive").await, 3);
        assert_eq!(shim.status("paused", "").await, Status::PAUSED, "it has not followed the signal yet");
        let request = ResumeRequest { id: "paused".into(), ..Default::default() };
        shim.tasks().resume(patience(), &request).await.unwrap();
        assert_eq!(shim.wait_task("paused", "").await, 7);
        for id in ["paused", "unpaused"] {
            shim.remove_task(id).await;
        }
    });
}

#[test]
fn task_checkpoint_is_unimplemented_and_harms_nothing() {
    run(async {
        let (shim, _) = Shim::shared().await;
        shim.run("checkpoint", SLEEP).await;
        let request = CheckpointTaskRequest { id: "checkpoint".into(), path: "/tmp".into(), ..Default::default() };
        let (code, message) = refused(shim.tasks().checkpoint(patience(), &request).await);
        assert_eq!(code, Code::UNIMPLEMENTED, "{message}");
        assert_eq!(shim.status("checkpoint", "").await, Status::RUNNING);
        shim.remove_task("checkpoint").await;
    });
}

#[test]
fn task_kill_is_for_init_for_an_exec_or_for_all() {
    run(async {
        let (shim, _) = Shim::shared().await;
        let out = shim.run_telling("kill", "trap 'echo asked' TERM; echo ready; while :; do sleep 0.1; done").await;
        says(&out, "ready\n");
        shim.exec("kill", "one", SLEEP).await;
        shim.exec("kill", "two", SLEEP).await;
        shim.kill("kill", "one", Signal::SIGKILL).await.unwrap();
        assert_eq!(shim.wait_task("kill", "one").await, 137);
        assert_eq!(refused(shim.kill("kill", "one", Signal::SIGKILL).await).0, Code::NOT_FOUND);
        shim.kill("kill", "", Signal::SIGTERM).await.unwrap();
        says(&out, "ready\nasked\n");
        assert_eq!(shim.status("kill", "two").await, Status::RUNNING);
        let all = KillRequest { id: "kill".into(), signal: 9, all: true, ..Default::default() };
        shim.tasks().kill(patience(), &all).await.unwrap();
        assert_eq!((shim.wait_task("kill", "two").await, shim.wait_task("kill", "").await), (137, 137));
        assert_eq!(refused(shim.kill("kill", "", Signal::SIGKILL).await).0, Code::NOT_FOUND);
        shim.delete_task("kill", "").await.unwrap();
    });
}

#[test]
fn task_exec_registers_and_runs_nothing() {
    run(async {
        let (shim, _) = Shim::shared().await;
        shim.run("exec", SLEEP).await;
        let out = shim.dir.join("exec.out");
        let stdout = format!("file://{}", out.display());
        let request = ExecProcessRequest { stdout, ..exec("exec", "one", "echo ran") };
        shim.tasks().exec(patience(), &request).await.unwrap();
        assert_eq!(shim.status("exec", "one").await, Status::CREATED);
        assert_eq!(refused(shim.tasks().exec(patience(), &request).await).0, Code::ALREADY_EXISTS);
        assert!(!out.exists());
        let broken = Any { value: b"{\"args\": ".to_vec(), ..any("Process", &json!({})) };
        let broken = ExecProcessRequest { spec: Some(broken).into(), ..exec("exec", "broken", "true") };
        assert_eq!(refused(shim.tasks().exec(patience(), &broken).await).0, Code::INVALID_ARGUMENT);
        let other = exec("unknown", "one", "true");
        assert_eq!(refused(shim.tasks().exec(patience(), &other).await).0, Code::NOT_FOUND);
        shim.start_task("exec", "one").await.unwrap();
        assert_eq!(shim.wait_task("exec", "one").await, 0);
        shim.delete_task("exec", "one").await.unwrap();
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "ran\n");
        // With the deletion its name is free.
        shim.tasks().exec(patience(), &request).await.unwrap();
        shim.remove_task("exec").await;
    });
}

#[test]
fn task_exec_64_at_once_run_and_end_each_by_itself() {
    run(async {
        let (shim, _) = Shim::shared().await;
        shim.run("many", "sleep 1000").await;
        let names: Vec<String> = (0..64).map(|number| format!("exec-{number}")).collect();
        let started = names.iter().map(async |name| {
            shim.exec("many", name, "exec sleep 1000").await;
            shim.status("many", name).await
        });
        assert_eq!(join_all(started).await, vec![Status::RUNNING; 64]);
        let signals = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGKILL, Signal::SIGUSR1, Signal::SIGTERM];
        let ended = names.iter().zip(signals.iter().cycle()).map(async |(name, signal)| {
            shim.kill("many", name, *signal).await.unwrap();
            let status = shim.wait_task("many", name).await;
            shim.delete_task("many", name).await.unwrap();
            status
        });
        let expected: Vec<u32> = signals.iter().cycle().take(64).map(|signal| 128 + *signal as u32).collect();
        assert_eq!(join_all(ended).await, expected);
        shim.remove_task("many").await;
    });
}

#[test]
fn task_resize_pty_sets_the_size_of_an_execs_terminal() {
    run(async {
        let (shim, _) = Shim::shared().await;
        shim.run("resize", SLEEP).await;
        let (stdin, stdout) = (fifo(&shim.dir.join("resize.in")), fifo(&shim.dir.join("resize.out")));
        let request = ExecProcessRequest {
            terminal: true,
            stdin: stdin.clone(),
            stdout: stdout.clone(),
            ..exec("resize", "terminal", "read line; stty size; exit 6")
        };
        shim.tasks().exec(patience(), &request).await.unwrap();
        shim.start_task("resize", "terminal").await.unwrap();
        let size = ResizePtyRequest {
            id: "resize".into(),
            exec_id: "terminal".into(),
            width: 101,
            height: 37,
            ..Default::default()
        };
        shim.tasks().resize_pty(patience(), &size).await.unwrap();
        let mut output = File::options().read(true).write(true).open(stdout).unwrap();
        File::options().write(true).open(stdin).unwrap().write_all(b"\n").unwrap();
        assert_eq!(shim.wait_task("resize", "terminal").await, 6);
        shim.delete_task("resize", "terminal").await.unwrap();
        let mut bytes = [0; 100];
        let count = output.read(&mut bytes).unwrap();
        let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
        assert!(text.contains("37 101"), "{text:?}");
        let unknown = ResizePtyRequest { exec_id: "unknown".into(), ..size };
        assert_eq!(refused(shim.tasks().resize_pty(patience(), &unknown).await).0, Code::NOT_FOUND);
        shim.remove_task("resize").await;
    });
}

#[test]
fn task_close_io_ends_the_input_of_an_exec() {
    run(async {
        let (shim, _) = Shim::shared().await;
        shim.run("close", SLEEP).await;
        let (stdin, out) = (fifo(&shim.dir.join("close.in")), shim.dir.join("close.out"));
        let stdout = format!("file://{}", out.display());
        let request = ExecProcessRequest { stdin: stdin.clone(), stdout, ..exec("close", "reader", "cat; exit 5") };
        shim.tasks().exec(patience(), &request).await.unwrap();
        shim.start_task("close", "reader").await.unwrap();
        // A client closes its own end before it asks, or afterwards, as `ctr` does: with runc's shim the end is the later of the two.
        let mut writer = File::options().write(true).open(stdin).unwrap();
        writer.write_all(b"last ").unwrap();
        shim.close_input("close", "reader").await;
        writer.write_all(b"words").unwrap();
        drop(writer);
        assert_eq!(shim.wait_task("close", "reader").await, 5);
        shim.delete_task("close", "reader").await.unwrap();
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "last words");

        // A client with nothing to write asks as soon as there is an exec.
        shim.tasks().exec(patience(), &request).await.unwrap();
        shim.close_input("close", "reader").await;
        shim.start_task("close", "reader").await.unwrap();
        assert_eq!(shim.wait_task("close", "reader").await, 5);
        shim.remove_task("close").await;
    });
}

#[test]
fn task_update_changes_limits_of_what_runs() {
    run(async {
        let (shim, _) = Shim::shared().await;
        shim.run("update", SLEEP).await;
        let update = async |resources: Any| {
            let request =
                UpdateTaskRequest { id: "update".into(), resources: Some(resources).into(), ..Default::default() };
            shim.tasks().update(patience(), &request).await
        };
        let resources = json!({ "memory": { "limit": 48 << 20 }, "pids": { "limit": 77 } });
        update(any("LinuxResources", &resources)).await.unwrap();
        let stats = shim.stats("update").await.unwrap();
        assert_eq!((stats.memory.usage_limit, stats.pids.limit), (48 << 20, 77));
        // The machine has the 512 MiB of one without limits.
        let (code, message) =
            refused(update(any("LinuxResources", &json!({ "memory": { "limit": 4_u64 << 30 } }))).await);
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        assert!(message.contains("512 MiB"), "{message}");
        let broken = Any { value: b"{\"memory\": ".to_vec(), ..any("LinuxResources", &json!({})) };
        assert_eq!(refused(update(broken).await).0, Code::INVALID_ARGUMENT);
        assert_eq!(shim.stats("update").await.unwrap().memory.usage_limit, 48 << 20);
        shim.remove_task("update").await;
    });
}

#[test]
fn task_wait_blocks_until_the_exit_and_answers_after_it_too() {
    run(async {
        let (shim, _) = Shim::shared().await;
        shim.run("wait", SLEEP).await;
        shim.exec("wait", "beside", "kill -USR1 $$").await;
        // What a signal ends, its number tells.
        assert_eq!(shim.wait_task("wait", "beside").await, 128 + Signal::SIGUSR1 as u32);
        assert_eq!(shim.wait_task("wait", "beside").await, 128 + Signal::SIGUSR1 as u32);
        let mut waiting = Box::pin(shim.wait_task("wait", ""));
        tokio::select! {
            biased;
            exit = &mut waiting => panic!("it runs, and {exit} was answered"),
            // An answer to what was asked later, on the same connection.
            status = shim.status("wait", "") => assert_eq!(status, Status::RUNNING),
        }
        shim.kill("wait", "", Signal::SIGKILL).await.unwrap();
        assert_eq!((waiting.await, shim.wait_task("wait", "").await), (137, 137));
        shim.delete_task("wait", "").await.unwrap();
        let request = WaitRequest { id: "wait".into(), ..Default::default() };
        assert_eq!(refused(shim.tasks().wait(patience(), &request).await).0, Code::NOT_FOUND);
    });
}

#[test]
fn task_stats_are_answered_until_the_delete() {
    run(async {
        let (shim, _) = Shim::shared().await;
        let bundle = shim.bundle("stats", &["/bin/sh", "-c", SLEEP]);
        change(&bundle, |spec| spec["linux"]["resources"] = json!({ "memory": { "limit": 32 << 20 } }));
        shim.tasks().create(patience(), &create("stats", &bundle)).await.unwrap();
        shim.start_task("stats", "").await.unwrap();
        let stats = shim.stats("stats").await.unwrap();
        assert_eq!(stats.memory.usage_limit, 32 << 20);
        assert!(stats.memory.usage > 0 && stats.memory.anon > 0 && stats.memory.pgfault > 0, "{stats}");
        assert!(stats.cpu.usage_usec > 0 && stats.pids.current >= 1, "{stats}");
        assert!(stats.cpu.psi.is_some() && stats.memory.psi.is_some(), "{stats}");

        // Of what was killed for want of memory, for that is when CRI asks.
        shim.exec("stats", "greedy", "exec dd if=/dev/zero of=/dev/null bs=64M count=1").await;
        assert_eq!(shim.wait_task("stats", "greedy").await, 137);
        shim.kill("stats", "", Signal::SIGKILL).await.unwrap();
        assert_eq!(shim.wait_task("stats", "").await, 137);
        let stats = shim.stats("stats").await.unwrap();
        assert!(stats.memory_events.oom_kill > 0, "{stats}");
        shim.delete_task("stats", "").await.unwrap();
        assert_eq!(refused(shim.stats("stats").await).0, Code::NOT_FOUND);
    });
}

#[test]
fn task_connect_tells_the_pids_of_shim_and_task() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        let answer = shim.tasks().connect(patience(), &ConnectRequest::new()).await.unwrap();
        assert_eq!((i32::try_from(answer.shim_pid).unwrap(), answer.task_pid), (shim.pid(), vmm));
        // As containerd asks when it has been restarted, of a container that may be gone.
        let request = ConnectRequest { id: "unknown".into(), ..Default::default() };
        assert_eq!(shim.tasks().connect(patience(), &request).await.unwrap().task_pid, vmm);
    });
}

#[test]
fn task_shutdown_ends_the_shim_only_when_no_task_remains() {
    run(async {
        let shim = Shim::start("alone").await;
        let bundle = shim.single_bundle(SLEEP);
        shim.tasks().create(patience(), &create("alone", &bundle)).await.unwrap();
        shim.start_task("alone", "").await.unwrap();
        let shutdown = ShutdownRequest { id: "alone".into(), ..Default::default() };
        shim.tasks().shutdown(patience(), &shutdown).await.unwrap();
        assert_eq!(shim.status("alone", "").await, Status::RUNNING);
        shim.kill("alone", "", Signal::SIGKILL).await.unwrap();
        shim.wait_task("alone", "").await;
        shim.tasks().shutdown(patience(), &shutdown).await.unwrap();
        assert_eq!(shim.status("alone", "").await, Status::STOPPED);
        let deleted = shim.delete_task("alone", "").await.unwrap();
        assert_eq!(deleted.exit_status, 137);
        fixture::wait_gone(deleted.pid.try_into().unwrap());
        shim.tasks().shutdown(patience(), &shutdown).await.unwrap();
        fixture::wait_gone(shim.pid());
    });
}

#[test]
fn task_shutdown_lets_its_clients_close_and_nothing_more_be_created() {
    run(async {
        let shim = Shim::start("closing").await;
        let socket = std::fs::read_to_string(shim.dir.join("shim.socket")).unwrap();
        let another = Client::connect(&format!("unix://{socket}")).await.unwrap();
        let shutdown = ShutdownRequest { id: "closing".into(), ..Default::default() };
        shim.tasks().shutdown(patience(), &shutdown).await.unwrap();
        // Go's client may take the end of its connection for the answer if both are there.
        let bundle = shim.single_bundle(SLEEP);
        let (code, reason) = refused(TaskClient::new(another).create(patience(), &create("closing", &bundle)).await);
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(reason.contains("about to end"), "{reason}");
        fixture::wait_gone(shim.pid());
    });
}
