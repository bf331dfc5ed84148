//! `--net user`: passt carries the guest's packets. Its host here is a namespace with a way out, so that nothing else of the
//! machine's is in the way.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fixture::netns::{Netns, host};
use fixture::{Detached, Hull, Said, busybox, debian, traces_of, wait_gone};

/// `hull` with these arguments in a namespace, where the file is /etc/resolv.conf.
fn hull_in(netns: &Netns, resolv_conf: &Path, args: &[&str]) -> Hull {
    let setup = format!(
        "[ -e /etc/resolv.conf ] || touch /etc/resolv.conf
         mount --bind {} /etc/resolv.conf
         exec nsenter --net=/run/netns/{} \"$@\"",
        resolv_conf.display(),
        netns.name
    );
    Hull::new(args).after(&setup)
}

fn resolv_conf(contents: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, contents).unwrap();
    // As that of a host: passt reads it as nobody.
    std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
    file
}

/// Tries until it works, for as long as a guest may take.
#[track_caller]
fn patiently<T>(what: &str, mut attempt: impl FnMut() -> std::io::Result<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(error) => assert!(Instant::now() < deadline, "{what}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The children of a process that are passt.
fn passt_of(owner: &str) -> Vec<i32> {
    let output = Command::new("pgrep").args(["-P", owner, "passt"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).lines().map(|pid| pid.parse().unwrap()).collect()
}

fn owner_of(container: &Detached) -> String {
    container.inspect()["owner_pid"].to_string()
}

/// A name server at this address that knows one address, 192.0.2.80, for whatever name it is asked for.
fn name_server(address: &str) {
    let socket = UdpSocket::bind((address, 53)).unwrap();
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((len, client)) = socket.recv_from(&mut query) {
            // Header, one question: name, type, class. Anything else that follows is left out of the answer.
            let name = 12 + query[12..len].iter().position(|byte| *byte == 0).unwrap_or(0) + 1;
            let is_a = query.get(name..name + 2) == Some(&[0, 1]);
            let mut answer = query[..name + 4].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
            if is_a {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 80]);
            }
            let _ = socket.send_to(&answer, client);
        }
    });
}

