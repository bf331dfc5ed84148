//! A network by passt: a program without privileges that carries a guest's packets as connections of its own on the host.
//!
//! It speaks to the VMM over a pair of sockets, one end each, and ends when the VMM's end closes, whoever dies and however.
//! The guest gets fixed addresses that exist for it alone. All that it reaches, it reaches as passt: the host by the
//! host's own addresses, but not what listens on the host's loopback interface alone.
//!
//! passt says nothing when it is ready. So it is asked something before the VMM gets its socket: who has the gateway's
//! address. It answers once it has taken all published ports; where it cannot, it ends.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use hull_protocol::agent as wire;
use hull_vmm_api::config::{MacAddress, NetBackend};
use netlink_packet_route::route::{RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::rand::{GetRandomFlags, getrandom};

use super::attachment::HostEnd;
use super::cni::PortMapping;
use super::describe::octets;
use super::netlink::Netlink;
use crate::console::Tail;

const PROGRAM: &str = "passt";
/// The interface's name in the guest.
const INTERFACE: &str = "eth0";
/// The largest unit that passt carries: 16 bits of packet, in words of 32 bits, less an Ethernet header. Nothing on the way
/// to passt has a smaller one, and few long packets cost less than many short ones.
const MTU: u16 = 65520;
/// Those of QEMU's user network and of slirp4netns, as far as there are any that people expect. Name servers are asked at
/// the third, behind which passt asks the host's.
const IPV4: Plan = Plan {
    address: IpAddr::V4(Ipv4Addr::new(10, 0, 2, 100)),
    gateway: IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2)),
    dns: IpAddr::V4(Ipv4Addr::new(10, 0, 2, 3)),
    subnet: IpAddr::V4(Ipv4Addr::new(10, 0, 2, 0)),
    prefix_length: 24,
};
const IPV6: Plan = Plan {
    address: IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x100)),
    gateway: IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2)),
    dns: IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 3)),
    subnet: IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0)),
    prefix_length: 64,
};
/// The host's name servers, which passt reads as well.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The descriptor by which passt knows its socket.
const SOCKET_FD: i32 = 3;
/// How long passt may take to answer. It needs some tens of milliseconds.
const START_TIMEOUT: Duration = Duration::from_secs(20);

// Numbers of rtnetlink(7).
const TABLE_MAIN: u8 = 254;
const SCOPE_GLOBAL: u32 = 0;
const SCOPE_LINK: u32 = 253;
const TYPE_UNICAST: u32 = 1;
const PROTOCOL_BOOT: u32 = 3;
/// What the kernel gives routes of its own for IPv6.
const PRIORITY_IPV6: u32 = 256;

/// A network that passt did not make.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// It is not installed.
    #[error("passt is not installed, which --net user needs; install the package passt, or use another network")]
    Missing,
    /// A step of starting it.
    #[error("cannot {step} for passt: {source}")]
    Start {
        /// The step, as an infinitive.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It ended at once, or does not answer.
    #[error("passt does not start: {0}")]
    Failed(String),
}

/// The addresses of one family.
#[derive(Clone, Copy, Debug)]
struct Plan {
    address: IpAddr,
    gateway: IpAddr,
    dns: IpAddr,
    subnet: IpAddr,
    prefix_length: u8,
}

/// passt at work, until this is dropped. By then its socket must be closed.
#[derive(Debug)]
pub(super) struct User {
    passt: Child,
    resolv_conf: String,
}

/// Where the program is, if it is installed.
pub(super) fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(PROGRAM)).find(|program| is_executable(program))
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

