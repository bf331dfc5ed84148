//! A network namespace's interfaces as the guest's own.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use fixture::netns::{Netns, host};
use fixture::{Detached, Hull, Said, busybox, debian, hull, traces_of, wait_gone};
use sha2::{Digest, Sha256};

/// `hull run --rm` of a shell script in the small image, in this namespace.
fn run(netns: &Netns, script: &str) -> Said {
    hull(["run", "--rm", "--memory", "128", "--net", &netns.option(), &busybox(), "sh", "-c", script]).run()
}

/// A container in the small image, in this namespace, that stays.
fn stay(netns: &Netns, script: &str) -> Detached {
    Detached::start(["--memory", "128", "--net", &netns.option(), &busybox(), "sh", "-c", script])
}

/// Connects as soon as somebody listens there.
pub(super) fn connect(address: &str) -> TcpStream {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{address}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn sorted(text: &str) -> Vec<String> {
    let mut lines: Vec<String> =
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    lines.sort();
    lines
}

#[test]
fn without_a_namespace_there_is_only_loopback() {
    let said =
        hull(["run", "--rm", "--memory", "128", &busybox(), "sh", "-c", "ls -d /sys/class/net/*/; ping -c1 127.0.0.1"]);
    let said = said.run().ok();
    assert!(said.starts_with("/sys/class/net/lo/\nPING") && said.contains("1 packets received"), "{said}");
}

/// The host's own ip(8) in a container that has `/usr` at `/host`: that of the small image says less.
const IP: &str =
    "/host/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path /host/lib/x86_64-linux-gnu /host/bin/ip";

#[test]
fn the_guest_has_what_the_namespace_has() {
    let netns = Netns::with_eth0(1400);
    let (address, there) = (netns.address(), netns.host_address());
    netns.ip("neigh add 10.88.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent");
    netns.ip("neigh add proxy 10.88.0.78 dev eth0");
    netns.ip(&format!("route add 192.0.2.0/24 dev eth0 metric 7 src {address}"));
    netns.ip(&format!("route add 192.0.3.0/24 via {there} mtu 1280"));
    let hops = format!("nexthop via {there} dev eth0 weight 3 nexthop via 10.99.0.1 dev eth0 weight 5 onlink");
    netns.ip(&format!("route add 192.0.4.0/24 {hops}"));
    netns.ip("route add unreachable 198.51.100.0/24");
    netns.ip("route add 203.0.113.0/24 via 10.99.0.1 dev eth0 onlink table 77");
    netns.ip("rule add from 10.88.0.0/16 iif eth0 fwmark 0x7/0xff lookup 77 priority 500");
    netns.ip("-6 rule add to 2001:db8::/32 unreachable priority 600");
    // As Cilium does it.
    netns.ip("rule add lookup local priority 100");
    netns.ip("rule del priority 0");
    netns.ip("-6 rule del priority 32766");
    netns.ip("addr add 198.18.0.10/32 dev lo");
    netns.ip("addr add 198.18.1.1/24 dev lo");
    netns.ip("addr add 2001:db8:1::1/64 dev lo");
    netns.ip("route add local 198.18.2.0/24 dev lo");
    netns.ip("-6 route add local 2001:db8:2::/64 dev lo");
    host(&format!("ip netns exec {} sysctl -qw net.ipv4.conf.eth0.rp_filter=2 net.core.somaxconn=77", netns.name));
    let link = netns.ip("-o link show eth0");
    let mac = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap();
    let script = format!(
        "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu
         cat /proc/sys/net/ipv4/conf/eth0/rp_filter /proc/sys/net/core/somaxconn
         ip -o addr show dev eth0; ip -o addr show dev lo; ip neigh show nud permanent
         echo ROUTES; {IP} route; {IP} route show table 77; {IP} route show table local; {IP} neigh show proxy
         {IP} rule; {IP} -6 rule
         echo ROUTES; ip -6 route show; {IP} -6 route show table local"
    );
    let (option, image) = (netns.option(), busybox());
    let options = ["run", "--rm", "--memory", "128", "--net", &option, "-v", "/usr:/host:ro", &image];
    let said = Hull::new(options.into_iter().chain(["sh", "-c", &script])).run().ok();
    let [own, routes, routes6] = said.split("ROUTES\n").collect::<Vec<_>>().try_into().unwrap();
    assert_eq!(own.lines().take(4).collect::<Vec<_>>(), [mac, "1400", "2", "77"]);
    for wanted in [
        &format!("{address}/24"),
        &format!("{}/64", netns.address6()),
        "10.88.0.77",
        "fe80::",
        "127.0.0.1/8",
        "198.18.0.10/32",
        "198.18.1.1/24",
        "2001:db8:1::1/64",
    ] {
        assert!(own.contains(wanted), "{wanted} is not in {own}");
    }
    let expected: String =
        ["route", "route show table 77", "route show table local", "neigh show proxy", "rule", "-6 rule"]
            .map(|command| netns.ip(command))
            .concat();
    // The guest's link may be a moment late.
    assert_eq!(sorted(&routes.replace(" linkdown", "")), sorted(&expected));
    let default = format!("default via {}", netns.host_address6());
    for wanted in [&default, "fe80::/64", "2001:db8:1::/64 dev lo", "local 2001:db8:2::/64 dev lo"] {
        assert!(routes6.contains(wanted), "{wanted} is not in {routes6}");
    }
    assert_eq!(netns.traces(), [""; 0]);
}

#[test]
fn packets_pass_both_ways_and_both_families() {
    let netns = Netns::with_eth0(1500);
    // The guest has these on its loopback interface: one that the host asks for on the link, others by the guest's own.
    netns.ip("addr add 198.18.0.10/32 dev lo");
    netns.ip("route add local 198.18.1.0/24 dev lo");
    netns.ip("addr add 2001:db8:1::10/128 dev lo");
    host(&format!("ip route add 198.18.0.10/32 dev {}", netns.host_end("eth0")));
    host(&format!("ip route add 198.18.1.0/24 via {}", netns.address()));
    host(&format!("ip route add 2001:db8:1::10/128 via {}", netns.address6()));
    let container = stay(&netns, "while :; do echo hello | nc -l -p 7000; done");
    let own = [&netns.address(), &format!("[{}]", netns.address6())];
    let all = own.into_iter().map(String::as_str).chain(["198.18.0.10", "198.18.1.77", "[2001:db8:1::10]"]);
    for address in all.map(|address| format!("{address}:7000")) {
        let mut answer = String::new();
        connect(&address).read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "hello\n", "{address}");
    }
    host(&format!("busybox ping -c 2 -W 20 {}", netns.address()));
    host(&format!("busybox ping -6 -c 2 -W 20 {}", netns.address6()));
    for address in [netns.host_address(), netns.host_address6()] {
        // Full packets and fragments.
        for size in ["56", "1472", "4000"] {
            let said = container.exec(["ping", "-c", "2", "-W", "20", "-s", size, &address]).run();
            assert!(said.text().contains("2 packets received"), "{address} {size}: {} {}", said.text(), said.stderr);
        }
    }
    let said = container.exec(["sh", "-c", &format!("nc -w 10 {} 7001 </dev/null", netns.host_address())]).run();
    assert_ne!(said.code, 0, "nobody listens on 7001");
}

