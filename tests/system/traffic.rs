//! What goes through a guest's interface besides a few packets: segments, many connections, others' measures; what stands in
//! its way on the host; and the kinds of interfaces that it may come from.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fixture::netns::{Netns, host};
use fixture::{Detached, Said, busybox, debian, hull};

use super::network::connect;
use super::user_net::Killed;

/// Serves one connection after another: tells each its number, and closes it.
const COUNTER: &str = "
import socket
server = socket.create_server(('0.0.0.0', 7000), backlog=1024)
number = 0
while True:
    client, _ = server.accept()
    client.send(b'%d' % number)
    client.close()
    number += 1
";

#[test]
fn datagrams_connections_and_measures_go_through_one_guest() {
    let netns = Netns::with_eth0(1500);
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let disk = dir.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    // The host's own programs are those that measure.
    let (option, disk, image) = (netns.option(), disk.to_str().unwrap(), debian());
    let options = ["--memory", "256", "--cpus", "2", "--net", &option, "--disk", disk, "-v", "/usr:/host/usr:ro"];
    let args = ["run", "-d"].into_iter().chain(options).chain([image.as_str(), "python3", "-c", COUNTER]);
    let container = Detached { id: fixture::Hull::new(args).run().ok() };

    many_connections_leave_nothing(&netns, &container);
    for address in [netns.host_address(), netns.host_address6()] {
        bursts_of_datagrams_pass_uncut(&netns, &container, &address);
    }
    connections_of_two_processors_use_two_queues(&netns, &container);
    iperf3_measures_both_ways(&netns, &container);
    fio_finds_what_it_wrote(&container);
}

/// How many connections there are to be. In the lab each takes five milliseconds; HULL_TEST_CONNECTIONS asks for another number.
fn connections() -> usize {
    std::env::var("HULL_TEST_CONNECTIONS").map_or(10_000, |text| text.parse().expect("a number of connections"))
}

fn many_connections_leave_nothing(netns: &Netns, container: &Detached) {
    /// So many are open at once.
    const AT_ONCE: usize = 100;
    let address = format!("{}:7000", netns.address());
    let ask = |mut stream: TcpStream| {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.parse::<usize>().unwrap()
    };
    // The first one waits for the program.
    let mut seen = BTreeSet::from([ask(connect(&address))]);
    let record = container.inspect();
    // Those of files come and go with the guest's caches.
    let sockets = || {
        ["owner_pid", "vmm_pid"].map(|of| {
            let descriptors = fs::read_dir(format!("/proc/{}/fd", record[of])).unwrap();
            let links = descriptors.filter_map(|descriptor| fs::read_link(descriptor.unwrap().path()).ok());
            links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
        })
    };
    let before = sockets();
    let count = connections();
    while seen.len() < count {
        let streams: Vec<_> =
            (seen.len()..count).take(AT_ONCE).map(|_| TcpStream::connect(&address).unwrap()).collect();
        seen.extend(streams.into_iter().map(ask));
    }
    // Those by the namespace's loopback address are connections of owner and VMM as well.
    let client = "
import socket
for _ in range(5):
    connections = [socket.create_connection(('127.0.0.1', 7000), 60) for _ in range(20)]
    for connection in connections:
        print(connection.makefile().read())
        connection.close()
";
    let output = Command::new("ip").args(["netns", "exec", &netns.name, "python3", "-c", client]).output().unwrap();
    seen.extend(Said::new(output).ok().lines().map(|number| number.parse::<usize>().unwrap()));
    assert!(seen.iter().copied().eq(0..count + 100), "{} of {count} and 100 were served", seen.len());
    let open = "cat /proc/net/tcp | awk '$4 == \"01\" || $4 == \"08\"' | wc -l";
    assert_eq!(container.exec(["sh", "-c", open]).run().ok(), "0", "connections that are still there");
    let deadline = Instant::now() + Duration::from_secs(60);
    while sockets() != before {
        assert!(Instant::now() < deadline, "sockets of owner and VMM: {before:?} and then {:?}", sockets());
    }
}

