//! What a container's processes may do, and as whom: the same for its first one and for those of ExecSync, and the same as with runc.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::Command;

use fixture::containerd::{log, run_script};
use fixture::cri::api::{ContainerConfig, SecurityProfile};
use fixture::cri::{Pod, eventually, handler_and_runc};
use fixture::netns::host;

use super::all_alike;

/// What the kernel says of a process's rights.
const RIGHTS: &str = "id; grep -E '^(Groups|Cap[A-Z][a-z]*|NoNewPrivs|Seccomp):' /proc/self/status";

/// Refuses one thing.
const NO_DIRECTORIES: &str = r#"{
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }]
}"#;

/// Runs a container and tells its rights, and what `script` does in it.
fn rights(pod: &Pod, name: &str, script: &str, change: impl FnOnce(&mut ContainerConfig)) -> String {
    let container = pod.run(name, &format!("{RIGHTS}; echo told; exec sleep 1000"), change);
    container.logs("stdout F told");
    let first: Vec<String> =
        container.log_lines().iter().map(|line| line.trim_start_matches("stdout F ").to_owned()).collect();
    let first = first.join("\n");
    let executed = container.exec(RIGHTS);
    assert_eq!(first, format!("{executed}\ntold"), "{name}: the first process has other rights than one of ExecSync");
    let done = container.try_exec(script, 0).unwrap();
    format!("{name}:\n{executed}\n{}{}", done.stdout, done.stderr)
}

#[test]
fn a_container_has_the_rights_that_its_pod_names_and_no_others() {
    let seen: Vec<String> = handler_and_runc()
        .into_iter()
        .map(|handler| {
            println!("with {handler}");
            let pod = Pod::start(handler, |config| {
                config.security().privileged = true;
                config.security().supplemental_groups = vec![3456];
                config.security().seccomp = Some(SecurityProfile::runtime_default()).into();
            });
            let seen = [confined(&pod), somebody(&pod), filtered(&pod), free(&pod), privileged(&pod)].join("\n");
            println!("{seen}");
            pod.end();
            seen
        })
        .collect();
    for told in [
        "Seccomp:\t2",
        "uid=1234 gid=2345 groups=2345,3456,4567",
        "touch: /file: Read-only file system",
        "mkdir: can't create directory '/new': Operation not supported",
        "character special file 1:3 640\n",
        "head: /disk: Operation not permitted",
        "unshared\nanswered\nechoed",
        "\nrw\nrw\n0\nwritten\nmounted\n",
    ] {
        assert!(seen[0].contains(told), "{told:?} is not in {}", seen[0]);
    }
    all_alike(&seen);
}

/// As most containers are.
fn confined(pod: &Pod) -> String {
    // Each is in every guest and on every node.
    let script = "wc -c </proc/version; ls /sys/kernel | wc -l; echo 1 >/proc/sys/vm/overcommit_memory; touch /etc/new; \
                  unshare -U true; mkdir /new && echo made; grep 'open files' /proc/self/limits; \
                  mknod -m 640 /null c 1 3 && echo nothing >/null && stat -c '%F %t:%T %a' /null; \
                  mknod /disk b 7 300 && head -c1 /disk";
    rights(pod, "confined", script, |config| {
        let security = config.security();
        security.seccomp = Some(SecurityProfile::runtime_default()).into();
        security.masked_paths = ["/proc/version", "/sys/kernel", "/no/such/path"].map(str::to_owned).into();
        security.readonly_paths = ["/proc/sys", "/etc"].map(str::to_owned).into();
        security.capabilities.mut_or_insert_default().drop_capabilities = vec!["CHOWN".into()];
        security.capabilities.mut_or_insert_default().add_capabilities = vec!["NET_ADMIN".into()];
    })
}

/// Nothing is kept from it: file systems of the kernel can be written to, none of their files is masked, and it mounts what it likes.
fn privileged(pod: &Pod) -> String {
    // Of a mount by itself: with runc the file system behind it is the network namespace's, and as whoever mounted that first wanted it.
    let script =
        "for at in /sys /sys/fs/cgroup; do awk -v at=$at '$5 == at { print substr($6, 1, 2) }' /proc/self/mountinfo; done
        awk '$2 ~ \"^/proc/\" || $2 ~ \"^/sys/firmware\"' /proc/mounts | wc -l
        value=$(cat /proc/sys/vm/overcommit_memory); echo $value >/proc/sys/vm/overcommit_memory && echo written
        mkdir /here && mount -t tmpfs none /here && echo mounted
        ls -l /dev/null /dev/fuse | awk '{ print $1, $3, $5, $6 }'";
    rights(pod, "privileged", script, |config| {
        config.security().privileged = true;
        config.security().seccomp = Some(SecurityProfile::runtime_default()).into();
    })
}

