//! Pods by CRI, as the kubelet asks for them. What a client sees of each is compared with what it sees of the same pod with runc.
//!
//! `lab/run --containerd` and `--containerd=2` have what these need; see `tests/run`.

mod block;
mod images;
mod resources;
mod restart;
mod roots;
mod security;
mod semantics;
mod sharing;
mod streaming;
mod volumes;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fixture::cri::api::{PodSandboxStats, PortMapping};
use fixture::cri::{
    Code, Container, Executed, Pod, STDERR, STDIN, STDOUT, Streams, cri, debian, eventually, handler_and_runc,
    handlers_and_runc, is_hull,
};

/// A port of the node that is published.
const HOST_PORT: u16 = 18080;
/// Seconds that an exec is idle for. Elsewhere execs have been seen to freeze after thirty.
const IDLE_SECONDS: u64 = 35;
/// More of them, such as an hour.
const IDLE_SECONDS_VARIABLE: &str = "HULL_TEST_IDLE_SECONDS";

/// What is seen with each handler is what is seen with runc, which comes last.
#[track_caller]
fn all_alike(seen: &[String]) {
    for other in seen {
        assert_eq!(Some(other), seen.last());
    }
}

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
    // Shown where the test fails.
    println!("with {handler}");
    let pod = Pod::start(handler, |config| {
        let most = "io.katacontainers.config.hypervisor.default_maxvcpus";
        config.annotations.insert(most.to_owned(), "2".to_owned());
    });
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
    let mut log = container.log_lines();
    // The streams have no order between them.
    log[..2].sort();
    container.remove();
    limits_and_statistics_are_its_own(handler, &pod);
    its_log_goes_on_in_a_new_file(handler, &pod);
    pod.end();
    let failure = (failure.code, failure.stdout, failure.stderr);
    Seen { exit_code: status.exit_code, reason: status.reason.clone(), log, output, failure }
}

#[test]
fn a_pod_shares_memory_sees_its_config_map_change_and_is_reached_through_ports_and_probes() {
    for handler in handlers_and_runc() {
        let pod = Pod::start(handler, |config| {
            let mut mapping = PortMapping::new();
            (mapping.container_port, mapping.host_port) = (8080, HOST_PORT.into());
            config.port_mappings.push(mapping);
        });
        they_share_localhost_and_memory(handler, &pod);
        they_see_a_config_map_change(handler, &pod);
        a_host_port_leads_to_it(handler, &pod);
        statistics_count_what_goes_over_its_network(handler, &pod);
        port_forward_reaches_its_localhost(handler, &pod);
        a_probe_is_told_the_truth_in_time(handler, &pod);
        pod.end();
        assert!(TcpStream::connect(("127.0.0.1", HOST_PORT)).is_err(), "{handler}: the port is free again");
    }
}

#[test]
fn exec_and_attach_carry_streams_terminals_and_the_exit_status() {
    // All of them are idle at once. They go in the other order, so that each ends with all that came before it.
    let mut pods: Vec<(&str, Pod, Idle)> = Vec::new();
    for handler in handler_and_runc() {
        let pod = Pod::start(handler, |_| {});
        let idle = Idle::start(&pod);
        exec_and_attach_carry_streams(handler, &pod);
        a_terminal_has_a_size_and_passes_interrupts_on(handler, &pod);
        pods.push((handler, pod, idle));
    }
    while let Some((handler, pod, idle)) = pods.pop() {
        idle.end(handler);
        pod.end();
    }
}

/// Execs that nothing is said to, and that say nothing, for a while.
struct Idle {
    since: Instant,
    _container: Container,
    piped: Streams,
    terminal: Streams,
}

impl Idle {
    fn start(pod: &Pod) -> Self {
        let container = pod.run("idle", "exec sleep 100000", |_| {});
        let script = "echo ready; read line; echo out $line; read line; echo again $line; exit 3";
        let (mut piped, mut terminal) = (container.stream(script, false), container.stream(script, true));
        piped.expect(STDOUT, b"ready\n");
        terminal.expect(STDOUT, b"ready\r\n");
        Self { since: Instant::now(), _container: container, piped, terminal }
    }

    fn end(mut self, handler: &str) {
        let seconds = std::env::var(IDLE_SECONDS_VARIABLE).map(|text| text.parse().expect("a number of seconds"));
        let idle = Duration::from_secs(seconds.unwrap_or(IDLE_SECONDS));
        std::thread::sleep(idle.saturating_sub(self.since.elapsed()));
        for (streams, end) in [(&mut self.piped, "\n"), (&mut self.terminal, "\r\n")] {
            for word in ["out", "again"] {
                streams.send(STDIN, b"word\n");
                streams.expect(STDOUT, format!("{word} word{end}").as_bytes());
            }
            assert_eq!(streams.exit_code(), 3, "{handler}");
        }
    }
}