#[test]
fn jumbo_packets_pass_whole() {
    let netns = Netns::with_eth0(9000);
    let said = run(&netns, &format!("ping -c 2 -W 20 -s 8900 {}", netns.host_address()));
    assert!(said.text().contains("2 packets received"), "{} {}", said.text(), said.stderr);
}

#[test]
fn a_vlan_of_the_hosts_is_an_interface_like_any_other() {
    // The trunk stays on the host; what is moved in has its packets without tags.
    let netns = Netns::empty();
    host("ip link add httrunk0 type veth peer name httrunk1");
    let _trunk = Trunk;
    for end in ["httrunk0", "httrunk1"] {
        host(&format!("ip link set {end} up"));
        host(&format!("ip link add link {end} name {end}.7 type vlan id 7"));
    }
    host("ip addr add 172.31.22.1/24 dev httrunk0.7");
    host("ip link set httrunk0.7 up");
    host(&format!("ip link set httrunk1.7 netns {} name eth0", netns.name));
    netns.ip("addr add 172.31.22.2/24 dev eth0");
    netns.ip("link set eth0 up");
    let said = run(&netns, "ping -c 2 -W 20 -s 1472 172.31.22.1");
    assert!(said.text().contains("2 packets received"), "{} {}", said.text(), said.stderr);
    // One whose trunk is in there too would get its packets twice.
    netns.ip("link add link eth0 name eth0.8 type vlan id 8");
    netns.ip("link set eth0.8 up");
    run(&netns, "true").failed(&["interface eth0.8", "sits on another interface"]);
    assert_eq!(netns.traces(), [""; 0]);
}

