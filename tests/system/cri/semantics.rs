//! What a pod's specification may ask of the kernel under it, and what is told of the pod's life.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use fixture::cri::api::{HugepageLimit, IDMapping, Mount, PodSandboxConfig, UserNamespace};
use fixture::cri::{Code, Pod, Traces, cri, debian, eventually, handler_and_runc, handlers};

use super::all_alike;

/// How long an event may take.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn sysctls_of_a_pod_hold_in_its_containers() {
    for handler in handler_and_runc() {
        let sysctls = [
            ("net/ipv4/tcp_syncookies", "0"),
            // With dots, as containerd has it: of two spellings of one name either may come last.
            ("net.ipv4.ip_unprivileged_port_start", "400"),
            ("kernel.shm_rmid_forced", "1"),
            ("fs.mqueue.msg_max", "17"),
        ];
        let pod = Pod::start(handler, |config| {
            let linux = config.linux.mut_or_insert_default();
            linux.sysctls = sysctls.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        });
        let container = pod.run("main", "sleep 1000", |_| {});
        let seen = container.exec(
            "cd /proc/sys; cat net/ipv4/tcp_syncookies net/ipv4/ip_unprivileged_port_start kernel/shm_rmid_forced \
             fs/mqueue/msg_max",
        );
        assert_eq!(seen, "0\n400\n1\n17", "{handler}");
        pod.end();

        let before = Traces::now();
        let unknown = Pod::try_start(handler, |config| {
            config.linux.mut_or_insert_default().sysctls.insert("net.no_such_thing".into(), "1".into());
        });
        let status = unknown.unwrap_err();
        assert!(status.message().contains("no_such_thing"), "{handler}: {status}");
        eventually("nothing of the pod is left", || before.are_all());
    }
}

#[test]
fn low_ports_are_as_free_in_a_pod_as_with_runc() {
    // containerd 2 frees them for all pods, 1.7 does not.
    let seen: Vec<String> = handler_and_runc()
        .into_iter()
        .map(|handler| {
            let pod = Pod::start(handler, |_| {});
            let container = pod.run("main", "sleep 1000", |_| {});
            let seen = container.exec("cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range");
            pod.end();
            seen
        })
        .collect();
    all_alike(&seen);
}

/// What the kubelet asks for with `hostUsers: false`.
fn users_of_its_own() -> (UserNamespace, IDMapping) {
    let mut mapping = IDMapping::new();
    (mapping.host_id, mapping.container_id, mapping.length) = (100_000, 0, 65_536);
    let mut user = UserNamespace::new();
    (user.uids, user.gids) = (vec![mapping.clone()], vec![mapping.clone()]);
    (user, mapping)
}

#[test]
fn a_pod_with_users_of_its_own_sees_files_as_they_are() {
    let (user, mapping) = users_of_its_own();
    let with_users = |config: &mut PodSandboxConfig| {
        let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        context.namespace_options.mut_or_insert_default().userns_options = Some(user.clone()).into();
    };
    if cri().is_of_version_1() {
        for handler in fixture::cri::handlers() {
            let before = Traces::now();
            let status = Pod::try_start(handler, with_users).unwrap_err();
            println!("{handler}: {status:?}");
            assert!(status.message().contains("hostUsers"), "{handler}: {status}");
            assert_ne!(status.code(), Code::DeadlineExceeded);
            eventually("nothing of the pod is left", || before.are_all());
        }
        return;
    }
    // Not with runc, which maps the owners of volumes from version 1.2 on, and Debian 13 has 1.1.
    for handler in fixture::cri::handlers() {
        println!("with {handler}");
        let pod = Pod::start(handler, with_users);
        let volume = pod.volume("kubernetes.io~empty-dir", "shared");
        fs::write(volume.join("nodes"), "").unwrap();
        let container = pod.run("main", "sleep 1000", |config| {
            config.mount(&volume, "/volume", false);
            let mount = config.mounts.last_mut().unwrap();
            (mount.uid_mappings, mount.gid_mappings) = (vec![mapping.clone()], vec![mapping.clone()]);
            let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            context.namespace_options.mut_or_insert_default().userns_options = Some(user.clone()).into();
        });
        let seen = container.exec(
            "id -u; id -g; touch /own /volume/own; chown 7:8 /volume/own; \
             stat -c '%n %u %g' / /bin /bin/busybox /own /volume /volume/nodes /volume/own",
        );
        let expected =
            "0\n0\n/ 0 0\n/bin 0 0\n/bin/busybox 0 0\n/own 0 0\n/volume 0 0\n/volume/nodes 0 0\n/volume/own 7 8";
        assert_eq!(seen, expected, "{handler}");
        let owner = fs::metadata(volume.join("own")).unwrap();
        assert_eq!((owner.uid(), owner.gid()), (7, 8), "{handler}");
        pod.end();
    }
}