fn limits_and_statistics_are_its_own(handler: &str, pod: &Pod) {
    let container = pod.run("limited", "sleep 1000", |config| {
        let resources = config.linux.mut_or_insert_default().resources.mut_or_insert_default();
        (resources.memory_limit_in_bytes, resources.cpu_period, resources.cpu_quota) = (64 << 20, 100_000, 50_000);
    });
    let limits = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
    assert_eq!(container.exec(limits), "67108864\n50000 100000", "{handler}");
    container.update(|resources| (resources.cpu_period, resources.cpu_quota) = (100_000, 150_000));
    assert_eq!(container.exec(limits), "67108864\n150000 100000", "{handler}");
    if is_hull(handler) {
        assert_eq!(container.exec("nproc"), "2", "{handler}: one and a half take two");
    }
    container.update(|resources| {
        (resources.memory_limit_in_bytes, resources.cpu_period, resources.cpu_quota) = (48 << 20, 100_000, 20_000);
    });
    assert_eq!(container.exec(limits), "50331648\n20000 100000", "{handler}");
    if is_hull(handler) {
        assert_eq!(container.exec("nproc"), "1", "{handler}: the second is offline again");
    }

    let before = container.stats().cpu.usage_core_nano_seconds.value;
    container.exec("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done");
    let stats = container.stats();
    let used = stats.cpu.usage_core_nano_seconds.value;
    assert!(used > before, "{handler}: {before} and then {used}");
    assert!((1..=48 << 20).contains(&stats.memory.working_set_bytes.value), "{handler}: {stats}");

    // containerd counts a pod by the cgroup that it is accounted to on the host, or asks the sandbox.
    let stats = eventually("the pod's statistics", || {
        let stats = pod.stats();
        let linux = &stats.linux;
        if linux.cpu.usage_core_nano_seconds.value > 0 && linux.memory.working_set_bytes.value > 0 {
            Ok(stats)
        } else {
            Err(stats.to_string())
        }
    });
    assert_eq!(stats.linux.containers.len(), 1, "{handler}: {stats}");
}

fn its_log_goes_on_in_a_new_file(handler: &str, pod: &Pod) {
    let script = "i=0; while sleep 0.1; do i=$((i+1)); echo line $i; done";
    let container = pod.run("rotated", script, |_| {});
    container.logs("stdout F line 1");
    let old = container.log.with_extension("old");
    std::fs::rename(&container.log, &old).unwrap();
    container.reopen_log();
    let first = eventually("the new log", || container.log_lines().first().cloned().ok_or_else(String::new));
    let last = std::fs::read_to_string(old).unwrap().lines().last().unwrap().to_owned();
    let number = |line: &str| line.rsplit(' ').next().unwrap().parse::<u32>().unwrap();
    assert_eq!(number(&first), number(&last) + 1, "{handler}: after {last:?} comes {first:?}");
}

fn they_share_localhost_and_memory(handler: &str, pod: &Pod) {
    let shared = pod.memory_volume("shared", "4m");
    let server = "nc -l -p 8080 -e sh -c 'echo over localhost'";
    let first = pod.run("first", server, |config| config.mount(&shared, "/shared", false));
    let second = pod.run("second", "sleep 1000", |config| config.mount(&shared, "/memory", false));
    let heard = eventually("the server listens", || {
        let tried = second.try_exec("nc 127.0.0.1 8080", 0).unwrap();
        if tried.code == 0 { Ok(tried.stdout) } else { Err(tried.stderr) }
    });
    assert_eq!(heard, "over localhost\n", "{handler}");
    first.ended();
    let third = pod.run("third", "sleep 1000", |config| config.mount(&shared, "/shared", false));
    third.exec("echo 'by memory' >/shared/file");
    assert_eq!(second.exec("cat /memory/file"), "by memory", "{handler}");
    // The volume's limit is its own, and not the guest's memory.
    let filled = second.try_exec("dd if=/dev/zero of=/memory/large bs=1M count=8", 0).unwrap();
    assert!(filled.code != 0 && filled.stderr.contains("No space left"), "{handler}: {filled:?}");
}

