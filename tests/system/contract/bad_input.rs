//! What containerd, or whoever stands in for it, may get wrong: the code that it acts on, the cause by name, and nothing left that
//! would be in the way of doing it right.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use containerd_shim_protos::api::{ConnectRequest, PidsRequest};
use containerd_shim_protos::sandbox_api::PlatformRequest;
use rustix::process::{Resource, Rlimit};

use super::*;

#[test]
fn task_create_of_a_container_that_cannot_be_is_refused_by_its_cause_and_leaves_its_name_free() {
    // Before the shim, which may not see what is mounted later.
    let disk = Small::new();
    run(async {
        let (shim, _) = Shim::with_sandbox("wrong").await;
        let tasks = shim.tasks();
        let bundle = shim.bundle("one", &["/bin/sh", "-c", "exit 5"]);
        let good = std::fs::read(bundle.join("config.json")).unwrap();
        let wrong = async |expected: Code, words: &[&str]| {
            let (code, message) = refused(tasks.create(patience(), &create("one", &bundle)).await);
            assert_eq!(code, expected, "{message}");
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
            shim.assert_no_mounts_of("one");
            std::fs::write(bundle.join("config.json"), &good).unwrap();
        };

        std::fs::write(bundle.join("config.json"), "{\"ociVersion\": ").unwrap();
        wrong(Code::INVALID_ARGUMENT, &["config.json is broken"]).await;
        std::fs::remove_file(bundle.join("config.json")).unwrap();
        wrong(Code::INVALID_ARGUMENT, &["config.json is missing"]).await;
        change(&bundle, |spec| spec["root"]["path"] = "nothing".into());
        wrong(Code::INVALID_ARGUMENT, &["root", "one/nothing"]).await;
        change(&bundle, |spec| {
            let gone = json!({ "destination": "/v", "type": "bind", "source": "/vanished", "options": ["rbind"] });
            spec["mounts"].as_array_mut().unwrap().push(gone);
        });
        wrong(Code::FAILED_PRECONDITION, &["/vanished"]).await;
        change(&bundle, |spec| spec["annotations"]["io.kubernetes.cri.sandbox-id"] = "another".into());
        wrong(Code::INVALID_ARGUMENT, &["another", "wrong"]).await;
        change(&bundle, |spec| spec["annotations"]["io.kubernetes.cri.container-type"] = "neither".into());
        wrong(Code::INVALID_ARGUMENT, &["container-type", "neither"]).await;
        change(&bundle, |spec| {
            spec["linux"]["devices"] = json!([{ "path": "/dev/x", "type": "b", "major": 4095, "minor": 7 }]);
            spec["linux"]["maskedPaths"] = json!(["/proc/kcore"]);
        });
        wrong(Code::FAILED_PRECONDITION, &["disk 4095:7"]).await;
        for kind in ["prestart", "createRuntime", "createContainer", "poststart", "poststop"] {
            change(&bundle, |spec| spec["hooks"] = json!({ kind: [{ "path": "/bin/hook" }] }));
            wrong(Code::INVALID_ARGUMENT, &[&format!("hooks.{kind}"), "/bin/hook"]).await;
        }
        let full = disk.path().join("root");
        std::fs::create_dir(&full).unwrap();
        let elsewhere = disk.path().join("bundle");
        std::fs::create_dir(&elsewhere).unwrap();
        change(&bundle, |spec| spec["root"]["path"] = full.to_str().unwrap().into());
        std::fs::copy(bundle.join("config.json"), elsewhere.join("config.json")).unwrap();
        disk.fill();
        let log = format!("file://{}", disk.path().join("log").display());
        for (request, what) in [
            // In the guest, that no place for a mount can be made. By another name: the guest may take this root for the next one that is
            // called the same, for a second.
            (create("full", &bundle), "create the container"),
            // On the node, that no stream and no file for the guest can.
            (CreateTaskRequest { stdout: log.clone(), ..create("one", &bundle) }, log.as_str()),
            (create("one", &elsewhere), "hostname"),
        ] {
            let (code, message) = refused(tasks.create(patience(), &request).await);
            assert_eq!(code, Code::RESOURCE_EXHAUSTED, "{message}");
            assert!(message.contains(what) && message.contains("No space left"), "{message}");
            shim.assert_no_mounts_of(&request.id);
        }
        std::fs::write(bundle.join("config.json"), &good).unwrap();
        change(&bundle, |spec| spec["process"]["args"] = json!(["/no/such/program"]));
        let created = tasks.create(patience(), &create("one", &bundle)).await;
        if created.is_ok() {
            assert!(refused(shim.start_task("one", "").await).1.contains("/no/such/program"));
            shim.delete_task("one", "").await.unwrap();
        } else {
            let (_, message) = refused(created);
            assert!(message.contains("/no/such/program"), "{message}");
        }

        // Nothing of all that is in the way.
        std::fs::write(bundle.join("config.json"), &good).unwrap();
        tasks.create(patience(), &create("one", &bundle)).await.unwrap();
        let (code, message) = refused(tasks.create(patience(), &create("one", &bundle)).await);
        assert_eq!(code, Code::ALREADY_EXISTS, "{message}");
        shim.start_task("one", "").await.unwrap();
        assert_eq!(shim.wait_task("one", "").await, 5);
        shim.delete_task("one", "").await.unwrap();
        shim.end().await;
    });
}