impl User {
    /// Starts passt, which publishes these ports of the host; answers with the VMM's end and what the guest is to have.
    pub(super) fn start(ports: &[PortMapping]) -> Result<(Self, HostEnd, wire::Network), UserError> {
        let program = program().ok_or(UserError::Missing)?;
        let step = |step| move |source| UserError::Start { step, source };
        let plans = families().map_err(step("look at the host's routes"))?;
        let mac = random_mac().map_err(step("draw an address"))?;
        let (ours, theirs) = UnixStream::pair().map_err(step("make sockets"))?;
        let (words, words_end) =
            pipe_with(PipeFlags::CLOEXEC).map_err(|errno| step("make a pipe")(io::Error::from(errno)))?;
        let mut command = Command::new(program);
        command
            .args(arguments(&plans, ports))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(words_end)
            .fd_mappings(vec![FdMapping { parent_fd: theirs.into(), child_fd: SOCKET_FD }])
            .map_err(|error| step("pass a socket")(io::Error::other(error)))?;
        // A terminal's Ctrl-C is for the container.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let passt = command.spawn().map_err(step("start a process"))?;
        // The command holds the other end.
        drop(command);
        let mut user = Self { passt, resolv_conf: String::new() };
        let (said, said_thread) = Tail::follow(words, "passt").map_err(step("start a thread"))?;
        if let Err(error) = ask(&ours, mac, &plans) {
            drop(ours);
            user.end();
            // All of its words are in the pipe by now.
            let _ = said_thread.join();
            return Err(UserError::Failed(reason(&said.last_lines(usize::MAX), &error)));
        }
        let host_resolv_conf = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
        user.resolv_conf = resolv_conf(&host_resolv_conf, &plans);
        let mac_address =
            MacAddress::try_from(mac).map_err(|error| step("draw an address")(io::Error::other(error)))?;
        let end = HostEnd {
            backend: NetBackend::Stream,
            queues: vec![OwnedFd::from(ours)],
            mac: mac_address,
            mtu: Some(MTU),
            link_down: false,
        };
        Ok((user, end, describe(mac, &plans)))
    }

    /// The lines for a resolv.conf.
    pub(super) fn resolv_conf(&self) -> String {
        self.resolv_conf.clone()
    }

    fn end(&mut self) {
        // It ends by itself, since its socket is closed; this only makes sure. Both fail where it has ended and been waited for.
        let _ = self.passt.kill();
        let _ = self.passt.wait();
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.end();
    }
}

/// The families in which the host has a way out; IPv4 if it has none.
fn families() -> io::Result<Vec<Plan>> {
    let mut netlink = Netlink::open()?;
    let mut plans = Vec::new();
    for (family, plan) in [(AddressFamily::Inet, IPV4), (AddressFamily::Inet6, IPV6)] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        let leads_out = |message: &RouteNetlinkMessage| match message {
            RouteNetlinkMessage::NewRoute(route) => {
                let header = &route.header;
                header.address_family == family
                    && header.destination_prefix_length == 0
                    && header.kind == RouteType::Unicast
                    && header.table == TABLE_MAIN
            }
            _ => false,
        };
        if netlink.dump(&RouteNetlinkMessage::GetRoute(request))?.iter().any(leads_out) {
            plans.push(plan);
        }
    }
    if plans.is_empty() {
        plans.push(IPV4);
    }
    Ok(plans)
}

fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    getrandom(&mut mac, GetRandomFlags::empty())?;
    // Of one interface, and made up locally.
    mac[0] = mac[0] & 0xfc | 0x02;
    Ok(mac)
}