/// As the restricted policy of Kubernetes wants them, with a volume that belongs to the pod's group.
fn somebody(pod: &Pod) -> String {
    let volume = pod.volume("kubernetes.io~empty-dir", "of-the-group");
    chown(&volume, Some(0), Some(3456)).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o2770)).unwrap();
    let script = "touch /file; touch /volume/file; stat -c '%u %g %a' /volume/file; echo $HOME";
    rights(pod, "somebody", script, |config| {
        config.mount(&volume, "/volume", false);
        let security = config.security();
        security.run_as_user = Some(1234.into()).into();
        security.run_as_group = Some(2345.into()).into();
        security.supplemental_groups = vec![3456, 4567];
        security.seccomp = Some(SecurityProfile::runtime_default()).into();
        security.capabilities.mut_or_insert_default().drop_capabilities = vec!["ALL".into()];
        security.capabilities.mut_or_insert_default().add_capabilities = vec!["NET_BIND_SERVICE".into()];
        security.no_new_privs = true;
        security.readonly_rootfs = true;
    })
}

/// With a profile of the node's, by a name in the image.
fn filtered(pod: &Pod) -> String {
    let profile = pod.file("no-directories.json", NO_DIRECTORIES);
    rights(pod, "filtered", "mkdir /new; touch /dev/shm/file && echo touched; echo $HOME", |config| {
        let security = config.security();
        security.run_as_username = "nobody".into();
        security.seccomp = Some(SecurityProfile::localhost(profile.to_str().unwrap())).into();
        security.apparmor = Some(SecurityProfile::unconfined()).into();
    })
}

/// Without a filter, and with all capabilities: it makes itself an interface of a VLAN, too.
fn free(pod: &Pod) -> String {
    let vlan = Vlan::new();
    let listener = TcpListener::bind((VLAN_ADDRESS, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = vec![0; 1 << 20];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
    });
    let script = format!(
        "unshare -U true && echo unshared
        ip link add link eth0 name eth0.5 type vlan id 5; ip addr add 172.31.40.2/24 dev eth0.5; ip link set eth0.5 up
        ping -c 1 -W 20 -s 1472 {VLAN_ADDRESS} >/dev/null && echo answered
        dd if=/dev/urandom of=/sent bs=64k count=16 2>/dev/null
        nc -w 60 {VLAN_ADDRESS} {port} </sent | cmp - /sent && echo echoed"
    );
    let seen = rights(pod, "free", &script, |config| {
        let security = config.security();
        security.seccomp = Some(SecurityProfile::unconfined()).into();
        security.capabilities.mut_or_insert_default().add_capabilities = vec!["ALL".into()];
    });
    echo.join().unwrap();
    drop(vlan);
    seen
}

/// What the host has in the VLAN 5 of the pods' bridge.
const VLAN_ADDRESS: &str = "172.31.40.1";
const VLAN: &str = "htvlan5";

/// The host's interface in it, gone when this is dropped.
struct Vlan;

impl Vlan {
    fn new() -> Self {
        host(&format!("ip link add link cni0 name {VLAN} type vlan id 5"));
        let vlan = Self;
        host(&format!("ip addr add {VLAN_ADDRESS}/24 dev {VLAN}"));
        host(&format!("ip link set {VLAN} up"));
        vlan
    }
}

impl Drop for Vlan {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", VLAN]).output();
    }
}

#[test]
fn a_label_of_apparmor_is_accepted_and_the_log_says_that_it_is_not_applied() {
    // By ctr, for containerd keeps labels from runtimes on a node whose kernel does not have AppArmor, as the lab's.
    let told = || log().matches("the AppArmor label is not applied in the guest").count();
    let before = told();
    let said = run_script("labelled", ["--apparmor-profile", "of-the-node"], "echo runs");
    assert_eq!(said.text().trim(), "runs", "{}", said.stderr);
    eventually("the log has it", || match told() - before {
        1 => Ok(()),
        count => Err(format!("{count} times")),
    });
}
