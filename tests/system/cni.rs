//! Networks that CNI plugins make, here Debian's own: bridge, host-local, portmap.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fixture::netns::host;
use fixture::{Detached, Hull, busybox, debian, traces_of, wait_gone};

/// A directory with the configuration of a network, whose bridge is gone when this is dropped.
struct Network {
    dir: tempfile::TempDir,
    number: u8,
}

impl Network {
    /// `number` tells networks apart, down to their addresses.
    fn new(number: u8) -> Self {
        let network = Self { dir: tempfile::tempdir_in("/var/tmp").unwrap(), number };
        let config = serde_json::json!({
            "cniVersion": "1.0.0",
            "name": "test",
            "plugins": [
                {
                    "type": "bridge", "bridge": network.bridge(), "isGateway": true, "ipMasq": true,
                    "ipam": {
                        "type": "host-local", "dataDir": network.leases(),
                        "ranges": [
                            [{ "subnet": format!("10.89.{number}.0/24") }],
                            [{ "subnet": format!("fd00:89:{number}::/64") }],
                        ],
                        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
                    },
                    "dns": { "nameservers": ["192.0.2.53"] },
                },
                { "type": "portmap", "capabilities": { "portMappings": true } },
            ],
        });
        fs::write(network.dir.path().join("10-test.conflist"), config.to_string()).unwrap();
        network
    }

    fn bridge(&self) -> String {
        format!("htbr{}", self.number)
    }

    fn leases(&self) -> PathBuf {
        self.dir.path().join("leases")
    }

    /// `hull run` in the network.
    fn run(&self, args: &[&str]) -> Hull {
        let words = ["run", "--net", "cni:test"].iter().chain(args);
        Hull::new(words).env("NETCONFPATH", self.dir.path())
    }

    /// Interfaces, leases and rules that are left of containers.
    fn traces(&self, id: &str) -> Vec<String> {
        let ports = host(&format!("ip -o link show master {}", self.bridge()));
        let mut traces: Vec<String> = ports.lines().map(str::to_owned).collect();
        if let Ok(leases) = fs::read_dir(self.leases().join("test")) {
            let names = leases.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            traces.extend(names.filter(|name| name.starts_with("10.") || name.starts_with("fd00")));
        }
        for tool in ["iptables-save", "ip6tables-save"] {
            let rules = host(&format!("{tool} -t nat"));
            traces.extend(rules.lines().filter(|rule| rule.contains(id)).map(str::to_owned));
        }
        traces
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip").args(["link", "del", &self.bridge()]).output();
    }
}

