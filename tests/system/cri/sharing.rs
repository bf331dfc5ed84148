//! What the containers of a pod share with each other, and what the node gives all of them.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use fixture::cri::api::{ContainerConfig, DNSConfig};
use fixture::cri::{Container, Pod, eventually, handler_and_runc, is_hull};
use fixture::netns::host;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::all_alike;

/// In CRI: processes of all containers of the pod are in one namespace.
const OF_THE_POD: i32 = 0;
/// They are in that of another container.
const OF_ANOTHER: i32 = 3;
/// Mounts go from the node to the container, and both ways.
const HOST_TO_CONTAINER: i32 = 1;
const BIDIRECTIONAL: i32 = 2;
/// Seconds that a container is given to end by itself.
const GRACE: i64 = 2;

/// A container that sleeps as its first process, which a signal without a handler does not end.
fn sleeper(pod: &Pod, name: &str, seconds: u32, change: impl FnOnce(&mut ContainerConfig)) -> Container {
    pod.run(name, &format!("exec sleep {seconds}"), change)
}

/// How many processes a container sees that sleep this long.
fn sees(container: &Container, seconds: u32) -> String {
    container.exec(&format!("ps -o args | grep -c '^sleep {seconds}$' || true"))
}

#[test]
fn containers_of_a_pod_share_all_but_processes_and_files() {
    let seen: Vec<String> = handler_and_runc()
        .into_iter()
        .map(|handler| {
            println!("with {handler}");
            let pod = Pod::start(handler, |config| {
                config.dns_config = Some(DNSConfig {
                    servers: vec!["192.0.2.53".into(), "192.0.2.54".into()],
                    searches: vec!["tests.svc.cluster.local".into(), "cluster.local".into()],
                    options: vec!["ndots:5".into()],
                    ..Default::default()
                })
                .into();
            });
            let volume = pod.volume("kubernetes.io~empty-dir", "shared");
            let hosts = pod.file("etc-hosts", "127.0.0.1 localhost\n192.0.2.7 of-the-kubelet\n");
            let log = pod.file("termination-log", "");
            let give = |config: &mut ContainerConfig| {
                config.mount(&volume, "/shared", false);
                config.mount(&hosts, "/etc/hosts", false);
                config.mount(&log, "/dev/termination-log", false);
            };
            let first = sleeper(&pod, "first", 1001, give);
            let debugger = sleeper(&pod, "debugger", 1003, |config| debug(config, &first));
            assert_eq!(debugger.exec("tr '\\0' ' ' </proc/1/cmdline"), "sleep 1001", "{handler}");
            assert_eq!((sees(&debugger, 1003), sees(&first, 1003)), ("1".into(), "1".into()), "{handler}");
            let second = sleeper(&pod, "second", 1002, give);
            each_has_its_own_processes(handler, [&first, &second]);
            if is_hull(handler) {
                // Which of the two it is for cannot be told.
                let debugger = sleeper(&pod, "for-one-of-two", 1004, |config| debug(config, &second));
                assert_eq!((sees(&debugger, 1001), sees(&debugger, 1002)), ("1".into(), "1".into()));
            }
            memory_names_and_sockets_are_the_pods(handler, &pod, &volume, [&first, &second]);
            files_of_the_kubelets_are_theirs(handler, &second, &hosts, &log);
            assert_eq!(second.exec("cat /etc/hostname"), "the-pod", "{handler}");
            if is_hull(handler) {
                // With runc it is the limit of the node's containerd.
                let processes = second.exec("sed -n 's/^Max processes *//p' /proc/self/limits");
                assert!(processes.starts_with("unlimited "), "{processes}");
            }
            let seen = second.exec("cat /etc/resolv.conf");
            what_ignores_the_signal_is_killed_after_its_grace(handler, &second);
            pod.end();
            seen
        })
        .collect();
    assert_eq!(
        seen[0],
        "search tests.svc.cluster.local cluster.local\nnameserver 192.0.2.53\nnameserver 192.0.2.54\noptions ndots:5"
    );
    all_alike(&seen);
}

/// As `kubectl debug --target` asks for it.
fn debug(config: &mut ContainerConfig, target: &Container) {
    let options = config.security().namespace_options.mut_or_insert_default();
    (options.pid, options.target_id) = (OF_ANOTHER, target.id.clone());
}

fn each_has_its_own_processes(handler: &str, [first, second]: [&Container; 2]) {
    assert_eq!(first.exec("tr '\\0' ' ' </proc/1/cmdline"), "sleep 1001", "{handler}");
    assert_eq!(second.exec("tr '\\0' ' ' </proc/1/cmdline"), "sleep 1002", "{handler}");
    assert_eq!((sees(first, 1001), sees(first, 1002)), ("1".into(), "0".into()), "{handler}");
    let own = "for kind in pid mnt; do readlink /proc/self/ns/$kind; done";
    let of = |container: &Container| container.exec(own).lines().map(str::to_owned).collect::<Vec<_>>();
    let (one, other) = (of(first), of(second));
    assert!(one[0] != other[0] && one[1] != other[1], "{handler}: {one:?} and {other:?}");
}