/// Sends bursts and gets as many back, in turns with itself at the other end; each is one call, which names the size of its
/// datagrams and leaves it to the interface to cut it into those.
const BURSTS: &str = "
import hashlib, socket, sys
SEGMENT, WHOLE, ROUNDS, UDP_SEGMENT = 1216, 50, 8, 103
def burst(sender, number):
    parts = (hashlib.sha256(b'%s %d %d' % (sender.encode(), number, part)).digest() for part in range(WHOLE))
    return b''.join(part * (SEGMENT // 32) for part in parts) + b'the end'
role, address, port = sys.argv[1:]
s = socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(60)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
s.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, SEGMENT)
if role == 'host':
    s.bind((address, 0))
    print(s.getsockname()[1], flush=True)
    s.connect(s.recvfrom(1, socket.MSG_PEEK)[1])
else:
    s.connect((address, int(port)))
for number in range(ROUNDS):
    for sender in 'guest', 'host':
        data = burst(sender, number)
        if role == sender:
            s.send(data)
        else:
            received = [s.recv(65536) for _ in range(WHOLE + 1)]
            assert [len(part) for part in received] == [SEGMENT] * WHOLE + [7], received
            assert b''.join(received) == data
print('exact')
";
/// Datagrams of one direction, all bursts together.
const DATAGRAMS: u64 = 8 * 51;

fn bursts_of_datagrams_pass_uncut(netns: &Netns, container: &Detached, address: &str) {
    let peer = Command::new("python3").args(["-c", BURSTS, "host", address, ""]).stdout(Stdio::piped()).spawn();
    let mut peer = Killed(peer.unwrap());
    let mut said = BufReader::new(peer.0.stdout.take().unwrap()).lines();
    let port = said.next().unwrap().unwrap();
    let before = packets(netns);
    assert_eq!(container.exec(["python3", "-c", BURSTS, "guest", address, &port]).run().ok(), "exact");
    assert_eq!(said.next().unwrap().unwrap(), "exact");
    // A burst is one packet, and there are few others.
    for ((way, after), (_, before)) in packets(netns).into_iter().zip(before) {
        let passed = after - before;
        assert!((8..DATAGRAMS / 4).contains(&passed), "{passed} packets went {way} for {DATAGRAMS} datagrams");
    }
}

/// What has gone through the tap: to the guest and from it.
fn packets(netns: &Netns) -> [(&'static str, u64); 2] {
    let said: serde_json::Value = serde_json::from_str(&netns.ip("-s -j link show dev hull0")).unwrap();
    [("to the guest", "tx"), ("from the guest", "rx")]
        .map(|(way, of_tap)| (way, said[0]["stats64"][of_tap]["packets"].as_u64().unwrap()))
}

/// Each of two processors speaks by some connections; tells how many interrupts each queue of what comes in had meanwhile.
const BY_BOTH: &str = "
import os, socket, sys
def interrupts():
    lines = (line.split() for line in open('/proc/interrupts'))
    return {words[-1]: sum(map(int, words[1:3])) for words in lines if '-input.' in words[-1]}
before = interrupts()
for cpu in 0, 1:
    if os.fork() == 0:
        os.sched_setaffinity(0, [cpu])
        connections = [socket.create_connection((sys.argv[1], int(sys.argv[2])), 60) for _ in range(4)]
        for number in range(25):
            for connection in connections:
                connection.sendall(b'%04d' % number)
                assert connection.recv(4) == b'%04d' % number
        os._exit(0)
assert [os.wait()[1], os.wait()[1]] == [0, 0]
after = interrupts()
print(*(after[queue] - before[queue] for queue in sorted(after)))
";

fn connections_of_two_processors_use_two_queues(netns: &Netns, container: &Detached) {
    let listener = TcpListener::bind((netns.host_address(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let server = std::thread::spawn(move || {
        let echo = |mut stream: TcpStream| {
            let mut bytes = [0; 4];
            while stream.read_exact(&mut bytes).is_ok() {
                stream.write_all(&bytes).unwrap();
            }
        };
        let echoes: Vec<_> = (0..8)
            .map(|_| listener.accept().unwrap().0)
            .map(|stream| std::thread::spawn(move || echo(stream)))
            .collect();
        echoes.into_iter().for_each(|echo| echo.join().unwrap());
    });
    let said = container.exec(["python3", "-c", BY_BOTH, &netns.host_address(), &port]).run().ok();
    server.join().unwrap();
    let interrupts: Vec<u32> = said.split(' ').map(|count| count.parse().unwrap()).collect();
    // A hundred answers came to each, some of them together.
    assert!(interrupts.len() == 2 && interrupts.iter().all(|count| *count >= 25), "{interrupts:?}");
}

/// Runs a program of the host's with these arguments in the guest, on the host's libraries.
fn host_program(container: &Detached, arguments: &str) -> String {
    let usr = "/host/usr";
    let script = format!(
        "{usr}/lib64/ld-linux-x86-64.so.2 --library-path {usr}/lib/x86_64-linux-gnu:{usr}/lib/x86_64-linux-gnu/ceph {usr}/bin/{arguments}"
    );
    container.exec(["sh", "-c", &script]).run().ok()
}

fn iperf3_measures_both_ways(netns: &Netns, container: &Detached) {
    let address = netns.host_address();
    let server = Command::new("iperf3").args(["-s", "--forceflush", "-B", &address]).stdout(Stdio::piped()).spawn();
    let mut server = Killed(server.unwrap());
    let mut said = BufReader::new(server.0.stdout.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().contains("listening")), "iperf3 ended");
    for direction in ["", "-R"] {
        let report = host_program(container, &format!("iperf3 -J -t 1 -c {address} {direction}"));
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        assert!(report["end"]["sum_received"]["bytes"].as_u64().unwrap() > 1 << 20, "{direction} {report}");
    }
}

fn fio_finds_what_it_wrote(container: &Detached) {
    let job = "fio --name=smoke --filename=/dev/vda --rw=randwrite --bs=4k --size=4M --direct=1 --ioengine=libaio \
               --iodepth=8 --verify=crc32c --output-format=json \
               --output=/report >/dev/null && cat /report";
    // Its notes go to standard output, too.
    let report = host_program(container, job);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let job = &report["jobs"][0];
    let blocks = ["write", "read"].map(|way| job[way]["total_ios"].as_u64().unwrap());
    assert_eq!((blocks, &job["error"]), ([1024, 1024], &0.into()), "{report}");
}

/// A program that answers echo requests on a tap of its own.
const ANSWERER: &str = "
import fcntl, os, struct
TUNSETIFF, IFF_TAP_NO_PI = 0x400454ca, 0x1002
tap = os.open('/dev/net/tun', os.O_RDWR)
fcntl.ioctl(tap, TUNSETIFF, struct.pack('16sH22x', b'tap0', IFF_TAP_NO_PI))
print('ready', flush=True)
while True:
    frame = bytearray(os.read(tap, 4096))
    if frame[12:14] == b'\\x08\\x00' and frame[23] == 1 and frame[34] == 8:
        frame[:12] = frame[6:12] + frame[:6]
        frame[26:34] = frame[30:34] + frame[26:30]
        frame[34] = 0
        checksum = int.from_bytes(frame[36:38], 'big') + 0x0800
        frame[36:38] = (checksum % 0x10000 + checksum // 0x10000).to_bytes(2, 'big')
        os.write(tap, frame)
";

/// Starts a program in a namespace, which says a line when it is ready.
fn ready_in(netns: &Netns, program: &str) -> Killed {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &netns.name, "python3", "-c", program]).stdout(Stdio::piped());
    let mut child: Child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    Killed(child)
}

#[test]
fn every_kind_of_ethernet_interface_is_the_guests() {
    let (outside, netns) = (Netns::empty(), Netns::empty());
    // Three that sit on one end of a veth, whose other end is outside.
    for (number, name, kind) in
        [(31, "mac", "macvlan mode bridge"), (32, "l2", "ipvlan mode l2"), (33, "l3", "ipvlan mode l3")]
    {
        outside.add_veth(name, 1500);
        outside.ip(&format!("addr add 172.31.{number}.1/24 dev {name}"));
        let lower = outside.host_end(name);
        host(&format!("ip link add link {lower} name {lower}-x type {kind}"));
        host(&format!("ip link set {lower}-x netns {} name {name}", netns.name));
        netns.ip(&format!("link set {name} up"));
    }
    for (number, name) in [(31, "mac"), (32, "l2")] {
        netns.ip(&format!("addr add 172.31.{number}.2/24 dev {name}"));
    }
    // Nobody speaks ARP for one in mode l3: the others have a route to it, and the host has one to them.
    let lower = outside.host_end("l3");
    host(&format!("ip addr add 172.31.33.9/24 dev {lower}"));
    host(&format!("ip addr add fd00:31:33::9/64 dev {lower} nodad"));
    outside.ip("addr add fd00:31:33::1/64 dev l3 nodad");
    outside.ip("route add 172.31.34.2 via 172.31.33.9");
    outside.ip("-6 route add fd00:31:34::2 via fd00:31:33::9");
    netns.ip("addr add 172.31.34.2/24 dev l3");
    netns.ip("addr add fd00:31:34::2/64 dev l3 nodad");
    netns.ip("route add 172.31.33.0/24 dev l3");
    netns.ip("-6 route add fd00:31:33::/64 dev l3");
    // One that a program reads.
    let _answerer = ready_in(&netns, ANSWERER);
    netns.ip("addr add 172.31.35.2/24 dev tap0");
    netns.ip("link set tap0 up");
    netns.ip("neigh add 172.31.35.1 lladdr 02:00:00:00:00:35 dev tap0 nud permanent");
    // A bridge, and a veth that is its port.
    netns.add_veth("port", 1500);
    netns.ip("link add br0 type bridge");
    netns.ip("link set port master br0");
    netns.ip("link set br0 up");
    netns.ip("addr add 172.31.36.2/24 dev br0");
    host(&format!("ip addr add 172.31.36.1/24 dev {}", netns.host_end("port")));

    let script = "ls -d /sys/class/net/*/ | xargs -n 1 basename | xargs; ip link show l3; ip link | grep -c NOARP
        for address in 172.31.31.1 172.31.32.1 172.31.33.1 fd00:31:33::1 172.31.35.1 172.31.36.1; do
            ping -c 1 -W 20 -s 1400 $address >/dev/null && echo $address answers
        done";
    let run =
        || hull(["run", "--rm", "--memory", "128", "--net", &netns.option(), &busybox(), "sh", "-c", script]).run();
    let said = run().ok();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], "br0 l2 l3 lo mac tap0", "{said}");
    assert!(lines[1].contains("NOARP") && lines[3] == "1", "{said}");
    let answers = ["172.31.31.1", "172.31.32.1", "172.31.33.1", "fd00:31:33::1", "172.31.35.1", "172.31.36.1"];
    assert_eq!(lines[4..], answers.map(|address| format!("{address} answers")), "{said}");
    assert_eq!(netns.traces(), [""; 0]);

    // Where what one sits on is there as well, packets would come twice.
    netns.ip("link set port nomaster");
    for kind in ["macvlan mode bridge", "ipvlan mode l2"] {
        netns.ip(&format!("link add link port name upper type {kind}"));
        netns.ip("link set upper up");
        run().failed(&["interface upper", "sits on another interface"]);
        netns.ip("link del upper");
    }
    assert_eq!(netns.traces(), [""; 0]);
}

/// A rule of the host's, until this is dropped.
struct Rule(String);

impl Rule {
    fn new(rule: &str) -> Self {
        host(&format!("iptables -I {rule}"));
        Self(rule.to_owned())
    }
}

impl Drop for Rule {
    fn drop(&mut self) {
        let _ = Command::new("iptables").arg("-D").args(self.0.split(' ')).output();
    }
}

/// Whether nothing comes back from there within a second.
fn is_silent(address: &str, port: u16) -> bool {
    let address = SocketAddr::new(address.parse().unwrap(), port);
    TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err_and(|error| error.kind() == ErrorKind::TimedOut)
}

#[test]
fn what_a_cni_plugin_forbids_is_forbidden_to_the_guest_too() {
    let (netns, other) = (Netns::with_eth0(1500), Netns::with_eth0(1500));
    let (end, address) = (netns.host_end("eth0"), netns.address());
    for end in [&end, &other.host_end("eth0")] {
        fs::write(format!("/proc/sys/net/ipv4/conf/{end}/forwarding"), "1").unwrap();
    }
    // A policy at the pod's own end was there first, and stays.
    let in_pod = |command: &str| host(&format!("tc -n {} {command}", netns.name));
    let port_7002 = "protocol ip prio 1 u32 match ip dport 7002 0xffff action drop";
    in_pod("qdisc add dev eth0 clsact");
    in_pod(&format!("filter add dev eth0 ingress {port_7002}"));
    let script = "for port in 7000 7001 7002; do
            while :; do echo served | nc -l -p $port; done &
        done; wait";
    let container = Detached::start(["--memory", "128", "--net", &netns.option(), &busybox(), "sh", "-c", script]);
    let served = |port: u16| {
        let mut answer = String::new();
        connect(&format!("{address}:{port}")).read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "served\n", "{port}");
    };
    // From another pod, by way of the host; and from the guest to the host.
    let from_other = |port: u16| {
        let program = format!("import socket; print(socket.create_connection(('{address}', {port}), 60).recv(9))");
        let output = Command::new("ip").args(["netns", "exec", &other.name, "python3", "-c", &program]).output();
        Said::new(output.unwrap())
    };
    let listener = TcpListener::bind((netns.host_address(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    // Greets nobody: whoever gets through sees the connection end.
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let to_host = || {
        let script = format!("nc -w 20 {} {port} </dev/null", netns.host_address());
        container.exec(["sh", "-c", &script]).run().code
    };

    served(7000);
    served(7001);
    assert!(is_silent(&address, 7002));
    assert_eq!(from_other(7001).ok(), "b'served\\n'");
    assert_eq!(to_host(), 0);

    let reject = "-j REJECT --reject-with tcp-reset";
    let rules = [
        Rule::new(&format!("FORWARD -o {end} -p tcp --dport 7001 {reject}")),
        Rule::new(&format!("INPUT -i {end} -p tcp --dport {port} {reject}")),
    ];
    let said = from_other(7001);
    assert!(said.code == 1 && said.stderr.contains("ConnectionRefusedError"), "{said:?}");
    assert_eq!(from_other(7000).ok(), "b'served\\n'");
    assert_ne!(to_host(), 0);
    drop(rules);
    assert_eq!(to_host(), 0);

    host(&format!("tc qdisc add dev {end} clsact"));
    host(&format!("tc filter add dev {end} egress {}", port_7002.replace("7002", "7001")));
    assert!(is_silent(&address, 7001));
    served(7000);

    drop(container);
    let filters = in_pod("filter show dev eth0 ingress");
    assert!(filters.contains("drop") && !filters.contains("mirred"), "{filters}");
    in_pod("qdisc del dev eth0 clsact");
    assert_eq!(netns.traces(), [""; 0]);
}