#[test]
fn namespaces_of_the_nodes_are_refused_with_the_reason() {
    /// In CRI.
    const OF_THE_NODE: i32 = 2;
    const NAMES: [&str; 3] = ["hostNetwork", "hostPID", "hostIPC"];
    for &handler in handlers() {
        // containerd 2.1 ends by a nil pointer of its own at hostNetwork with the sandboxer `shim`, before anybody is asked.
        let names = if !cri().is_of_version_1() && handler == "kata" { &NAMES[1..] } else { &NAMES[..] };
        for &name in names {
            let before = Traces::now();
            let refused = Pod::try_start(handler, |config| {
                let options = config.security().namespace_options.mut_or_insert_default();
                match name {
                    "hostNetwork" => options.network = OF_THE_NODE,
                    "hostPID" => options.pid = OF_THE_NODE,
                    _ => options.ipc = OF_THE_NODE,
                }
            });
            let status = refused.unwrap_err();
            println!("{handler}: {status:?}");
            assert!(status.message().contains(name), "{handler}: {status}");
            assert_ne!(status.code(), Code::DeadlineExceeded, "{handler}");
            eventually("nothing of the pod is left", || before.are_all());
        }
    }
}

#[test]
fn an_image_is_a_volume_that_nobody_can_change() {
    // Since Kubernetes 1.31, and with containerd 2.
    if cri().is_of_version_1() {
        return;
    }
    let seen: Vec<String> = handler_and_runc()
        .into_iter()
        .map(|handler| {
            println!("with {handler}");
            let pod = Pod::start(handler, |_| {});
            let container = pod.run("main", "sleep 1000", |config| {
                let mut mount = Mount::new();
                mount.container_path = "/image".into();
                mount.image.mut_or_insert_default().image = fixture::containerd::BUSYBOX.into();
                mount.readonly = true;
                config.mounts.push(mount);
            });
            let seen =
                container.exec("cat /image/etc/passwd; /image/bin/busybox echo runs; touch /image/new 2>&1 || true");
            pod.end();
            seen
        })
        .collect();
    assert!(seen[0].ends_with("runs\ntouch: /image/new: Read-only file system"), "{}", seen[0]);
    all_alike(&seen);
}

/// Maps as many pages of 2 MiB of a new file as it is told, and fills them.
const HUGE_PAGES: &str = "
import mmap, os, sys
size = int(sys.argv[1]) << 21
f = os.open('/huge/' + sys.argv[1], os.O_CREAT | os.O_RDWR)
try:
    os.ftruncate(f, size)
    with mmap.mmap(f, size) as pages:
        for at in range(0, size, 4096): pages[at] = 1
    print('filled', os.fstat(f).st_blksize)
except OSError as error: print(os.strerror(error.errno))
";

#[test]
fn huge_pages_and_their_limits_are_what_they_are_with_runc() {
    // runc's come from the node, which has to have them.
    fs::write("/proc/sys/vm/nr_hugepages", "8").unwrap();
    let seen: Vec<[String; 4]> = handler_and_runc()
        .into_iter()
        .map(|handler| {
            let pod = Pod::start(handler, |_| {});
            let volume = pod.huge_page_volume("huge");
            let container = pod.run("main", "sleep 1000", |config| {
                config.image.mut_or_insert_default().image = debian().to_owned();
                // containerd leaves them out unless its setting disable_hugetlb_controller is changed.
                let mut pages = HugepageLimit::new();
                (pages.page_size, pages.limit) = ("2MB".into(), 4 << 20);
                let resources = config.linux.mut_or_insert_default().resources.mut_or_insert_default();
                resources.hugepage_limits.push(pages);
                config.mount(&volume, "/huge", false);
            });
            let map = |pages: &str| container.exec(&format!("python3 -c \"{HUGE_PAGES}\" {pages}"));
            let seen = [
                container.exec("cat /sys/fs/cgroup/hugetlb.2MB.max"),
                container.exec("grep ' /huge ' /proc/mounts | cut -d' ' -f3"),
                map("2"),
                // More than the container may have, and less than there is.
                map("3"),
            ];
            pod.end();
            seen
        })
        .collect();
    fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();
    assert_eq!(seen[0][2], "filled 2097152");
    for other in &seen {
        assert_eq!(Some(other), seen.last());
    }
}

#[test]
fn container_events_tell_the_same_life() {
    let events = cri().container_events();
    let seen: Vec<Vec<String>> = handler_and_runc()
        .into_iter()
        .map(|handler| {
            let pod = Pod::start(handler, |_| {});
            let container = pod.run("main", "exit 3", |_| {});
            container.ended();
            container.remove();
            let (pod_id, container_id) = (pod.id.clone(), container.id.clone());
            pod.end();
            let mut told = Vec::new();
            // The last is the pod's deletion.
            while told.last().map(String::as_str) != Some("pod 3") {
                let event =
                    events.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{handler}: {told:?}: {error}"));
                let whose = match &event.container_id {
                    id if *id == pod_id => "pod",
                    id if *id == container_id => "container",
                    // containerd keeps what nobody has asked for, here of the pods of other tests.
                    _ => continue,
                };
                told.push(format!("{whose} {}", event.container_event_type));
            }
            println!("{handler}: {told:?}");
            told.retain(|event| event.starts_with("container"));
            assert_eq!(told, ["container 0", "container 1", "container 2", "container 3"], "{handler}");
            told
        })
        .collect();
    for other in &seen {
        assert_eq!(Some(other), seen.last());
    }
}