struct Trunk;

impl Drop for Trunk {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", "httrunk0"]).output();
    }
}

#[test]
fn five_hundred_connections_are_open_at_once() {
    const CONNECTIONS: usize = 500;
    let netns = Netns::with_eth0(1500);
    let program = format!(
        "
import socket
server = socket.create_server(('0.0.0.0', 7000), backlog={CONNECTIONS})
clients = [server.accept()[0] for _ in range({CONNECTIONS})]
for client in clients: client.sendall(client.recv(16)[::-1])
for client in clients: assert client.recv(16) == b''
print('served', flush=True)
"
    );
    let option = netns.option();
    let container = Detached::start(["--memory", "256", "--net", &option, &debian(), "python3", "-c", &program]);
    let address = format!("{}:7000", netns.address());
    let mut streams = vec![connect(&address)];
    streams.extend((1..CONNECTIONS).map(|_| TcpStream::connect(&address).unwrap()));
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(format!("{number:04}").as_bytes()).unwrap();
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).unwrap();
        let wanted: Vec<u8> = format!("{number:04}").bytes().rev().collect();
        assert_eq!(&answer[..], wanted);
    }
    drop(streams);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !hull(["logs", &container.id]).run().text().contains("served") {
        assert!(Instant::now() < deadline, "{}", hull(["logs", &container.id]).run().stderr);
    }
}