#[test]
fn task_create_in_a_network_namespace_that_does_not_exist_is_refused_and_leaves_nothing() {
    run(async {
        let shim = Shim::start("nowhere").await;
        let bundle = shim.single_bundle("true");
        change(&bundle, |spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            let network = namespaces.iter_mut().find(|namespace| namespace["type"] == "network").unwrap();
            network["path"] = "/run/netns/no-such".into();
        });
        // Again, since what was refused is not to be in the way.
        for _ in 0..2 {
            let (code, message) = refused(shim.tasks().create(patience(), &create("nowhere", &bundle)).await);
            assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
            assert!(message.contains("the network namespace /run/netns/no-such does not exist"), "{message}");
            assert_eq!(refused(shim.state("nowhere", "").await).0, Code::NOT_FOUND);
        }
        shim.end().await;
    });
}

#[test]
fn task_create_without_room_for_what_hull_keeps_says_so_and_leaves_nothing() {
    let state = Small::new();
    run(async {
        let shim = Shim::start_with("cramped", |command| command.env("HULL_STATE_DIR", state.path())).await;
        let bundle = shim.single_bundle("true");
        // With room for more names each time, until there is enough for a machine.
        let mut names = 1;
        loop {
            assert!(names < 32, "that is room enough");
            state.remount(&format!("nr_inodes={names}"));
            let answer = shim.tasks().create(patience(), &create("cramped", &bundle)).await;
            if answer.is_ok() {
                assert!(names > 6, "a machine has a lock, a record, a directory and two sockets in it: {names}");
                break;
            }
            let (code, message) = refused(answer);
            println!("{names}: {message}");
            assert_eq!(code, Code::RESOURCE_EXHAUSTED, "{names}: {message}");
            assert!(message.contains(state.path().to_str().unwrap()), "{names}: {message}");
            assert!(message.contains("No space left"), "{names}: {message}");
            assert_eq!(refused(shim.state("cramped", "").await).0, Code::NOT_FOUND);
            let left = std::fs::read_dir(state.path()).unwrap();
            let left = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            // All sandboxes' locks begin with a dot.
            let left: Vec<_> = left.filter(|name| !name.starts_with('.')).collect();
            assert!(left.is_empty(), "{names}: {left:?}");
            names += 1;
        }
        shim.remove_task("cramped").await;
        shim.end().await;
    });
}

#[test]
fn task_kill_ends_what_runs_in_a_machine_that_does_not_answer() {
    run(async {
        let (shim, vmm) = Shim::with_sandbox("silent").await;
        shim.run("one", "sleep 1000").await;
        nix::sys::signal::kill(Pid::from_raw(vmm.try_into().unwrap()), Signal::SIGSTOP).unwrap();
        // Half a minute is what an answer may take.
        shim.kill("one", "", Signal::SIGKILL).await.unwrap();
        assert_eq!(shim.wait_task("one", "").await, 137);
        assert_eq!(shim.delete_task("one", "").await.unwrap().exit_status, 137);
        assert_eq!(shim.sandbox_status().await.state, "SANDBOX_NOTREADY");
        shim.end().await;
    });
}

