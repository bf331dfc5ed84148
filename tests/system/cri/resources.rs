//! What a pod may use: its machine's size, what it is accounted to on the node, and what is told when memory runs out.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use fixture::containerd::{RUNTIME, ctr};
use fixture::cri::{Container, Pod, cgroup_below, eventually, handlers};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MIB: i64 = 1 << 20;
/// Takes more memory than a container has, or than the node has for the machine, and touches it.
const GREEDY: &str = "exec dd if=/dev/zero of=/dev/null bs=100M count=1";

#[test]
fn a_container_that_runs_out_of_memory_is_told_so() {
    // Not with runc, whose shim can miss the reason: it is told of it by an event of the cgroup's, which may be gone by then.
    let handler = handlers()[0];
    let pod = Pod::start(handler, |config| {
        let linux = config.linux.mut_or_insert_default();
        // The sum of the containers', as the kubelet has it, and what its RuntimeClass says of the machine.
        let resources = linux.resources.mut_or_insert_default();
        (resources.memory_limit_in_bytes, resources.cpu_period) = (192 * MIB, 100_000);
        resources.cpu_quota = 150_000;
        linux.overhead.mut_or_insert_default().memory_limit_in_bytes = 64 * MIB;
    });
    its_machine_is_as_large_as_its_limits(&pod);
    the_cgroup_of_the_kubelet_holds_shim_and_monitor(&pod);
    let greedy = pod.run("greedy", GREEDY, |config| {
        (config.resources().memory_limit_in_bytes, config.resources().oom_score_adj) = (64 * MIB, 100);
    });
    assert_eq!(oom_score_adj(&pod), 100, "as dear as its only container");
    assert_eq!(end_for_want_of_memory(&greedy), "137 OOMKilled");
    assert_eq!(pod.status().state, 0, "the pod runs on");
    pod.end();
}

fn its_machine_is_as_large_as_its_limits(pod: &Pod) {
    // The least that Kubernetes' own tests ask for.
    let small = pod.run("small", "exec sleep 1000", |config| {
        (config.resources().memory_limit_in_bytes, config.resources().oom_score_adj) = (16 * MIB, 900);
    });
    assert_eq!(oom_score_adj(pod), 900, "the node's kernel is to rank the machine as the kubelet ranks the container");
    assert_eq!(small.exec("cat /sys/fs/cgroup/memory.max; nproc"), "16777216\n2", "one and a half take two");
    let total: i64 = small.exec("awk '$1 == \"MemTotal:\" { print $2 }' /proc/meminfo").parse().unwrap();
    // What is for the guest itself comes on top.
    assert!((192..=288).contains(&(total / 1024)), "{total} KiB");
    small.stop(0);
    small.remove();
}

fn the_cgroup_of_the_kubelet_holds_shim_and_monitor(pod: &Pod) {
    let programs: BTreeSet<_> = processes_in(&pod.cgroup()).into_iter().map(|(_, program)| program).collect();
    let expected = ["containerd-shim-hull-v2", "hull-vmm"].map(str::to_owned);
    assert_eq!(programs, expected.into());
}

/// Of the pod's VMM.
fn oom_score_adj(pod: &Pod) -> i32 {
    let processes = processes_in(&pod.cgroup());
    let (pid, _) = processes.iter().find(|(_, program)| program == "hull-vmm").expect("a machine");
    fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().parse().unwrap()
}

/// All processes in a cgroup and below: their numbers and their programs.
fn processes_in(cgroup: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for pid in fs::read_to_string(cgroup.join("cgroup.procs")).unwrap().lines() {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        let program = String::from_utf8_lossy(line.split(|byte| *byte == 0).next().unwrap()).into_owned();
        found.push((pid.to_owned(), program.rsplit('/').next().unwrap().to_owned()));
    }
    for entry in fs::read_dir(cgroup).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(processes_in(&entry.path()));
        }
    }
    found
}

/// Its exit code and the reason.
fn end_for_want_of_memory(container: &Container) -> String {
    container.ended();
    // The reason comes by an event of its own.
    eventually("the reason is told", || match container.status() {
        status if status.reason == "OOMKilled" => Ok(format!("{} {}", status.exit_code, status.reason)),
        status => Err(status.to_string()),
    })
}

fn is_not_ready_soon(handler: &str, pod: &Pod) {
    eventually("the pod is not ready", || match pod.status().state {
        1 => Ok(()),
        state => Err(format!("{handler}: its state is {state}")),
    });
}

/// Leaves a cgroup this much more than it has.
fn limit(cgroup: &Path, more: i64) {
    let current: i64 = fs::read_to_string(cgroup.join("memory.current")).unwrap().trim().parse().unwrap();
    fs::write(cgroup.join("memory.max"), (current + more).to_string()).unwrap();
}

#[test]
fn a_machine_that_the_node_kills_for_want_of_memory_is_told_as_such() {
    for handler in handlers().iter().copied() {
        println!("with {handler}");
        let pod = Pod::start(handler, |_| {});
        let first = pod.run("first", "exec sleep 1000", |_| {});
        let second = pod.run("second", "exec sleep 1000", |_| {});
        limit(&pod.cgroup(), 32 * MIB);
        // It has no end that anybody could tell of.
        let executed = first.try_exec(GREEDY, 0);
        println!("{executed:?}");
        for container in [&first, &second] {
            assert_eq!(end_for_want_of_memory(container), "137 OOMKilled", "{handler}");
        }
        is_not_ready_soon(handler, &pod);
        pod.end();
    }
}

#[test]
fn a_pod_whose_shim_dies_is_not_ready_and_leaves_nothing() {
    for handler in handlers().iter().copied() {
        println!("with {handler}");
        let pod = Pod::start(handler, |_| {});
        let container = pod.run("first", "exec sleep 1000", |_| {});
        let processes = processes_in(&pod.cgroup());
        let (shim, _) = processes.iter().find(|(_, program)| program.starts_with("containerd-shim-")).expect("a shim");
        kill(Pid::from_raw(shim.parse().unwrap()), Signal::SIGKILL).unwrap();
        container.ended();
        is_not_ready_soon(handler, &pod);
        // Asserts that nothing is left.
        pod.end();
    }
}

#[test]
fn statistics_of_such_a_machines_container_are_answered_until_the_delete() {
    // By ctr, for CRI deletes a task as soon as it has ended.
    let cgroup = "/hull-test-oom";
    let options = ["run", "-d", "--runtime", RUNTIME, "--cgroup", cgroup];
    ctr(options.into_iter().chain([fixture::containerd::BUSYBOX, "short", "sleep", "1000"])).ok();
    limit(&cgroup_below(cgroup), 32 * MIB);
    let _ = ctr(["task", "exec", "--exec-id", "greedy", "short", "sh", "-c", GREEDY]);
    eventually("the task has ended", || match ctr(["task", "ls"]).text() {
        text if text.contains("STOPPED") => Ok(()),
        text => Err(text),
    });
    let metrics = ctr(["task", "metrics", "--format", "json", "short"]).ok();
    let metrics: serde_json::Value = serde_json::from_str(&metrics).unwrap();
    assert_eq!(metrics["memory_events"]["oom_kill"], 1, "{metrics}");
    ctr(["task", "delete", "short"]);
    ctr(["container", "delete", "short"]).ok();
    assert!(!cgroup_below(cgroup).exists());
}