#[test]
fn connections_that_one_side_has_forgotten_are_reset() {
    let netns = Netns::with_eth0(1500);
    // By the host: its end is closed with data on the way.
    let listener = TcpListener::bind((netns.host_address(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let program = format!(
        "
import socket
s = socket.create_connection(('{}', {port}))
s.sendall(b'never read')
try: print('ended', s.recv(1))
except ConnectionResetError: print('reset')
",
        netns.host_address()
    );
    let resetting = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        // What has arrived and is not read makes closing a reset.
        while stream.peek(&mut [0; 16]).unwrap() < b"never read".len() {}
    });
    let option = netns.option();
    let said = hull(["run", "--rm", "--memory", "256", "--net", &option, &debian(), "python3", "-c", &program]).run();
    assert_eq!(said.ok(), "reset");
    resetting.join().unwrap();

    // By the guest: another one has come in its place, which knows nothing of the connection.
    // Its input stays open, and with it the connection.
    let first = stay(&netns, "while :; do sleep 1000 | nc -l -p 7000; done");
    let mut stream = connect(&format!("{}:7000", netns.address()));
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let vmm = i32::try_from(first.inspect()["vmm_pid"].as_i64().unwrap()).unwrap();
    // At once, so that it says no goodbye.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(vmm), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_gone(vmm);
    drop(first);
    let _second = stay(&netns, "sleep 1000");
    stream.write_all(b"are you there?").unwrap();
    let error = stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// A kernel module that the kernel does not find, until this is dropped.
struct Hidden(&'static str);

impl Hidden {
    fn new(module: &'static str) -> Self {
        std::fs::create_dir_all("/run/modprobe.d").unwrap();
        std::fs::write("/run/modprobe.d/hull-test.conf", format!("install {module} /bin/false\n")).unwrap();
        let hidden = Self(module);
        host(&format!("rmmod {module}"));
        hidden
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = std::fs::remove_file("/run/modprobe.d/hull-test.conf");
        let _ = Command::new("modprobe").arg(self.0).status();
    }
}

#[test]
fn a_kernel_without_filters_is_named_with_what_to_load() {
    let netns = Netns::with_eth0(1500);
    let hidden = Hidden::new("cls_u32");
    run(&netns, "true").failed(&["interface eth0", "lacks a part", "cls_u32"]);
    assert_eq!(netns.traces(), [""; 0]);
    drop(hidden);
    run(&netns, "true").ok();
}

/// Bytes that follow from a seed, the same in Rust and Python: SHA-256 of a counter.
fn block(seed: u8, number: u64) -> Vec<u8> {
    let digest = Sha256::digest([&[seed][..], &number.to_le_bytes()].concat());
    digest.repeat(2048)
}

/// Blocks of 64 KiB in 64 MiB.
const BLOCKS: u64 = 1024;

#[test]
fn sixty_four_mebibytes_arrive_exactly_each_way() {
    let netns = Netns::with_eth0(1500);
    let listener = TcpListener::bind((netns.host_address(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let program = format!(
        "
import hashlib, socket, threading
BLOCKS = {BLOCKS}
def block(seed, number): return hashlib.sha256(bytes([seed]) + number.to_bytes(8, 'little')).digest() * 2048
s = socket.create_connection(('{}', {port}))
def send():
    for number in range(BLOCKS): s.sendall(block(1, number))
    s.shutdown(socket.SHUT_WR)
sender = threading.Thread(target=send); sender.start()
f = s.makefile('rb')
for number in range(BLOCKS): assert f.read(65536) == block(2, number), number
assert f.read() == b''
sender.join()
print('exact')
",
        netns.host_address()
    );
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut writer = stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            for number in 0..BLOCKS {
                writer.write_all(&block(2, number)).unwrap();
            }
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut received = vec![0; 65536];
        for number in 0..BLOCKS {
            stream.read_exact(&mut received).unwrap();
            assert!(received == block(1, number), "block {number} differs");
        }
        assert_eq!(stream.read(&mut received).unwrap(), 0);
        sender.join().unwrap();
    });
    let option = netns.option();
    let said = Hull::new([
        "run",
        "--rm",
        "--memory",
        "256",
        "--cpus",
        "2",
        "--net",
        &option,
        &debian(),
        "python3",
        "-c",
        &program,
    ]);
    assert_eq!(said.run().ok(), "exact");
    server.join().unwrap();
}

#[test]
fn a_listener_on_the_guests_loopback_is_reached_from_the_namespace() {
    let netns = Netns::with_eth0(1500);
    // Neither other addresses there, nor that the rule for them is not where it was, is in the way.
    netns.ip("addr add 198.18.0.10/32 dev lo");
    netns.ip("rule add lookup local priority 100");
    netns.ip("rule del priority 0");
    let program = "
import socket
server = socket.create_server(('127.0.0.1', 7000))
while True:
    client, _ = server.accept()
    client.sendall(b'hello')
    client.close()
";
    let option = netns.option();
    let container = Detached::start(["--memory", "256", "--net", &option, &debian(), "python3", "-c", program]);
    let ask = |address: &str, port: &str| {
        let program = format!(
            "import socket; s = socket.create_connection(('{address}', {port}), 60); s.shutdown(1); print(s.recv(9))"
        );
        let output = Command::new("ip").args(["netns", "exec", &netns.name, "python3", "-c", &program]).output();
        let output = output.unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    // The listener may be a moment late.
    let patiently = |address: &str| {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let said = ask(address, "7000");
            if said.contains("hello") {
                return;
            }
            assert!(Instant::now() < deadline, "{address}: {said}");
        }
    };
    patiently("127.0.0.1");
    patiently("::1");
    let refused = ask("127.0.0.1", "7001");
    assert!(refused.contains("ConnectionResetError") || refused.contains("b''"), "{refused}");
    hull(["rm", "-f", &container.id]).run().ok();
    assert!(ask("127.0.0.1", "7000").contains("ConnectionRefusedError"));
}

#[test]
fn datagrams_to_the_namespaces_loopback_reach_the_guest_and_are_answered() {
    let netns = Netns::with_eth0(1500);
    let server = "
import socket, threading
def serve(family, address):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.bind((address, 7000))
    while True:
        data, peer = s.recvfrom(70000)
        s.sendto(data[::-1], peer)
threading.Thread(target=serve, args=(socket.AF_INET, '127.0.0.1')).start()
serve(socket.AF_INET6, '::1')
";
    let option = netns.option();
    let container = Detached::start(["--memory", "256", "--net", &option, &debian(), "python3", "-c", server]);
    // A client that hears its peer alone, and one that hears whoever answers; each with more than one datagram, one of
    // them longer than a packet.
    let client = "
import socket, sys
for family, address in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1')):
    peer = (address, 7000)
    for connected in (True, False):
        s = socket.socket(family, socket.SOCK_DGRAM)
        s.settimeout(5)
        if connected: s.connect(peer)
        for data in (b'abc', b'0123456789' * 3000, b'x'):
            s.send(data) if connected else s.sendto(data, peer)
            answer, sender = s.recvfrom(70000)
            assert answer == data[::-1] and sender[:2] == peer, (answer[:20], sender)
print('answered')
";
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let output = Command::new("ip").args(["netns", "exec", &netns.name, "python3", "-c", client]).output().unwrap();
        if output.stdout == b"answered\n" {
            break;
        }
        // The listener may be a moment late.
        assert!(Instant::now() < deadline, "{}", String::from_utf8_lossy(&output.stderr));
    }
    hull(["rm", "-f", &container.id]).run().ok();
}

#[test]
fn several_interfaces_keep_their_names() {
    let netns = Netns::with_eth0(1500);
    // A name that sorts and counts otherwise than the order of the interfaces.
    netns.add_veth("a1", 1300);
    netns.add_veth("eth2", 1200);
    netns.ip("addr add 172.31.7.2/30 dev a1");
    host(&format!("ip addr add 172.31.7.1/30 dev {}", netns.host_end("a1")));
    let said = run(
        &netns,
        "for i in a1 eth0 eth2 lo; do echo $i $(cat /sys/class/net/$i/mtu); done; ls -d /sys/class/net/*/ | wc -l
         ping -c 2 -W 20 172.31.7.1",
    );
    let said = said.ok();
    assert!(said.starts_with("a1 1300\neth0 1500\neth2 1200\nlo 65536\n4\n"), "{said}");
    assert!(said.contains("2 packets received"), "{said}");
    assert_eq!(netns.traces(), [""; 0]);
}

#[test]
fn a_namespace_without_ipv6_is_one_in_the_guest_too() {
    let netns = Netns::empty();
    host(&format!("ip netns exec {} sh -c echo>/dev/null", netns.name));
    let off = Command::new("ip")
        .args(["netns", "exec", &netns.name, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"])
        .status()
        .unwrap();
    assert!(off.success());
    netns.add_veth("eth0", 1500);
    netns.ip("addr add 172.31.8.2/30 dev eth0");
    host(&format!("ip addr add 172.31.8.1/30 dev {}", netns.host_end("eth0")));
    let said = run(&netns, "ip -6 addr | wc -l; ping -c 2 -W 20 172.31.8.1").ok();
    assert!(said.starts_with("0\n") && said.contains("2 packets received"), "{said}");
}

#[test]
fn a_gateway_beyond_every_route_is_taken_over() {
    // As Calico does it.
    let netns = Netns::empty();
    netns.add_veth("eth0", 1500);
    netns.ip("addr add 172.31.9.2/32 dev eth0");
    netns.ip("route add 169.254.1.1 dev eth0 scope link");
    netns.ip("route add default via 169.254.1.1 dev eth0");
    host(&format!("ip addr add 169.254.1.1/32 dev {}", netns.host_end("eth0")));
    host(&format!("ip route add 172.31.9.2/32 dev {}", netns.host_end("eth0")));
    let said = run(&netns, "ip route; ping -c 2 -W 20 169.254.1.1").ok();
    assert!(said.contains("default via 169.254.1.1 dev eth0") && said.contains("2 packets received"), "{said}");
}

#[test]
fn changes_of_the_namespace_reach_the_guest() {
    let netns = Netns::with_eth0(1500);
    let container = stay(&netns, "sleep 1000");
    let script = "ip addr; ip route; ip -6 route; ip rule; ip -6 rule | sed 's/^/six /'";
    let look = || container.exec(["sh", "-c", script]).run().ok();
    let wait = |holds: &dyn Fn(&str) -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let said = look();
            if holds(&said) {
                return;
            }
            assert!(Instant::now() < deadline, "{said}");
        }
    };
    netns.ip("addr add 192.0.2.7/32 dev eth0");
    netns.ip("addr add 2001:db8::7/128 dev eth0 nodad");
    netns.ip("route add 198.51.100.0/24 via 10.88.99.1 dev eth0 onlink src 192.0.2.7");
    netns.ip("rule add from 192.0.2.7 lookup 77 priority 700");
    netns.ip("addr add 198.18.0.10/32 dev lo");
    netns.ip("addr add 2001:db8:1::10/128 dev lo");
    // What looks into the table of the guest's own addresses moves, and of IPv6 the one for the main table goes.
    netns.ip("rule add lookup local priority 100");
    netns.ip("rule del priority 0");
    netns.ip("-6 rule del priority 32766");
    let on_loopback = ["198.18.0.10/32", "2001:db8:1::10/128", "\n100:"];
    let own = ["\n0:", "\nsix 32766:"];
    let all = ["192.0.2.7/32", "2001:db8::7/128", "198.51.100.0/24 via 10.88.99.1", "700:"];
    wait(&|said| {
        all.iter().chain(&on_loopback).all(|wanted| said.contains(wanted))
            && !own.iter().any(|gone| said.contains(gone))
    });
    host(&format!("ip route add 198.18.0.10/32 dev {}", netns.host_end("eth0")));
    host("busybox ping -c 2 -W 20 198.18.0.10");
    netns.ip("rule add lookup local priority 0");
    netns.ip("rule del priority 100");
    netns.ip("-6 rule add lookup main priority 32766");
    netns.ip("addr del 198.18.0.10/32 dev lo");
    netns.ip("addr del 2001:db8:1::10/128 dev lo");
    wait(&|said| own.iter().all(|wanted| said.contains(wanted)) && !on_loopback.iter().any(|gone| said.contains(gone)));
    netns.ip("rule del priority 700");
    netns.ip("addr del 192.0.2.7/32 dev eth0");
    netns.ip("addr del 2001:db8::7/128 dev eth0");
    wait(&|said| !all.iter().any(|gone| said.contains(gone)));
    netns.ip("link set eth0 arp off");
    wait(&|said| said.contains("NOARP"));
    netns.ip("link set eth0 arp on");
    wait(&|said| !said.contains("NOARP"));
    // What the guest cannot have keeps nothing else waiting: a larger MTU than its device was made for, and a route from
    // an address of an interface that is left alone.
    netns.ip("link set eth0 mtu 2000");
    netns.ip("tuntap add dev tun0 mode tun");
    netns.ip("link set tun0 up");
    netns.ip("addr add 192.0.2.99/32 dev tun0");
    netns.ip("route add 203.0.113.0/24 dev eth0 src 192.0.2.99");
    netns.ip("route add 203.0.114.0/24 dev eth0");
    wait(&|said| said.contains("203.0.114.0/24"));
    let said = look();
    assert!(said.contains("eth0: ") && said.contains(" mtu 1500 ") && !said.contains("203.0.113.0/24"), "{said}");
    netns.ip("link set eth0 mtu 1400");
    netns.ip("route del 203.0.114.0/24");
    wait(&|said| said.contains(" mtu 1400 ") && !said.contains("203.0.114.0/24"));
    // What was there from the start still is.
    let said = container.exec(["ping", "-c", "2", "-W", "20", &netns.host_address()]).run();
    assert!(said.text().contains("2 packets received"), "{} {}", said.text(), said.stderr);
}

#[test]
fn a_link_that_is_down_is_down_in_the_guest() {
    let netns = Netns::with_eth0(1500);
    let there = netns.host_end("eth0");
    host(&format!("ip link set {there} down"));
    let container = stay(&netns, "cat /sys/class/net/eth0/carrier; sleep 1000");
    let becomes = |state: &str| {
        look_until(&container, "cat /sys/class/net/eth0/carrier", |said| said.trim() == state);
    };
    becomes("0");
    host(&format!("ip link set {there} up"));
    becomes("1");
    let answers = || container.exec(["ping", "-c", "2", "-W", "20", &netns.host_address()]).run();
    assert!(answers().text().contains("2 packets received"), "{}", answers().text());
    // As a whole, or its other end alone: either way nothing passes.
    netns.ip("link set eth0 down");
    becomes("0");
    netns.ip("link set eth0 up");
    becomes("1");
    host(&format!("ip link set {there} down"));
    becomes("0");
    host(&format!("ip link set {there} up"));
    becomes("1");
    assert!(answers().text().contains("2 packets received"), "{}", answers().text());
}

/// Looks into a container by a shell script until it shows what is wanted.
#[track_caller]
fn look_until(container: &Detached, script: &str, holds: impl Fn(&str) -> bool) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let said = container.exec(["sh", "-c", script]).run();
        let text = said.text();
        if holds(&text) {
            return text;
        }
        assert!(Instant::now() < deadline, "{text} {}", said.stderr);
    }
}

#[test]
fn an_interface_that_comes_later_is_the_guests_until_it_goes() {
    let netns = Netns::with_eth0(1500);
    let container = stay(&netns, "sleep 1000");
    let devices = || container.exec(["sh", "-c", "ls /sys/bus/pci/devices | wc -l"]).run().ok();
    let (before, at_rest) = (devices(), netns.traces());
    // A tun, which no guest can have, is left where it is and is in nobody's way.
    netns.ip("tuntap add dev tun0 mode tun");
    netns.ip("link set tun0 up");
    // The second time under the same name, which is another interface all the same.
    for round in 1..=3 {
        netns.add_veth("late", 1400);
        netns.ip(&format!("addr add 172.31.20.{}/24 dev late", 10 + round));
        netns.ip("route add 198.51.100.0/24 via 172.31.20.1 dev late");
        host(&format!("ip addr add 172.31.20.1/24 dev {}", netns.host_end("late")));
        let mac = netns.ip("-o link show late");
        let mac = mac.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap().to_owned();
        let script = "cat /sys/class/net/late/address /sys/class/net/late/mtu; ip addr show dev late; ip route";
        let said = look_until(&container, script, |said| said.contains("198.51.100.0/24 via 172.31.20.1 dev late"));
        assert!(said.starts_with(&format!("{mac}\n1400\n")), "{said}");
        assert!(said.contains(&format!("172.31.20.{}/24", 10 + round)), "{said}");
        let said = container.exec(["ping", "-c", "2", "-W", "20", "-s", "1300", "172.31.20.1"]).run();
        assert!(said.text().contains("2 packets received"), "round {round}: {} {}", said.text(), said.stderr);
        netns.ip("link set late mtu 1350");
        look_until(&container, "cat /sys/class/net/late/mtu", |said| said == "1350\n");
        netns.ip("link del late");
        look_until(&container, "ls /sys/class/net", |said| said.contains("eth0") && !said.contains("late"));
        look_until(&container, "ls /sys/bus/pci/devices | wc -l", |said| said.trim() == before);
        // The interface's own words are gone with it; the tap's go when the VMM lets go.
        let deadline = Instant::now() + Duration::from_secs(30);
        while netns.traces() != at_rest {
            assert!(Instant::now() < deadline, "{:?}", netns.traces());
        }
    }
    let said = container.exec(["ping", "-c", "2", "-W", "20", &netns.host_address()]).run();
    assert!(said.text().contains("2 packets received"), "{} {}", said.text(), said.stderr);
    netns.ip("link del tun0");
    drop(container);
    assert_eq!(netns.traces(), [""; 0]);
}

#[test]
fn the_only_interface_may_go_and_come_back() {
    let netns = Netns::with_eth0(1500);
    let container = stay(&netns, "sleep 1000");
    netns.ip("link del eth0");
    look_until(&container, "ls -d /sys/class/net/*/; ip route | wc -l", |said| said == "/sys/class/net/lo/\n0\n");
    netns.add_veth("eth0", 1500);
    netns.ip("addr add 172.31.21.2/24 dev eth0");
    host(&format!("ip addr add 172.31.21.1/24 dev {}", netns.host_end("eth0")));
    look_until(&container, "ip addr show dev eth0", |said| said.contains("172.31.21.2/24"));
    let said = container.exec(["ping", "-c", "2", "-W", "20", "172.31.21.1"]).run();
    assert!(said.text().contains("2 packets received"), "{} {}", said.text(), said.stderr);
    // What has come is let go by a dead owner's heirs, too.
    let record = container.inspect();
    let id = |key: &str| i32::try_from(record[key].as_i64().unwrap()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id("owner_pid")), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_gone(id("owner_pid"));
    wait_gone(id("vmm_pid"));
    hull(["ps", "-a"]).run().ok();
    assert_eq!(netns.traces(), [""; 0]);
}

#[test]
fn a_namespace_serves_one_sandbox_after_another() {
    let netns = Netns::with_eth0(1500);
    let first = stay(&netns, "sleep 1000");
    let second = run(&netns, "true");
    second.failed(&["interface eth0", "another sandbox"]);
    assert_ne!(netns.traces(), [""; 0]);
    hull(["rm", "-f", &first.id]).run().ok();
    assert_eq!(netns.traces(), [""; 0]);
    assert!(run(&netns, &format!("ping -c 2 -W 20 {}", netns.host_address())).ok().contains("2 packets received"));
}

#[test]
fn the_death_of_the_owner_frees_the_namespace() {
    let netns = Netns::with_eth0(1500);
    let container = stay(&netns, "sleep 1000");
    let id = |value: &serde_json::Value| i32::try_from(value.as_i64().unwrap()).unwrap();
    let record = container.inspect();
    let (owner, vmm) = (id(&record["owner_pid"]), id(&record["vmm_pid"]));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(owner), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_gone(owner);
    wait_gone(vmm);
    // Whoever looks next sweeps.
    hull(["ps", "-a"]).run().ok();
    assert_eq!(netns.traces(), [""; 0]);
    assert!(traces_of(&container.id).is_empty());
    assert!(run(&netns, &format!("ping -c 2 -W 20 {}", netns.host_address())).ok().contains("2 packets received"));
}

#[test]
fn a_namespace_that_cannot_be_taken_is_named() {
    let refused = |option: &str, words: &[&str]| {
        hull(["run", "--rm", "--net", option, &busybox(), "true"]).run().failed(words);
    };
    refused("netns:/run/netns/no-such", &["cannot open the network namespace /run/netns/no-such", "removed"]);
    refused("netns:/dev/null", &["cannot enter /dev/null", "network namespace"]);
    refused("netns:/proc/1/ns/net", &["host's own network"]);
    refused("bridge", &["bridge is no network", "netns:PATH"]);
    let netns = Netns::with_eth0(1500);
    netns.ip("tuntap add dev tun0 mode tun");
    netns.ip("link set tun0 up");
    refused(&netns.option(), &["interface tun0", "not an Ethernet interface"]);
    assert_eq!(netns.traces(), [""; 0]);
}