#[test]
fn task_kill_and_exec_tell_what_has_ended_from_what_was_never_there() {
    run(async {
        let (shim, vmm) = Shim::with_sandbox("ended").await;
        let tasks = shim.tasks();
        let bundle = shim.bundle("one", &["/bin/sh", "-c", "read line"]);
        tasks.create(patience(), &create("one", &bundle)).await.unwrap();
        let exec = |exec_id: &str| exec("one", exec_id, "exit 4");

        // The first process reads /dev/null and ends as soon as it is started, so the exec is registered before.
        tasks.exec(patience(), &exec("early")).await.unwrap();
        let (code, message) = refused(shim.start_task("one", "early").await);
        assert_eq!(code, Code::FAILED_PRECONDITION, "before the container runs: {message}");
        shim.start_task("one", "").await.unwrap();
        shim.wait_task("one", "").await;
        let (code, message) = refused(shim.start_task("one", "early").await);
        assert_eq!(code, Code::FAILED_PRECONDITION, "after it has ended: {message}");
        let (code, message) = refused(tasks.exec(patience(), &exec("late")).await);
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        assert!(message.contains("has stopped"), "{message}");
        for (id, exec_id) in [("one", ""), ("one", "unknown"), ("unknown", "")] {
            assert_eq!(refused(shim.kill(id, exec_id, Signal::SIGKILL).await).0, Code::NOT_FOUND);
        }
        shim.delete_task("one", "").await.unwrap();

        // An exec that has ended in a container that has not.
        let bundle = shim.bundle("one", &["/bin/sleep", "1000"]);
        tasks.create(patience(), &create("one", &bundle)).await.unwrap();
        shim.start_task("one", "").await.unwrap();
        tasks.exec(patience(), &exec("short")).await.unwrap();
        assert_eq!(refused(tasks.exec(patience(), &exec("short")).await).0, Code::ALREADY_EXISTS);
        shim.start_task("one", "short").await.unwrap();
        assert_eq!(shim.wait_task("one", "short").await, 4);
        let (code, message) = refused(shim.kill("one", "short", Signal::SIGKILL).await);
        assert_eq!(code, Code::NOT_FOUND, "{message}");
        assert!(message.contains("short") && message.contains("ended"), "{message}");

        // The machine's death is that of all in it, and no other comes in its place.
        nix::sys::signal::kill(Pid::from_raw(vmm.try_into().unwrap()), Signal::SIGKILL).unwrap();
        assert_eq!(shim.wait_task("one", "").await, 137);
        let bundle = shim.bundle("two", &["/bin/sh"]);
        let (code, message) = refused(tasks.create(patience(), &create("two", &bundle)).await);
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        assert!(message.contains("virtual machine is gone"), "{message}");
        assert_eq!(refused(shim.state("two", "").await).0, Code::NOT_FOUND);
        shim.delete_task("one", "").await.unwrap();
        shim.end().await;
    });
}

#[test]
fn sandbox_create_of_what_cannot_be_is_refused_by_its_cause() {
    run(async {
        let shim = Shim::start("size").await;
        let sandbox = shim.sandbox();
        let request = |key: &str, value: &str| CreateSandboxRequest {
            sandbox_id: "size".into(),
            annotations: [(format!("io.katacontainers.config.hypervisor.{key}"), value.to_owned())].into(),
            ..Default::default()
        };
        for (key, value) in [("default_vcpus", "-1"), ("default_vcpus", "many"), ("default_memory", "1e9")] {
            let (code, message) = refused(sandbox.create_sandbox(patience(), &request(key, value)).await);
            assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
            assert!(message.contains(key) && message.contains(value), "{message}");
        }
        // A number, and one that no guest starts with.
        sandbox.create_sandbox(patience(), &request("default_memory", "1")).await.unwrap();
        let again = refused(sandbox.create_sandbox(patience(), &request("default_memory", "256")).await);
        assert_eq!(again.0, Code::ALREADY_EXISTS, "{}", again.1);
        let start = StartSandboxRequest { sandbox_id: "size".into(), ..Default::default() };
        let (code, message) = refused(sandbox.start_sandbox(patience(), &start).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains("memory"), "{message}");
        shim.end().await;
    });
}

#[test]
fn binary_start_twice_says_so_and_the_first_goes_on() {
    run(async {
        let shim = Shim::start("twice").await;
        let second = start_by_message("twice", &shim.dir, NOBODY);
        assert!(!second.status.success());
        let said = String::from_utf8_lossy(&second.stderr).into_owned();
        assert!(said.contains("a shim already exists"), "{said}");
        let platform = shim.sandbox().platform(patience(), &PlatformRequest::new()).await.unwrap();
        assert_eq!(platform.platform.os, "linux");
        shim.end().await;
    });
}

