//! The fields of an OCI specification, each seen from inside a container.

use std::os::unix::fs::PermissionsExt as _;

use hull_protocol::agent::*;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::fixture::{self, code, context, guest, shell};

/// A filter that lets everything pass but mkdir.
fn no_mkdir() -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }],
    })
}

#[tokio::test]
async fn identity_and_privileges() {
    let guest = guest!();
    let script = "hostname; id -u; id -g; id -G; umask; pwd; echo $HOME; ulimit -n; cat /proc/self/oom_score_adj; \
                  grep -E 'Cap|NoNewPrivs|SigBlk' /proc/self/status";
    let output = guest
        .run_changed("c", script, |spec| {
            spec["process"]["user"] = json!({ "uid": 33, "gid": 44, "additionalGids": [5, 6], "umask": 0o27 });
            spec["process"]["cwd"] = json!("/made/for/it");
            spec["process"]["oomScoreAdj"] = json!(123);
            spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 77, "hard": 99 }]);
        })
        .await;
    let expected = "box\n33\n44\n44 5 6\n0027\n/made/for/it\n/home/web\n77\n123\n\
        SigBlk:\t0000000000000000\n\
        CapInh:\t0000000000000000\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t00000000080000e3\n\
        CapAmb:\t0000000000000000\nNoNewPrivs:\t1\n";
    assert_eq!(output.stdout, expected, "{}", output.stderr);

    // By default: no privileges named are none, the usual limits, no leaks of the agent's.
    let script = "grep -E 'CapEff|NoNewPrivs' /proc/self/status; ulimit -n; ulimit -Hn; \
                  awk '/^Max processes/ { print $3, $4 }' /proc/self/limits; cat /proc/self/oom_score_adj; umask; \
                  ls /proc/self/fd | tr '\\n' ' '; env | grep -v ^PATH | sort";
    let output = guest
        .run_changed("c", script, |spec| {
            spec["process"]["capabilities"] = Value::Null;
            spec["process"]["noNewPrivileges"] = json!(false);
            spec["process"]["env"] = json!(["A=1", "B=x=y"]);
            spec["process"]["args"][0] = json!("/bin/sh");
        })
        .await;
    let expected = "CapEff:\t0000000000000000\nNoNewPrivs:\t0\n1024\n1048576\nunlimited unlimited\n0\n0022\n0 1 2 3 A=1\nB=x=y\n\
        HOME=/root\nPWD=/\nSHLVL=1\n";
    assert_eq!(output.stdout, expected, "{}", output.stderr);

    // Inheritable and ambient capabilities pass to a user's programs.
    let output = guest
        .run_changed("c", "grep -E 'CapAmb|CapEff' /proc/self/status", |spec| {
            spec["process"]["user"] = json!({ "uid": 33, "gid": 33 });
            for set in ["inheritable", "ambient"] {
                spec["process"]["capabilities"][set] = json!(["CAP_CHOWN"]);
            }
        })
        .await;
    assert_eq!(output.stdout, "CapEff:\t0000000000000001\nCapAmb:\t0000000000000001\n", "{}", output.stderr);
}

#[tokio::test]
async fn streams_belong_to_the_user() {
    let guest = guest!();
    let output = guest
        .run_changed("c", "echo out > /dev/stdout; echo err > /dev/stderr; cat /dev/stdin", |spec| {
            spec["process"]["user"] = json!({ "uid": 33, "gid": 33 });
        })
        .await;
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.status.code), ("out\n", "err\n", 0));
}