/// A process, killed when this is dropped.
pub(super) struct Killed(pub(super) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const SERVER: &str = "
import socket, threading
def udp():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(('0.0.0.0', 81))
    while True:
        data, peer = s.recvfrom(70000)
        s.sendto(data[::-1], peer)
threading.Thread(target=udp, daemon=True).start()
server = socket.create_server(('::', 80), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    client, _ = server.accept()
    client.sendall(b'served')
    client.close()
";

#[test]
fn the_guest_reaches_the_host_and_is_reached_by_published_ports() {
    let netns = Netns::with_eth0(1500);
    let servers =
        resolv_conf(&format!("nameserver {}\noptions timeout:30\nsearch example.org\n", netns.host_address()));
    name_server(&netns.host_address());
    let debian = debian();
    let args = [
        "run",
        "-d",
        "--memory",
        "256",
        "--hostname",
        "web",
        "--net",
        "user",
        "-p",
        "18090:80",
        "-p",
        "18091:81/udp",
        &debian,
        "python3",
        "-c",
        SERVER,
    ];
    let container = Detached { id: hull_in(&netns, servers.path(), &args).run().ok() };

    // In, both families and both protocols.
    for address in [format!("{}:18090", netns.address()), format!("[{}]:18090", netns.address6())] {
        let answer = patiently(&address, || {
            let mut answer = String::new();
            TcpStream::connect(&address)?.read_to_string(&mut answer)?;
            if answer.is_empty() { Err(std::io::ErrorKind::ConnectionReset.into()) } else { Ok(answer) }
        });
        assert_eq!(answer, "served", "{address}");
    }
    let socket = UdpSocket::bind((netns.host_address(), 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let answer = patiently("udp", || {
        socket.send_to(b"abc", (netns.address(), 18091))?;
        let mut answer = [0; 16];
        let len = socket.recv(&mut answer)?;
        Ok(answer[..len].to_vec())
    });
    assert_eq!(answer, b"cba");

    // Out.
    let said = container.exec(["cat", "/etc/resolv.conf", "/etc/hosts"]).run().ok();
    assert!(
        said.starts_with("nameserver 10.0.2.3\noptions timeout:30\nsearch example.org\n")
            && said.contains("10.0.2.100\tweb"),
        "{said}"
    );
    assert!(said.contains("fd00::100\tweb"), "{said}");
    let look_up = "import socket; print(socket.gethostbyname('hull.example'))";
    assert_eq!(container.exec(["python3", "-c", look_up]).run().ok(), "192.0.2.80");

    // What listens on the host's loopback interface alone is not the guest's business.
    let listen = ["netns", "exec", &netns.name, "python3", "-m", "http.server", "--bind", "127.0.0.1", "18099"];
    let listen = Command::new("ip").args(listen).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let _listener = Killed(listen.unwrap());
    let connect = |address: &str| format!("import socket; socket.create_connection(('{address}', 18099), 20)");
    let at_home = connect("127.0.0.1");
    patiently("the host's own listener", || {
        let mut command = Command::new("ip");
        let status =
            command.args(["netns", "exec", &netns.name, "python3", "-c", &at_home]).stderr(Stdio::null()).status()?;
        if status.success() { Ok(()) } else { Err(std::io::ErrorKind::ConnectionRefused.into()) }
    });
    for address in ["10.0.2.2", "10.0.2.100", "127.0.0.1"] {
        assert_ne!(container.exec(["python3", "-c", &connect(address)]).run().code, 0, "{address}");
    }

    let passt = passt_of(&owner_of(&container));
    assert_eq!(passt.len(), 1);
    let id = container.id.clone();
    drop(container);
    wait_gone(passt[0]);
    assert!(traces_of(&id).is_empty());
}

#[test]
fn more_bytes_than_any_buffer_has_come_back_exactly() {
    let netns = Netns::with_eth0(1500);
    let servers = resolv_conf("");
    let debian = debian();
    let args = ["run", "-d", "--memory", "256", "--net", "user", &debian, "sleep", "1000"];
    let container = Detached { id: hull_in(&netns, servers.path(), &args).run().ok() };
    let listener = TcpListener::bind((netns.host_address(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = vec![0; 8 << 20];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
        // The guest closes first: passt resets a connection that both sides have closed, and what the guest has not read is lost.
        assert_eq!(stream.read(&mut bytes).unwrap(), 0);
    });
    let exchange = format!(
        "import hashlib, socket
data = b''.join(hashlib.sha256(bytes([n])).digest() * 32768 for n in range(8))
s = socket.create_connection(('{}', {port}))
s.sendall(data)
print(s.makefile('rb').read(len(data)) == data)",
        netns.host_address()
    );
    assert_eq!(container.exec(["python3", "-c", &exchange]).run().ok(), "True");
    echo.join().unwrap();
}

#[test]
fn the_guest_pings_and_has_the_servers_and_names_it_is_told() {
    let netns = Netns::with_eth0(1500);
    // passt asks by sockets that only these groups may have.
    let script = "echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range";
    let status = Command::new("ip").args(["netns", "exec", &netns.name, "sh", "-c", script]).status().unwrap();
    assert!(status.success());
    let servers = resolv_conf("nameserver 127.0.0.53\n");
    let busybox = busybox();
    let program = format!("cat /etc/resolv.conf; grep -w db /etc/hosts; ping -c 2 -W 20 {}", netns.host_address());
    let args = ["run", "--rm", "--memory", "128", "--net", "user", "--dns", "192.0.2.7", "--add-host", "db:192.0.2.9"];
    let args = [&args[..], &[busybox.as_str(), "sh", "-c", &program]].concat();
    let said = hull_in(&netns, servers.path(), &args).run().ok();
    assert!(said.starts_with("nameserver 192.0.2.7\n192.0.2.9\tdb\n"), "{said}");
    assert!(said.contains("2 packets received"), "{said}");
}

#[test]
fn the_death_of_the_owner_ends_passt() {
    let netns = Netns::with_eth0(1500);
    let servers = resolv_conf("");
    let busybox = busybox();
    let args = ["run", "-d", "--memory", "128", "--net", "user", "-p", "18092:80", &busybox, "sleep", "1000"];
    let container = Detached { id: hull_in(&netns, servers.path(), &args).run().ok() };
    let owner = owner_of(&container);
    let passt = passt_of(&owner);
    assert_eq!(passt.len(), 1);
    let owner: i32 = owner.parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(owner), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_gone(owner);
    wait_gone(passt[0]);
    // The port is free for the next.
    let again: Said =
        hull_in(&netns, servers.path(), &[&args[..1], &["--rm"], &args[2..8], &[&busybox, "true"]].concat()).run();
    again.ok();
}

#[test]
fn a_passt_that_cannot_start_is_named() {
    let netns = Netns::with_eth0(1500);
    let servers = resolv_conf("");
    let busybox = busybox();
    let listen = ["netns", "exec", &netns.name, "python3", "-m", "http.server", "--bind", "127.0.0.1", "18093"];
    let listen = Command::new("ip").args(listen).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let _listener = Killed(listen.unwrap());
    patiently("a listener", || {
        let said = host(&format!("ss -lnt -N {}", netns.name));
        if said.contains(":18093") { Ok(()) } else { Err(std::io::ErrorKind::NotFound.into()) }
    });
    let run =
        |port: &str| hull_in(&netns, servers.path(), &["run", "--rm", "--net", "user", "-p", port, &busybox, "true"]);
    run("127.0.0.1:18093:80").run().failed(&["passt does not start", "18093"]);
    let bin = fixture::installed("bin");
    let without = Hull::new(["run", "--rm", "--net", "user", &busybox, "true"]).env("PATH", bin);
    without.run().failed(&["passt is not installed", "package passt"]);
}

#[test]
fn without_a_word_the_first_configured_network_is_taken_and_said_once() {
    let state = tempfile::tempdir_in("/run").unwrap();
    let none = tempfile::tempdir().unwrap();
    let configured = tempfile::tempdir().unwrap();
    for (file, name) in [("20-b.conflist", "beta"), ("10-a.conflist", "alpha")] {
        let list = serde_json::json!({ "cniVersion": "1.0.0", "name": name, "plugins": [{ "type": "no-such" }] });
        std::fs::write(configured.path().join(file), list.to_string()).unwrap();
    }
    let busybox = busybox();
    let run = |directory: &Path, path: Option<String>, script: &str| {
        let words = ["run", "--boot-timeout", "120", "--rm", "--memory", "128", &busybox, "sh", "-c", script];
        let hull = Hull::plain(words).env("NETCONFPATH", directory).env("HULL_STATE_DIR", state.path());
        match path {
            Some(path) => hull.env("PATH", path).run(),
            None => hull.run(),
        }
    };
    let said = run(configured.path(), None, "true");
    assert_eq!(said.code, 125);
    let lines: Vec<&str> = said.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with("hull: the network is cni:alpha, the first that is configured; --net"), "{lines:?}");
    assert!(lines[1].contains("no-such"), "{lines:?}");
    run(configured.path(), None, "true").failed(&["no-such"]);

    let said = run(none.path(), None, "ip route");
    assert!(said.stderr.starts_with("hull: the network is user, since no network is configured for CNI"), "{said:?}");
    assert_eq!((said.code, said.stderr.lines().count()), (0, 1), "{said:?}");
    assert!(said.text().contains("default via 10.0.2.2"), "{said:?}");
    run(none.path(), None, "true").ok();

    let said = run(none.path(), Some(fixture::installed("bin")), "ls -d /sys/class/net/*/");
    assert!(said.stderr.starts_with("hull: the network is none"), "{said:?}");
    assert_eq!(said.text(), "/sys/class/net/lo/\n");
}