#[test]
fn streams_fifo_that_nobody_reads_holds_nothing_up_but_its_process() {
    run(async {
        let (shim, _) = Shim::with_sandbox("fifo").await;
        let tasks = shim.tasks();
        let fifo = shim.dir.join("out");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let request =
            |bundle: &Path| CreateTaskRequest { stdout: fifo.to_str().unwrap().into(), ..create("one", bundle) };
        let endless = "i=0; while :; do i=$((i+1)); echo $i; done";
        let bundle = shim.bundle("one", &["/bin/sh", "-c", endless]);
        tasks.create(patience(), &request(&bundle)).await.unwrap();
        shim.start_task("one", "").await.unwrap();
        // A reader that vanishes, and another: between them nothing is lost but what the first had taken.
        let reader = || {
            let fifo = fifo.clone();
            tokio::task::spawn_blocking(move || {
                let mut bytes = vec![0; 100_000];
                File::open(fifo).unwrap().read_exact(&mut bytes).unwrap();
                bytes
            })
        };
        let mut seen = reader().await.unwrap();
        seen.extend(reader().await.unwrap());
        let text = String::from_utf8(seen).unwrap();
        let numbers: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
        // The last line may be cut.
        assert!(numbers[..numbers.len() - 1].iter().zip(1..).all(|(number, line)| *number == line));

        shim.kill("one", "", Signal::SIGKILL).await.unwrap();
        assert_eq!(shim.wait_task("one", "").await, 137);
        // With what nobody has read still in the FIFO.
        shim.delete_task("one", "").await.unwrap();

        let missing = CreateTaskRequest { stdout: "/no/such/fifo".into(), ..create("one", &bundle) };
        let (code, message) = refused(tasks.create(patience(), &missing).await);
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        assert!(message.contains("/no/such/fifo"), "{message}");
        shim.end().await;
    });
}

#[test]
fn streams_fifo_that_nobody_ever_opens_holds_nothing_up() {
    run(async {
        let (shim, _) = Shim::shared().await;
        let [stdin, stdout, stderr] = ["unopened.in", "unopened.out", "unopened.err"].map(|name| {
            let path = shim.dir.join(name);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            path.to_str().unwrap().to_owned()
        });
        // With nothing written and with something, also where what is said to be a file is a FIFO; and with an input that never comes.
        let written = "echo out; echo err >&2;";
        for (number, (script, scheme)) in [("", ""), (written, ""), (written, "file://")].into_iter().enumerate() {
            let script = format!("{script} echo >/told.{number}; exec cat");
            let bundle = shim.bundle("unopened", &["/bin/sh", "-c", &script]);
            let (stdin, stdout, stderr) = (stdin.clone(), format!("{scheme}{stdout}"), format!("{scheme}{stderr}"));
            let request = CreateTaskRequest { stdin, stdout, stderr, ..create("unopened", &bundle) };
            shim.tasks().create(patience(), &request).await.unwrap();
            shim.start_task("unopened", "").await.unwrap();
            says(&bundle.join("rootfs").join(format!("told.{number}")), "\n");
            assert_eq!(shim.status("unopened", "").await, Status::RUNNING);
            shim.kill("unopened", "", Signal::SIGKILL).await.unwrap();
            assert_eq!(shim.wait_task("unopened", "").await, 137);
            assert_eq!(shim.delete_task("unopened", "").await.unwrap().exit_status, 137);
        }
    });
}

/// Lets a shim open no more than so many further files, until it is dropped.
struct Few {
    shim: rustix::process::Pid,
    before: Rlimit,
}

