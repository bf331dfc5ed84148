//! Pods by CRI, as the kubelet asks for them. What a client sees of each is compared with what it sees of the same pod with runc.
//!
//! `lab/run --containerd` and `--containerd=2` have what these need; see `tests/run`.

use fixture::cri::{Pod, handlers_and_runc, is_hull};

/// What a client sees of the life of a pod with a container.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    exit_code: i32,
    reason: String,
    log: Vec<String>,
    output: String,
    failure: (i32, String, String),
}

#[test]
fn a_container_lives_from_run_to_remove() {
    let seen: Vec<Seen> = handlers_and_runc().map(live).collect();
    for other in &seen[1..] {
        assert_eq!(seen[0], *other);
    }
}

fn live(handler: &str) -> Seen {
    let pod = Pod::start(handler, |_| {});
    assert_eq!(pod.status().state, 0, "the pod is ready");
    let script = "echo out; echo err >&2; trap 'echo asked; exit 9' TERM; while :; do sleep 0.1; done";
    let container = pod.run("main", script, |config| {
        config.linux.mut_or_insert_default().resources.mut_or_insert_default().memory_limit_in_bytes = 64 << 20;
    });
    container.logs("stdout F out");
    container.logs("stderr F err");
    let kernel = container.exec("uname -r");
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(kernel != host.trim(), is_hull(handler), "{handler} runs on {kernel}");
    let output = container.exec("hostname; id -u; cat /sys/fs/cgroup/memory.max; ls -d /proc/1");
    let failure = container.try_exec("echo partly; echo wrong >&2; exit 3", 0).unwrap();
    container.stop(30);
    let status = container.ended();
    let log = container.log_lines();
    container.remove();
    pod.end();
    let failure = (failure.code, failure.stdout, failure.stderr);
    Seen { exit_code: status.exit_code, reason: status.reason.clone(), log, output, failure }
}