#[tokio::test]
async fn programs_need_no_more_than_their_users_right() {
    let guest = guest!();
    let program = guest.root().join("bin/mine");
    std::fs::write(&program, "#!/bin/sh\necho mine\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
    let only_mine = |spec: &mut Value| spec["process"]["args"] = json!(["mine"]);
    assert_eq!(guest.run_changed("c", "", only_mine).await.stdout, "mine\n");
    let mut spec = guest.spec("");
    only_mine(&mut spec);
    spec["process"]["user"] = json!({ "uid": 33, "gid": 33 });
    spec["process"]["capabilities"] = json!({});
    let (kind, message) = code(guest.create("c", &spec, Io::default()).await);
    assert_eq!(kind, Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("ermission denied"), "{message}");
}

#[tokio::test]
async fn namespaces() {
    let guest = guest!();
    let link = |name: &str| std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap().to_string_lossy().into_owned();
    let script = "for n in pid ipc uts mnt net cgroup time user; do readlink /proc/self/ns/$n; done; echo $$; \
                  cat /proc/self/cgroup; ls /sys/class/net | tr '\\n' ' '";
    let output = guest
        .run_changed("c", script, |spec| {
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "time" }));
            spec["linux"]["timeOffsets"] = json!({ "boottime": { "secs": 100_000 } });
        })
        .await;
    let lines: Vec<_> = output.stdout.lines().collect();
    for (line, name) in lines.iter().zip(["pid", "ipc", "uts", "mnt"]) {
        assert_ne!(*line, link(name));
    }
    // None is the guest's own.
    assert_eq!(lines[4], link("net"), "{}", output.stderr);
    assert_ne!(lines[5], link("cgroup"));
    assert_ne!(lines[6], link("time"));
    assert_eq!(lines[7], link("user"));
    assert_eq!((lines[8], lines[9]), ("1", "0::/"));

    // A network namespace without a path is a new one.
    let output = guest
        .run_changed("c", "ls /sys/class/net", |spec| {
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "network" }));
        })
        .await;
    assert_eq!(output.stdout, "lo\n");

    // By path: those of another container.
    let _streams = guest.launch("first", &guest.spec("hostname shared; sleep 1000")).await;
    let pids = guest.containers.list_pids(context(), &fixture::container("first")).await.unwrap().pids;
    let init = pids.iter().map(|pid| pid.pid).min().unwrap();
    let output = guest
        .run_changed("second", "ipcs >/dev/null; readlink /proc/self/ns/ipc; readlink /proc/self/ns/pid", |spec| {
            spec["hostname"] = Value::Null;
            spec["linux"]["namespaces"] = json!([
                { "type": "mount" }, { "type": "cgroup" },
                { "type": "ipc", "path": format!("/proc/{init}/ns/ipc") },
                { "type": "pid", "path": format!("/proc/{init}/ns/pid") },
            ]);
        })
        .await;
    let theirs = |name: &str| std::fs::read_link(format!("/proc/{init}/ns/{name}")).unwrap();
    assert_eq!(
        output.stdout,
        format!("{}\n{}\n", theirs("ipc").display(), theirs("pid").display()),
        "{}",
        output.stderr
    );
    guest.discard("first").await;
}

#[tokio::test]
async fn a_user_namespace_holds_for_every_process() {
    let guest = guest!();
    // The root belongs to the container's root.
    let _ = std::process::Command::new("chown").args(["-R", "100000:100000"]).arg(guest.root()).status();
    std::fs::set_permissions(guest.directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut spec = guest.spec("id -u; cat /proc/self/uid_map; echo out > /dev/stdout; read x");
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    spec["linux"]["uidMappings"] = json!([{ "containerID": 0, "hostID": 100_000, "size": 65536 }]);
    spec["linux"]["gidMappings"] = spec["linux"]["uidMappings"].clone();
    // Neither may be mounted by a user namespace that does not own the network namespace, and the like.
    spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/sys");
    let mut streams = guest.launch("c", &spec).await;
    fixture::read_until(streams.stdout.as_mut().unwrap(), "out\n").await;
    let output = guest.exec("c", "e", &shell("id -u; cat /proc/self/uid_map; readlink /proc/self/ns/user")).await;
    let pids = guest.containers.list_pids(context(), &fixture::container("c")).await.unwrap().pids;
    let user = std::fs::read_link(format!("/proc/{}/ns/user", pids[0].pid)).unwrap();
    assert!(output.stdout.starts_with("0\n         0     100000      65536\n"), "{output:?}");
    assert!(output.stdout.ends_with(&format!("{}\n", user.display())), "{output:?}");
    drop(streams.stdin.take());
    guest.wait("c", "").await;
    guest.remove("c", "").await.unwrap();
}

#[tokio::test]
async fn filters_hold_for_every_process() {
    let guest = guest!();
    for no_new_privileges in [true, false] {
        let mut spec = guest.spec("mkdir /tmp/a; echo $?; grep Seccomp: /proc/self/status; read x");
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        spec["linux"]["seccomp"] = no_mkdir();
        let mut streams = guest.launch("c", &spec).await;
        let seen = fixture::read_until(streams.stdout.as_mut().unwrap(), "Seccomp:\t2\n").await;
        assert!(seen.starts_with("1\n"), "{seen}");
        let mut process = shell("mkdir /tmp/b 2>&1; grep Seccomp: /proc/self/status");
        process["noNewPrivileges"] = json!(no_new_privileges);
        process["user"] = json!({ "uid": 33, "gid": 33 });
        let output = guest.exec("c", "e", &process).await;
        assert_eq!(
            output.stdout,
            "mkdir: can't create directory '/tmp/b': Not supported\nSeccomp:\t2\n".replace("Not", "Operation not")
        );
        drop(streams.stdin.take());
        guest.wait("c", "").await;
        guest.remove("c", "").await.unwrap();
    }
}

#[tokio::test]
async fn paths_and_mounts() {
    let guest = guest!();
    let data = guest.directory.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("file"), "from outside\n").unwrap();
    let script = "cat /data/file /single; echo x > /data/file; echo x > /proc/sys/kernel/domainname; \
                  wc -c < /proc/timer_list; ls /hidden; touch /y; touch /tmp/z && echo tmp; \
                  grep -E ' /(data|tmp) ' /proc/self/mountinfo | cut -d' ' -f5,6; stat -c %a /tmp";
    std::fs::create_dir(guest.root().join("hidden")).unwrap();
    std::fs::write(guest.root().join("hidden/secret"), "").unwrap();
    let output = guest
        .run_changed("c", script, |spec| {
            spec["root"]["readonly"] = json!(true);
            spec["linux"]["maskedPaths"].as_array_mut().unwrap().push(json!("/hidden"));
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({ "destination": "/data", "type": "bind", "source": data, "options": ["rbind", "ro", "rprivate"] }));
            mounts.push(json!({ "destination": "/single", "type": "bind", "source": data.join("file"), "options": ["bind", "rw"] }));
            mounts.push(json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "noexec", "size=1m", "mode=1777"] }));
        })
        .await;
    let lines: Vec<_> = output.stdout.lines().collect();
    assert_eq!(lines[..4], ["from outside", "from outside", "0", "tmp"], "{output:?}");
    assert!(lines[4].starts_with("/data ro,") && lines[5].starts_with("/tmp rw,nosuid,noexec"), "{output:?}");
    assert_eq!(lines[6], "1777");
    assert_eq!(output.stderr.matches("Read-only file system").count(), 3, "{output:?}");
}