/// Asks for a page until somebody serves it.
fn get(address: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let answer = TcpStream::connect(address).and_then(|mut stream| {
            stream.write_all(b"GET /etc/hostname HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        });
        match answer {
            Ok(answer) if !answer.is_empty() => return answer,
            answer => assert!(Instant::now() < deadline, "{address}: {answer:?}"),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Answers each datagram with itself turned round.
const ECHO: &str = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('0.0.0.0', 81))
print('ready', flush=True)
while True:
    data, peer = s.recvfrom(70000)
    s.sendto(data[::-1], peer)
";

#[test]
fn a_published_port_leads_to_the_guest() {
    let network = Network::new(1);
    let program = ["python3", "-m", "http.server", "80"];
    let debian = debian();
    let ports = ["-p", "18080:80", "-p", "18081:81/udp"];
    let mut args = vec!["-d", "--memory", "256", "--hostname", "web"];
    args.extend(ports.iter().chain(&[debian.as_str()]));
    args.extend(program);
    let id = network.run(&args).run().ok();
    let container = Detached { id: id.clone() };
    for address in ["127.0.0.1:18080", "10.89.1.1:18080"] {
        let answer = get(address);
        assert!(answer.ends_with("web\n"), "{address}: {answer}");
    }
    let mut echo = container.exec(["python3", "-c", ECHO]).spawn();
    BufReader::new(echo.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    for address in ["127.0.0.1:18081", "10.89.1.1:18081"] {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        socket.send_to(b"abc", address).unwrap();
        let mut answer = [0; 4];
        let (len, sender) = socket.recv_from(&mut answer).unwrap();
        assert_eq!((&answer[..len], sender.to_string().as_str()), (&b"cba"[..], address));
    }

    // A port has one owner, whatever that is.
    let refused = |port: &str, holder: &str| {
        let said = network.run(&["--rm", "-p", port, &busybox(), "true"]).run();
        said.failed(&[&format!("of the host is taken by {holder}"), "publish another one"]);
    };
    refused("18080:81", &format!("the container {id};"));
    refused("18081:81/udp", &format!("the container {id};"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let program = std::fs::read_to_string("/proc/self/comm").unwrap();
    let program = format!("{} (process {})", program.trim_end(), std::process::id());
    refused(&format!("{}:80", listener.local_addr().unwrap().port()), &program);

    let said = container.exec(["cat", "/etc/resolv.conf", "/etc/hosts"]).run().ok();
    assert!(said.starts_with("nameserver 192.0.2.53\n") && said.contains("10.89.1.2\tweb"), "{said}");
    assert!(said.contains("fd00:89:1::2\tweb"), "{said}");
    drop(container);
    echo.wait().unwrap();
    assert_eq!(network.traces(&id), [""; 0]);
    assert!(traces_of(&id).is_empty());
}

#[test]
fn two_containers_reach_each_other_and_the_host() {
    let network = Network::new(2);
    let (debian, busybox) = (debian(), busybox());
    let program = ["-d", "--memory", "256", "--hostname", "web", &debian, "python3", "-m", "http.server", "80"];
    let web = Detached { id: network.run(&program).run().ok() };
    get("10.89.2.2:80");
    let script = "ping -c 2 -W 20 10.89.2.1 && ping -c 2 -W 20 web && wget -qO- http://web/etc/hostname";
    let client = ["--rm", "--memory", "128", "--add-host", "web:10.89.2.2", &busybox, "sh", "-c", script];
    let said = network.run(&client).run().ok();
    assert!(said.ends_with("\nweb") && said.matches("2 packets received").count() == 2, "{said}");
    drop(web);
    assert_eq!(network.traces("no container's"), [""; 0]);
}

#[test]
fn the_death_of_the_owner_ends_its_network() {
    let network = Network::new(3);
    let busybox = busybox();
    let id = network.run(&["-d", "--memory", "128", "-p", "18083:80", &busybox, "sleep", "1000"]).run().ok();
    let container = Detached { id: id.clone() };
    assert_ne!(network.traces(&id), [""; 0]);
    let record = container.inspect();
    let pid = |key: &str| i32::try_from(record[key].as_i64().unwrap()).unwrap();
    let (owner, vmm) = (pid("owner_pid"), pid("vmm_pid"));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(owner), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_gone(owner);
    wait_gone(vmm);
    // Whoever looks next sweeps.
    fixture::hull(["ps", "-a"]).run().ok();
    // Without a namespace, bridge does not find the addresses whose rules of `ipMasq` it is to remove: for each family a jump,
    // and the chain that it leads to. All else goes, the published port's rules too.
    let traces = network.traces(&id);
    let jumps = traces.iter().filter(|trace| trace.starts_with("-A POSTROUTING "));
    let chains: Vec<&str> = jumps.filter_map(|jump| jump.rsplit(' ').next()).collect();
    let is_masquerade = |trace: &String| {
        let chain = trace.strip_prefix("-A ").and_then(|rule| rule.split(' ').next());
        chain.is_some_and(|chain| chain == "POSTROUTING" || chains.contains(&chain))
    };
    let left: Vec<&String> = traces.iter().filter(|trace| !is_masquerade(trace)).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(traces_of(&id).is_empty());
}

#[test]
fn a_plugin_that_fails_is_shown_and_undone() {
    let network = Network::new(4);
    let plugins = tempfile::tempdir().unwrap();
    let log = plugins.path().join("log");
    let plugin = |name: &str, script: &str| {
        let path = plugins.path().join(name);
        fs::write(&path, format!("#!/bin/sh\necho {name} $CNI_COMMAND >>{}\n{script}\n", log.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    plugin("good", "echo '{}'");
    plugin("bad", r#"[ $CNI_COMMAND = DEL ] || { echo '{"code": 11, "msg": "no more addresses"}'; exit 1; }"#);
    let config = serde_json::json!({
        "cniVersion": "1.0.0", "name": "broken", "plugins": [{ "type": "good" }, { "type": "bad" }],
    });
    fs::write(network.dir.path().join("20-broken.conflist"), config.to_string()).unwrap();
    let run = |net: &str, more: &[&str]| {
        let busybox = busybox();
        let mut words = vec!["run", "--rm", "--net", net];
        words.extend(more);
        words.extend([busybox.as_str(), "true"]);
        let path = plugins.path().to_str().unwrap();
        Hull::new(words).env("NETCONFPATH", network.dir.path()).env("CNI_PATH", path).run()
    };
    run("cni:broken", &[]).failed(&["plugin bad failed (ADD)", "no more addresses"]);
    assert_eq!(fs::read_to_string(&log).unwrap(), "good ADD\nbad ADD\nbad DEL\ngood DEL\n");
    run("cni:broken", &["-p", "1:1"]).failed(&["broken publishes no ports", "portmap"]);
    run("cni:none", &[]).failed(&["no network none", "test, broken"]);
    run("cni:test", &[]).failed(&["plugin \"bridge\" is not in", "CNI_PATH"]);
    run("none", &["-p", "1:1"]).failed(&["-p needs --net cni:NAME or --net user"]);
    assert!(!Path::new("/sys/class/net").join(network.bridge()).exists());
}