fn arguments(plans: &[Plan], ports: &[PortMapping]) -> Vec<String> {
    // In the foreground, as a child; without its mapping of the gateway to the host's loopback interface, where much
    // listens that trusts whoever is on the host.
    let mut arguments: Vec<String> = ["--foreground", "--quiet", "--no-map-gw", "--fd"].map(str::to_owned).to_vec();
    arguments.push(SOCKET_FD.to_string());
    if let [plan] = plans {
        arguments.push(if plan.address.is_ipv4() { "--ipv4-only" } else { "--ipv6-only" }.to_owned());
    }
    for plan in plans {
        arguments.extend(["--address".to_owned(), plan.address.to_string()]);
        arguments.extend(["--gateway".to_owned(), plan.gateway.to_string()]);
        arguments.extend(["--dns-forward".to_owned(), plan.dns.to_string()]);
        if plan.address.is_ipv4() {
            arguments.extend(["--netmask".to_owned(), plan.prefix_length.to_string()]);
        }
    }
    for port in ports {
        let option = if port.protocol == "udp" { "--udp-ports" } else { "--tcp-ports" };
        let address = port.host_ip.map(|address| format!("{address}/")).unwrap_or_default();
        arguments.extend([option.to_owned(), format!("{address}{}:{}", port.host_port, port.container_port)]);
    }
    arguments
}

/// Asks passt for its hardware address, and waits for the answer, which comes when it is ready.
fn ask(mut socket: &UnixStream, mac: [u8; 6], plans: &[Plan]) -> io::Result<()> {
    let question = match plans[0] {
        Plan { address: IpAddr::V4(own), gateway: IpAddr::V4(gateway), .. } => arp_request(mac, own, gateway),
        Plan { address: IpAddr::V6(own), gateway: IpAddr::V6(gateway), .. } => solicitation(mac, own, gateway),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    socket.set_read_timeout(Some(START_TIMEOUT))?;
    socket.write_all(&framed(&question))?;
    let mut length = [0; 4];
    socket.read_exact(&mut length)?;
    // What else it may say here, such as a router's advertisement, is as good an answer.
    let mut answer = vec![0; usize::from(u16::try_from(u32::from_be_bytes(length)).map_err(io::Error::other)?)];
    socket.read_exact(&mut answer)?;
    socket.set_read_timeout(None)
}

/// A packet as passt's socket has it: behind its length.
fn framed(packet: &[u8]) -> Vec<u8> {
    // Both questions are short.
    [&(packet.len() as u32).to_be_bytes()[..], packet].concat()
}

/// An ARP request to all, in Ethernet (RFC 826).
fn arp_request(mac: [u8; 6], own: Ipv4Addr, wanted: Ipv4Addr) -> Vec<u8> {
    let ethernet = [&[0xff; 6][..], &mac, &[0x08, 0x06]].concat();
    // Ethernet, IPv4, lengths of addresses, request.
    let arp = [&[0, 1, 0x08, 0, 6, 4, 0, 1][..], &mac, &own.octets(), &[0; 6], &wanted.octets()].concat();
    [ethernet, arp].concat()
}

/// A neighbour solicitation to the wanted address's group, in Ethernet (RFC 4861, section 4.3).
fn solicitation(mac: [u8; 6], own: Ipv6Addr, wanted: Ipv6Addr) -> Vec<u8> {
    let [.., a, b, c] = wanted.octets();
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]));
    // Type 135, code, checksum, reserved; the target; option 1: the sender's hardware address, in words of 64 bits.
    let mut message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &wanted.octets(), &[1, 1], &mac].concat();
    let next_header = 58;
    let pseudo = [&own.octets()[..], &group.octets(), &[0, 0, 0, message.len() as u8, 0, 0, 0, next_header]].concat();
    let checksum = checksum(&[pseudo, message.clone()].concat());
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    let ethernet = [&[0x33, 0x33, 0xff, a, b, c][..], &mac, &[0x86, 0xdd]].concat();
    let ipv6 =
        [&[0x60, 0, 0, 0, 0, message.len() as u8, next_header, 255][..], &own.octets(), &group.octets()].concat();
    [ethernet, ipv6, message].concat()
}

/// The Internet's checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // The loop leaves 16 bits.
    !(sum as u16)
}