#[tokio::test]
async fn devices() {
    let guest = guest!();
    let script = "ls /dev | tr '\\n' ' '; echo; head -c 4 /dev/zero | wc -c; echo > /dev/null; echo > /dev/full; \
                  stat -c '%a %u %t:%T' /dev/own; mknod /dev/x c 10 229 && cat /dev/x; head -c1 /dev/own | wc -c; \
                  head -c2 /device/zero | wc -c";
    let output = guest
        .run_changed("c", script, |spec| {
            spec["linux"]["devices"] = json!([
                { "path": "/dev/own", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 33, "gid": 33 },
                { "path": "/device/zero", "type": "c", "major": 1, "minor": 5 }]);
            spec["linux"]["resources"] = json!({ "devices": [{ "allow": false, "access": "rwm" }] });
        })
        .await;
    let lines: Vec<_> = output.stdout.lines().collect();
    assert_eq!(
        lines[0].trim(),
        "core fd full null own ptmx pts random stderr stdin stdout tty urandom zero"
            .replace("core fd", "fd")
            .replace("full null", "full kcore null")
    );
    assert_eq!(lines[1..], ["4", "640 33 1:5", "1", "2"], "{output:?}");
    assert!(output.stderr.contains("No space left on device"), "{output:?}");
    assert!(output.stderr.contains("can't open '/dev/x': Operation not permitted"), "{output:?}");

    // What a rule allows opens; some device that is there and that none of the usual rules is for.
    let usable = |path: &&&str| std::fs::File::open(path).is_ok();
    let Some(device) = ["/dev/kvm", "/dev/fuse"].iter().find(usable) else {
        return fixture::skip("this needs a device to try the rules with");
    };
    let number = std::os::linux::fs::MetadataExt::st_rdev(&std::fs::metadata(device).unwrap());
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let open = format!("mknod /dev/x c {major} {minor}; head -c0 /dev/x; echo $?");
    let output = guest
        .run_changed("c", &open, |spec| {
            spec["linux"]["resources"] = json!({ "devices": [
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "c", "major": major, "minor": minor, "access": "r" }] });
        })
        .await;
    assert_eq!(output.stdout, "0\n", "{output:?}");

    // An update replaces the rules.
    let mut streams = guest.launch("c", &guest.spec(&format!("{open}; read x; head -c0 /dev/x; echo $?"))).await;
    fixture::read_until(streams.stdout.as_mut().unwrap(), "1\n").await;
    let update = UpdateContainerRequest {
        container_id: "c".into(),
        resources: json!({ "devices": [{ "allow": true, "access": "rwm" }] }).to_string().into_bytes(),
        ..Default::default()
    };
    guest.containers.update_container(context(), &update).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(streams.stdin.as_mut().unwrap(), b"\n").await.unwrap();
    assert_eq!(guest.finish("c", "", streams).await.stdout, "0\n");
}