fn they_see_a_config_map_change(handler: &str, pod: &Pod) {
    let plugins = ["configmap", "secret", "projected", "downward-api"];
    let volumes: Vec<(String, PathBuf)> =
        plugins.map(|plugin| (format!("/{plugin}"), pod.volume(&format!("kubernetes.io~{plugin}"), "config"))).into();
    for (_, volume) in &volumes {
        publish(volume, 1, "old");
    }
    let container = pod.run("watcher", "", |config| {
        config.image.mut_or_insert_default().image = debian().to_owned();
        config.command = ["python3", "-u", "-c", WATCH].map(str::to_owned).into();
        for (path, volume) in &volumes {
            config.command.push(path.clone());
            config.mount(volume, path, true);
        }
    });
    let read = "cat /configmap/key /secret/key /projected/key /downward-api/key";
    assert_eq!(container.exec(read), "oldoldoldold", "{handler}");
    container.logs("stdout F watching");
    for (path, volume) in &volumes {
        publish(volume, 2, "new");
        container.logs(&format!("stdout F {path}: told of new"));
    }
    eventually("the new values are read", || match container.exec(read) {
        values if values == "newnewnewnew" => Ok(()),
        values => Err(values),
    });
    for (path, _) in &volumes {
        let refused = container.try_exec(&format!("echo mine >{path}/key"), 0).unwrap();
        assert!(refused.code != 0 && refused.stderr.contains("Read-only"), "{handler}: {refused:?}");
    }
}

/// Tells what is in a volume's file when inotify tells that the link to it has been replaced.
const WATCH: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
fd = libc.inotify_init()
IN_MOVED_TO = 0x80
watched = {libc.inotify_add_watch(fd, path.encode(), IN_MOVED_TO): path for path in sys.argv[1:]}
assert min(watched) >= 0
print("watching")
while True:
    events = os.read(fd, 4096)
    while events:
        watch, _, _, length = struct.unpack_from("iIII", events)
        name, events = events[16:16 + length].rstrip(b"\0"), events[16 + length:]
        if name == b"..data":
            print(f"{watched[watch]}: told of", open(f"{watched[watch]}/key").read())
"#;

/// Writes a ConfigMap's file as the kubelet does: a new directory, and a link to it in one step.
fn publish(volume: &Path, version: u32, value: &str) {
    let name = format!("..{version}");
    std::fs::create_dir(volume.join(&name)).unwrap();
    std::fs::write(volume.join(&name).join("key"), value).unwrap();
    let (link, new) = (volume.join("..data"), volume.join("..data_tmp"));
    let old = std::fs::read_link(&link).ok();
    std::os::unix::fs::symlink(&name, &new).unwrap();
    std::fs::rename(&new, &link).unwrap();
    match old {
        Some(old) => std::fs::remove_dir_all(volume.join(old)).unwrap(),
        None => std::os::unix::fs::symlink("..data/key", volume.join("key")).unwrap(),
    }
}

fn a_host_port_leads_to_it(handler: &str, pod: &Pod) {
    let _server = pod.run("published", "while :; do nc -l -p 8080 -e echo served; done", |_| {});
    // Its own address and a port of the node's.
    for address in [format!("{}:8080", pod.address()), format!("127.0.0.1:{HOST_PORT}")] {
        let heard = eventually("the server answers", || {
            let mut connection = TcpStream::connect(&address).map_err(|error| format!("{address}: {error}"))?;
            let mut text = String::new();
            connection.read_to_string(&mut text).map_err(|error| error.to_string())?;
            if text.is_empty() { Err("nothing".to_owned()) } else { Ok(text) }
        });
        assert_eq!(heard, "served\n", "{handler} at {address}");
    }
}

fn statistics_count_what_goes_over_its_network(handler: &str, pod: &Pod) {
    const TO_THE_POD: usize = 1_000_000;
    const BACK: usize = 300_000;
    let script = format!("exec nc -l -p 8081 -e sh -c 'head -c {TO_THE_POD} >/dev/null; head -c {BACK} /dev/zero'");
    let container = pod.run("counted", &script, |_| {});
    let bytes = |stats: &PodSandboxStats| {
        let interface = &stats.linux.network.default_interface;
        assert_eq!(interface.name, "eth0", "{handler}: {stats}");
        [interface.rx_bytes.value, interface.tx_bytes.value]
    };
    let before = bytes(&pod.stats());
    let mut connection = eventually("the server listens", || {
        TcpStream::connect(format!("{}:8081", pod.address())).map_err(|error| error.to_string())
    });
    connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    connection.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
    connection.write_all(&[0; TO_THE_POD]).unwrap();
    assert_eq!(connection.read_to_end(&mut Vec::new()).unwrap(), BACK, "{handler}");
    container.ended();
    // Headers, and what had to be sent again, come on top.
    let counted = |after: [u64; 2]| {
        let [received, sent] = [after[0] - before[0], after[1] - before[1]];
        assert!((1_000_000..1_500_000).contains(&received), "{handler}: {received} bytes came");
        assert!((300_000..600_000).contains(&sent), "{handler}: {sent} bytes went");
    };
    counted(bytes(&pod.stats()));
    // Both ways of asking are answered.
    let all = cri().pod_stats();
    counted(bytes(all.iter().find(|stats| stats.attributes.id == pod.id).expect("all pods are listed")));
}