/// What passt said of its failure, or what was seen of it.
fn reason(said: &[String], seen: &io::Error) -> String {
    // It talks to a system logger as well, and of where there is none, and of what it does for safety.
    let noise = ["Failed to send", "Don't run as root", "Started as root", "Couldn't get any nameserver"];
    let lines: Vec<&str> = said
        .iter()
        .map(|line| line.as_str())
        .filter(|line| !noise.iter().any(|noise| line.starts_with(noise)))
        .collect();
    match (lines.as_slice(), seen.kind()) {
        (_, io::ErrorKind::WouldBlock) => format!("it does not answer within {} s", START_TIMEOUT.as_secs()),
        ([], _) => format!("it ended without a word ({seen})"),
        (lines, _) => lines[lines.len().saturating_sub(2)..].join("; "),
    }
}

/// The lines for the guest's resolv.conf: the host's own, with passt's addresses instead of the host's servers. Empty where
/// the host has no server that passt could ask.
fn resolv_conf(host: &str, plans: &[Plan]) -> String {
    let servers: Vec<IpAddr> = host
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|server| server.trim().parse().ok())
        .collect();
    let usable = plans.iter().filter(|plan| servers.iter().any(|server| server.is_ipv4() == plan.dns.is_ipv4()));
    let mut file: String = usable.map(|plan| format!("nameserver {}\n", plan.dns)).collect();
    if !file.is_empty() {
        let others =
            host.lines().filter(|line| ["search", "options", "domain"].iter().any(|word| line.starts_with(word)));
        file.extend(others.map(|line| format!("{line}\n")));
    }
    file
}

/// The guest's side.
fn describe(mac: [u8; 6], plans: &[Plan]) -> wire::Network {
    let (mut addresses, mut links, mut ways_out) = (Vec::new(), Vec::new(), Vec::new());
    for plan in plans {
        let address = |address: IpAddr, scope| wire::Address {
            address: octets(address),
            prefix_length: plan.prefix_length.into(),
            scope,
            ..Default::default()
        };
        addresses.push(address(plan.address, SCOPE_GLOBAL));
        links.push(route(plan.subnet, plan.prefix_length, None));
        ways_out.push(route(plan.subnet, 0, Some(plan.gateway)));
        if plan.address.is_ipv6() {
            // What comes from the host's loopback interface comes from such an address, and to such a one.
            addresses.push(address(link_local(mac).into(), SCOPE_LINK));
            links.push(route(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).into(), plan.prefix_length, None));
        }
    }
    let interface = wire::Interface {
        mac: mac.to_vec(),
        name: INTERFACE.to_owned(),
        mtu: MTU.into(),
        addresses,
        ..Default::default()
    };
    wire::Network {
        interfaces: vec![interface],
        routes: links.into_iter().chain(ways_out).collect(),
        ..Default::default()
    }
}