fn memory_names_and_sockets_are_the_pods(handler: &str, pod: &Pod, volume: &Path, [first, second]: [&Container; 2]) {
    let common = "for kind in ipc uts net; do readlink /proc/self/ns/$kind; done; hostname";
    assert_eq!(first.exec(common), second.exec(common), "{handler}");
    assert_eq!(first.exec("hostname"), "the-pod", "{handler}");
    first.exec("echo by memory >/dev/shm/file");
    assert_eq!(second.exec("cat /dev/shm/file"), "by memory", "{handler}");
    let kib = "df -k /dev/shm | awk 'END { print $2 }'";
    assert_eq!(first.exec(kib), "65536", "{handler}");

    // Of the small image's programs these two speak by a UNIX socket, which is in the volume.
    let memory = pod.memory_volume("memory", "4m");
    let listen = "ln -s /shared/socket /dev/log; exec syslogd -n -O -";
    let listener = pod.run("listener", listen, |config| {
        config.mount(volume, "/shared", false);
        config.mount(&memory, "/dev/shm", false);
    });
    assert_eq!(listener.exec(kib), "4096", "{handler}: a volume takes the place of the pod's");
    eventually("the socket is there", || match first.try_exec("test -S /shared/socket", 0).unwrap().code {
        0 => Ok(()),
        code => Err(format!("{handler}: {code}")),
    });
    // It brings no hosts of its own, so it has the node's.
    assert_eq!(listener.exec("cat /etc/hosts"), fs::read_to_string("/etc/hosts").unwrap().trim_end(), "{handler}");
    first.exec("ln -s /shared/socket /dev/log; logger over a socket");
    eventually("the message has come", || {
        let lines = listener.log_lines();
        if lines.iter().any(|line| line.ends_with("over a socket")) { Ok(()) } else { Err(format!("{lines:?}")) }
    });
}

fn files_of_the_kubelets_are_theirs(handler: &str, container: &Container, hosts: &Path, log: &Path) {
    assert_eq!(container.exec("cat /etc/hosts"), "127.0.0.1 localhost\n192.0.2.7 of-the-kubelet", "{handler}");
    container.exec("echo 192.0.2.8 of-the-container >>/etc/hosts; printf 'why it ended' >/dev/termination-log");
    assert!(fs::read_to_string(hosts).unwrap().ends_with("\n192.0.2.8 of-the-container\n"), "{handler}");
    assert_eq!(fs::read_to_string(log).unwrap(), "why it ended", "{handler}");
}

fn what_ignores_the_signal_is_killed_after_its_grace(handler: &str, container: &Container) {
    let asked = Instant::now();
    container.stop(GRACE);
    let (took, status) = (asked.elapsed(), container.ended());
    assert!(took >= Duration::from_secs(GRACE.unsigned_abs()), "{handler}: after {took:?}");
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"), "{handler}");
}

#[test]
fn processes_are_the_pods_where_it_shares_them() {
    for handler in handler_and_runc() {
        println!("with {handler}");
        let pod = Pod::start(handler, |config| {
            config.security().namespace_options.mut_or_insert_default().pid = OF_THE_POD;
        });
        let first = sleeper(&pod, "first", 1001, |_| {});
        let second = sleeper(&pod, "second", 1002, |_| {});
        for container in [&first, &second] {
            assert_eq!((sees(container, 1001), sees(container, 1002)), ("1".into(), "1".into()), "{handler}");
        }
        let namespace = "readlink /proc/self/ns/pid";
        assert_eq!(first.exec(namespace), second.exec(namespace), "{handler}");
        // Neither of them is the first, which is the pause program's or what stands for it.
        assert!(!first.exec("tr '\\0' ' ' </proc/1/cmdline").starts_with("sleep 100"), "{handler}");
        second.exec("kill $(ps -o pid,args | awk '$2 == \"sleep\" && $3 == 1001 { print $1 }')");
        assert_eq!(first.ended().exit_code, 143, "{handler}");
        pod.end();
    }
}

/// A directory of the node's with a place in it for another file system to be mounted.
struct Below {
    above: tempfile::TempDir,
}

impl Below {
    fn new() -> Self {
        let above = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::create_dir(above.path().join("below")).unwrap();
        Self { above }
    }

    fn mount(&self) {
        let below = self.above.path().join("below");
        mount(None::<&str>, &below, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(below.join("file"), "mounted later").unwrap();
    }

    fn unmount(&self) {
        umount2(&self.above.path().join("below"), MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn mounts_of_the_node_come_where_they_are_asked_for_and_none_go_back() {
    for handler in handler_and_runc() {
        println!("with {handler}");
        let node = Below::new();
        let path = node.above.path();
        let pod = Pod::start(handler, |_| {});
        let container = pod.run("main", "exec sleep 1000", |config| {
            config.mount(path, "/follows", false);
            config.mounts[0].propagation = HOST_TO_CONTAINER;
            config.mount(path, "/stays", false);
        });
        let look = || container.exec("ls /follows/below /stays/below");
        assert_eq!(look(), "/follows/below:\n\n/stays/below:", "{handler}");
        node.mount();
        eventually("the mount is seen", || match container.exec("cat /follows/below/file 2>/dev/null || true") {
            text if text == "mounted later" => Ok(()),
            text => Err(format!("{handler}: {text:?}")),
        });
        assert_eq!(look(), "/follows/below:\nfile\n\n/stays/below:", "{handler}");
        container.exec("echo from the container >/follows/below/answer");
        assert_eq!(fs::read_to_string(path.join("below/answer")).unwrap(), "from the container\n", "{handler}");
        node.unmount();
        eventually("the mount is gone", || match look() {
            seen if seen == "/follows/below:\n\n/stays/below:" => Ok(()),
            seen => Err(format!("{handler}: {seen:?}")),
        });
        if is_hull(handler) {
            let both_ways = pod.try_run("both-ways", "exec sleep 1000", |config| {
                config.mount(path, "/both", false);
                config.mounts[0].propagation = BIDIRECTIONAL;
            });
            let status = both_ways.unwrap_err();
            println!("{status:?}");
            assert!(status.message().contains("rshared: mounts do not propagate out of a container"), "{status}");
            assert_eq!(container.exec("echo alive"), "alive", "{handler}");
        }
        pod.end();
        assert_eq!(host("findmnt --list --noheadings --output TARGET").matches("below").count(), 0, "{handler}");
    }
}