fn a_probe_is_told_the_truth_in_time(handler: &str, pod: &Pod) {
    let container = pod.run("probed", "touch /healthy; sleep 2000", |_| {});
    eventually("the probe succeeds", || match container.try_exec("test -e /healthy", 10).unwrap() {
        Executed { code: 0, .. } => Ok(()),
        other => Err(format!("{other:?}")),
    });
    container.exec("rm /healthy");
    assert_eq!(container.try_exec("test -e /healthy", 10).unwrap().code, 1, "{handler}");
    let late = container.try_exec("sleep 1000", 1).unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{handler}: {late}");
    // What took too long is ended.
    eventually("the probe's process ends", || match container.exec("ps | grep -c '[s]leep 1000' || true").as_str() {
        "0" => Ok(()),
        count => Err(count.to_owned()),
    });
}

fn exec_and_attach_carry_streams(handler: &str, pod: &Pod) {
    let container = pod.run("piped", "while read line; do echo got $line; done", |config| config.stdin = true);
    let mut exec = container.stream("read line; echo out $line; echo err >&2; exit 4", false);
    exec.send(STDIN, b"word\n");
    exec.expect(STDOUT, b"out word\n");
    exec.expect(STDERR, b"err\n");
    assert_eq!(exec.exit_code(), 4, "{handler}");

    let mut attached = container.attach(false);
    attached.send(STDIN, b"one\n");
    attached.expect(STDOUT, b"got one\n");
    drop(attached);
    // The process goes on when its client leaves, and another may come.
    let mut again = container.attach(false);
    again.send(STDIN, b"two\n");
    again.expect(STDOUT, b"got two\n");
    container.logs("stdout F got two");

    // Unless its input is for the first client only: with that its input ends, and nothing else.
    let script = "while read line; do echo got $line; done; echo the end; exit 5";
    let once = pod.run("once", script, |config| (config.stdin, config.stdin_once) = (true, true));
    let mut attached = once.attach(false);
    attached.send(STDIN, b"one\n");
    attached.expect(STDOUT, b"got one\n");
    assert_eq!(once.status().state, 1, "{handler}: it runs while its client is there");
    drop(attached);
    assert_eq!(once.ended().exit_code, 5, "{handler}");
    once.logs("stdout F the end");
}

fn a_terminal_has_a_size_and_passes_interrupts_on(handler: &str, pod: &Pod) {
    let container =
        pod.run("terminal", "trap 'echo interrupted' INT; tty; while :; do read word; echo $word; done", |config| {
            (config.stdin, config.tty) = (true, true);
        });
    container.logs("stdout F /dev/pts/0");
    let mut attached = container.attach(true);
    attached.send(STDIN, b"typed\n");
    // What the terminal echoes, and what the program answers.
    attached.expect(STDOUT, b"typed\r\ntyped\r\n");
    attached.send(STDIN, &[3]);
    attached.expect(STDOUT, b"interrupted");
    // Sizes come by another way than bytes.
    let is_of_size = |terminal: u32, size: &str| {
        eventually("the size is set", || match container.exec(&format!("stty size </dev/pts/{terminal}")) {
            found if found == size => Ok(()),
            found => Err(format!("{handler}: {found}")),
        });
    };
    attached.resize(90, 33);
    is_of_size(0, "33 90");

    let mut exec = container.stream("tty; read line; stty size; exit 6", true);
    exec.expect(STDOUT, b"/dev/pts/");
    exec.resize(101, 37);
    is_of_size(1, "37 101");
    exec.send(STDIN, b"\n");
    exec.expect(STDOUT, b"37 101");
    assert_eq!(exec.exit_code(), 6, "{handler}");
}

fn port_forward_reaches_its_localhost(handler: &str, pod: &Pod) {
    let script = "mkdir /srv; echo forwarded >/srv/file; exec httpd -f -p 127.0.0.1:9090 -h /srv";
    let container = pod.run("forwarded", script, |_| {});
    eventually("the server listens", || {
        let tried = container.try_exec("wget -q -O - http://127.0.0.1:9090/file", 0).unwrap();
        if tried.code == 0 { Ok(()) } else { Err(tried.stderr) }
    });
    let mut forwarded = pod.forward(9090);
    forwarded.send(STDIN, b"GET /file HTTP/1.0\r\n\r\n");
    forwarded.expect(STDIN, b"forwarded\n");
    // The port's number, which every channel starts with, and no error.
    assert_eq!(forwarded.rest(STDOUT), 9090_u16.to_le_bytes(), "{handler}");
}