fn route(destination: IpAddr, prefix_length: u8, gateway: Option<IpAddr>) -> wire::Route {
    let is_ipv4 = destination.is_ipv4();
    wire::Route {
        family: if is_ipv4 { 2 } else { 10 },
        destination: if prefix_length == 0 { Vec::new() } else { octets(destination) },
        prefix_length: prefix_length.into(),
        table: TABLE_MAIN.into(),
        protocol: PROTOCOL_BOOT,
        // IPv6 has no scopes of routes.
        scope: if is_ipv4 && gateway.is_none() { SCOPE_LINK } else { SCOPE_GLOBAL },
        type_: TYPE_UNICAST,
        priority: if is_ipv4 { 0 } else { PRIORITY_IPV6 },
        next_hops: vec![wire::NextHop {
            interface: INTERFACE.to_owned(),
            gateway: gateway.map(octets).unwrap_or_default(),
            weight: 1,
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// The address of the link that follows from a hardware address (RFC 4291, appendix A).
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn port(host_ip: Option<&str>, host_port: u16, protocol: &str) -> PortMapping {
        let host_ip = host_ip.map(|ip| ip.parse().unwrap());
        PortMapping { host_ip, host_port, container_port: 80, protocol: protocol.to_owned() }
    }

    #[test]
    fn ports_become_options() {
        let ports = [port(None, 8080, "tcp"), port(Some("127.0.0.1"), 53, "udp"), port(Some("::1"), 1, "tcp")];
        let arguments = arguments(&[IPV4], &ports).join(" ");
        assert!(arguments.contains("--fd 3 --ipv4-only --address 10.0.2.100 --gateway 10.0.2.2"), "{arguments}");
        assert!(arguments.ends_with("--tcp-ports 8080:80 --udp-ports 127.0.0.1/53:80 --tcp-ports ::1/1:80"));
        assert!(!super::arguments(&[IPV4, IPV6], &[]).join(" ").contains("only"));
    }

    #[test]
    fn name_servers_are_asked_through_passt() {
        let host = "# made\nnameserver 127.0.0.53\noptions edns0\nsearch example.org\n";
        assert_eq!(resolv_conf(host, &[IPV4, IPV6]), "nameserver 10.0.2.3\noptions edns0\nsearch example.org\n");
        assert_eq!(resolv_conf("nameserver 2001:db8::1\n", &[IPV4, IPV6]), "nameserver fd00::3\n");
        assert_eq!(resolv_conf("nameserver 2001:db8::1\nsearch x\n", &[IPV4]), "");
    }

    #[test]
    fn what_passt_says_is_told_without_its_noise() {
        let said = ["Failed to send 7 bytes to syslog", "Failed to bind port 1", "exiting"].map(str::to_owned);
        assert_eq!(reason(&said, &io::ErrorKind::UnexpectedEof.into()), "Failed to bind port 1; exiting");
        assert!(reason(&said, &io::ErrorKind::WouldBlock.into()).contains("20 s"));
        assert!(reason(&said[..1], &io::ErrorKind::UnexpectedEof.into()).contains("without a word"));
    }

    #[test]
    fn a_solicitation_checks_out() {
        let [IpAddr::V6(own), IpAddr::V6(gateway)] = [IPV6.address, IPV6.gateway] else { unreachable!() };
        let packet = solicitation(MAC, own, gateway);
        assert_eq!((packet.len(), &packet[..6]), (14 + 40 + 32, &[0x33, 0x33, 0xff, 0, 0, 2][..]));
        let pseudo = [&packet[22..54], &[0, 0, 0, 32, 0, 0, 0, 58]].concat();
        assert_eq!(checksum(&[&pseudo, &packet[54..]].concat()), 0);
        assert_eq!(link_local(MAC), "fe80::ff:fe00:1".parse::<Ipv6Addr>().unwrap());
    }

    #[test]
    fn the_guest_has_a_way_out_in_each_family() {
        let network = describe(MAC, &[IPV4, IPV6]);
        assert_eq!(network.interfaces[0].addresses.len(), 3);
        let gateways: Vec<bool> = network.routes.iter().map(|route| !route.next_hops[0].gateway.is_empty()).collect();
        assert_eq!(gateways, [false, false, false, true, true], "gateways come after what leads to them");
    }

    fn is_there() -> bool {
        let there = program().is_some();
        if !there {
            eprintln!("skipped: passt is not installed");
        }
        there
    }

    #[test]
    fn passt_ends_with_the_vmms_socket() {
        if !is_there() {
            return;
        }
        let (mut user, end, _) = User::start(&[]).unwrap();
        assert!(user.passt.try_wait().unwrap().is_none());
        drop(end);
        // Without being told by a signal.
        assert_eq!(user.passt.wait().unwrap().code(), Some(0));
    }

    #[test]
    fn a_port_in_use_is_an_error_in_passts_words() {
        if !is_there() {
            return;
        }
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let number = taken.local_addr().unwrap().port();
        let error = User::start(&[port(Some("127.0.0.1"), number, "tcp")]).unwrap_err().to_string();
        assert!(error.contains(&number.to_string()), "{error}");
    }
}