impl Few {
    fn leave(shim: &Shim, count: usize) -> Self {
        let used = std::fs::read_dir(format!("/proc/{}/fd", shim.pid())).unwrap();
        let used: BTreeSet<u64> = used.map(|fd| fd.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
        let limit = (0..).filter(|number| !used.contains(number)).nth(count).unwrap();
        let shim = rustix::process::Pid::from_raw(shim.pid()).unwrap();
        let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
        let before = rustix::process::prlimit(Some(shim), Resource::Nofile, limit).unwrap();
        Self { shim, before }
    }
}

impl Drop for Few {
    fn drop(&mut self) {
        rustix::process::prlimit(Some(self.shim), Resource::Nofile, self.before.clone()).unwrap();
    }
}

#[test]
fn task_start_of_an_exec_whose_streams_cannot_be_opened_leaves_nothing_of_it() {
    run(async {
        let (shim, _) = Shim::shared().await;
        shim.run("few", "exec sleep 1000").await;
        let [stdin, stdout] = ["few.in", "few.out"].map(|name| {
            let path = shim.dir.join(name);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            path.to_str().unwrap().to_owned()
        });
        let request = ExecProcessRequest { terminal: true, stdin, stdout, ..exec("few", "one", "exec sleep 1000") };
        shim.tasks().exec(patience(), &request).await.unwrap();
        let mut refusals = 0;
        loop {
            let few = Few::leave(&shim, refusals);
            let started = shim.start_task("few", "one").await;
            drop(few);
            if started.is_ok() {
                break;
            }
            let (_, message) = refused(started);
            assert!(message.contains("Too many open files"), "{refusals}: {message}");
            let request = PidsRequest { id: "few".into(), ..Default::default() };
            let processes = shim.tasks().pids(patience(), &request).await.unwrap().processes;
            assert_eq!(processes.len(), 1, "{refusals}: {processes:?}");
            assert_eq!(shim.status("few", "one").await, Status::CREATED);
            refusals += 1;
        }
        assert!(refusals > 0);
        shim.remove_task("few").await;
    });
}

#[test]
fn task_create_goes_on_when_its_client_vanishes() {
    run(async {
        let (shim, _) = Shim::shared().await;
        let (other, _) = Shim::shared().await;
        let request = create("vanished", &shim.bundle("vanished", &["/bin/sleep", "1000"]));
        {
            let (tasks, connect) = (other.tasks(), ConnectRequest::new());
            let mut creating = Box::pin(tasks.create(patience(), &request));
            tokio::select! {
                biased;
                created = &mut creating => drop(created.unwrap()),
                // Asked for after it on the same connection: the shim has both requests when it answers.
                answer = tasks.connect(patience(), &connect) => drop(answer.unwrap()),
            }
        }
        drop(other);
        let mut state = shim.state("vanished", "").await;
        while let Err(error) = state {
            assert_eq!(refused::<()>(Err(error)).0, Code::NOT_FOUND);
            state = shim.state("vanished", "").await;
        }
        assert_eq!(shim.status("vanished", "").await, Status::CREATED);
        shim.start_task("vanished", "").await.unwrap();
        shim.remove_task("vanished").await;
    });
}

/// A small file system; unmounted when dropped.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = ["-t", "tmpfs", "-o", "size=64k,nr_inodes=32", "tmpfs"];
        assert!(Command::new("mount").args(options).arg(dir.path()).status().unwrap().success());
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        assert!(Command::new("mount").args(["-o", &options]).arg(self.path()).status().unwrap().success());
    }

    /// Leaves no room for a byte or a name.
    fn fill(&self) {
        let mut filler = File::create(self.path().join("filler")).unwrap();
        assert_eq!(filler.write_all(&[0; 1 << 20]).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
        let names = (0..).map(|number| File::create(self.path().join(format!("name{number}"))));
        let error = names.filter_map(Result::err).next().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy"]).arg(self.0.path()).status();
    }
}

#[test]
fn binary_start_on_a_full_disk_says_so_and_leaves_nothing() {
    let disk = Small::new();
    disk.fill();
    let output = start_by_message("full", disk.path(), NOBODY);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && output.stdout.is_empty(), "{said}");
    assert!(said.contains("No space left"), "{said}");
    let shims = fixture::containerd::processes("containerd-shim-hull-v2");
    assert!(!shims.iter().any(|(_, words)| words.iter().any(|word| word == "full")), "{shims:?}");
    let left: Vec<_> = std::fs::read_dir(disk.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let sockets = left.iter().filter(|name| name.len() == 64).count();
    assert_eq!(sockets, 0, "{left:?}");
}

#[test]
fn streams_file_on_a_full_disk_holds_nothing_up() {
    let disk = Small::new();
    run(async {
        let (shim, _) = Shim::with_sandbox("full").await;
        let out = disk.path().join("out");
        let stdout = format!("file://{}", out.display());
        let request = CreateTaskRequest {
            stdout,
            ..create("one", &shim.bundle("one", &["/bin/sh", "-c", "while echo line; do :; done; sleep 1000"]))
        };
        shim.tasks().create(patience(), &request).await.unwrap();
        shim.start_task("one", "").await.unwrap();
        eventually("the disk is full", || match std::fs::metadata(&out).unwrap().len() {
            65_536 => Ok(()),
            length => Err(length.to_string()),
        });
        // Whatever the program makes of it, others go on, and it can be ended.
        shim.run("two", "exit 5").await;
        assert_eq!(shim.wait_task("two", "").await, 5);
        let _ = shim.kill("one", "", Signal::SIGKILL).await;
        let exit = shim.wait_task("one", "").await;
        assert!(exit == 137 || exit == 128 + Signal::SIGPIPE as u32, "{exit}");
        shim.delete_task("one", "").await.unwrap();
        shim.delete_task("two", "").await.unwrap();
        shim.end().await;
    });
}