#[tokio::test]
async fn sysctls() {
    let guest = guest!();
    let before = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let output = guest
        .run_changed("c", "cat /proc/sys/kernel/shmmni /proc/sys/vm/max_map_count", |spec| {
            spec["linux"]["sysctl"] = json!({ "kernel.shmmni": "77", "vm.max_map_count": "65531" });
        })
        .await;
    std::fs::write("/proc/sys/vm/max_map_count", before).unwrap();
    assert_eq!(output.stdout, "77\n65531\n", "{}", output.stderr);
    assert_ne!(std::fs::read_to_string("/proc/sys/kernel/shmmni").unwrap(), "77\n");
}

#[tokio::test]
async fn storages_live_as_long_as_their_container() {
    let guest = guest!();
    let volume = guest.directory.path().join("volume");
    let mut spec = guest.spec("grep ' /v ' /proc/self/mountinfo | grep -c size=1024k; touch /v/x");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({ "destination": "/v", "type": "bind", "source": volume, "options": ["rbind", "rw"] }));
    let storage = Storage {
        source: Some(storage::Source::None(true)),
        fstype: "tmpfs".into(),
        options: vec!["size=1m".into(), "nosuid".into()],
        mount_point: volume.to_str().unwrap().into(),
        ..Default::default()
    };
    let (io, streams) = guest.pipes().await;
    guest.create_with("c", &spec, io, vec![storage.clone()]).await.unwrap();
    let mounted = || std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(volume.to_str().unwrap());
    assert!(mounted());
    guest.begin("c").await;
    assert_eq!(guest.finish("c", "", streams).await.stdout, "1\n");
    guest.remove("c", "").await.unwrap();
    assert!(!mounted());

    spec["process"]["args"] = json!(["not-there"]);
    code(guest.create_with("c", &spec, Io::default(), vec![storage]).await);
    assert!(!mounted());
}

#[tokio::test]
async fn volumes_in_memory_are_shared_and_outlive_their_containers() {
    let guest = guest!();
    let seen_at = |script: &str, mount_point: &std::path::Path| {
        let mut spec = guest.spec(script);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({ "destination": "/v", "type": "bind", "source": mount_point, "options": ["rbind", "rw"] }));
        spec
    };
    let volume = |path: &str, mount_point: &std::path::Path| MemoryVolume {
        name: "0".into(),
        size_bytes: 1 << 20,
        mode: 0o2770,
        uid: 3,
        gid: 4,
        path: path.into(),
        directories: vec![File {
            path: "sub".into(),
            mode: 0o755,
            what: Some(file::What::Directory(true)),
            ..Default::default()
        }],
        mount_point: mount_point.to_str().unwrap().into(),
        ..Default::default()
    };
    let (whole, part) = (guest.directory.path().join("views/a/0"), guest.directory.path().join("views/b/0"));
    let script = "stat -c '%a %u %g' /v; grep ' /v ' /proc/self/mountinfo | grep -c size=1024k; echo kept >/v/sub/file";
    let seen = guest.run_with_volume("a", &seen_at(script, &whole), volume("", &whole)).await;
    assert_eq!(seen.stdout, "2770 3 4\n1\n");
    guest.remove("a", "").await.unwrap();
    let script = "cat /v/file; dd if=/dev/zero of=/v/large bs=1024 count=2048 2>&1 | grep -o 'No space left'";
    let seen = guest.run_with_volume("b", &seen_at(script, &part), volume("sub", &part)).await;
    assert_eq!(seen.stdout, "kept\nNo space left\n");
    guest.remove("b", "").await.unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(part.to_str().unwrap()), "{mounts}");
}

#[tokio::test]
async fn hooks_run_at_their_time() {
    let guest = guest!();
    let log = guest.directory.path().join("log");
    let hook = |name: &str| {
        let script = format!("echo {name} $(cat | sed 's/.*\"status\":\"\\([a-z]*\\)\".*/\\1/') >> {}", log.display());
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] }])
    };
    let mut spec = guest.spec("true");
    spec["hooks"] =
        json!({ "createRuntime": hook("createRuntime"), "poststart": hook("poststart"), "poststop": hook("poststop") });
    let streams = guest.launch("c", &spec).await;
    let read = || std::fs::read_to_string(&log).unwrap();
    assert_eq!(read(), "createRuntime creating\npoststart running\n");
    guest.finish("c", "", streams).await;
    guest.remove("c", "").await.unwrap();
    assert_eq!(read(), "createRuntime creating\npoststart running\npoststop stopped\n");
}
