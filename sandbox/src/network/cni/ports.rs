//! The ports of the host that lead to a sandbox, kept from everybody else.
//!
//! Plugins redirect what comes to a port, whoever listens on it or has it redirected already. So each port is bound here for
//! as long as the sandbox has its network. The kernel gives it to one of two that ask at once, and takes it back from an owner that is
//! killed. Nobody listens on it: what is not redirected is refused, as if the port were free.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, bind, listen, shutdown, socket_with, sockopt};

use super::super::{NOTE, Note};
use super::{CniError, PortMapping};
use crate::console::printable;

/// The kernel's tables of sockets, by the protocol in them.
const TABLES: [(&str, &str); 4] =
    [("tcp", "/proc/net/tcp"), ("tcp", "/proc/net/tcp6"), ("udp", "/proc/net/udp"), ("udp", "/proc/net/udp6")];
/// Where an address and an inode are in a line of these tables.
const ADDRESS_FIELD: usize = 1;
const INODE_FIELD: usize = 9;
/// Digits of a word of an address.
const WORD_DIGITS: usize = 8;

/// Keeps the ports until what is answered is dropped. `sandboxes` has the directories of all sandboxes, to name the one that
/// has a port already.
pub(super) fn hold(ports: &[PortMapping], sandboxes: &Path) -> Result<Vec<OwnedFd>, CniError> {
    let mut held = Vec::new();
    for (index, port) in ports.iter().enumerate() {
        for address in addresses(port) {
            match hold_one(SocketAddr::new(address, port.host_port), &port.protocol) {
                Ok(socket) => held.push(socket),
                // A host without this family redirects none of its packets.
                Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if port.host_ip.is_none() => {}
                Err(Errno::ADDRINUSE) => {
                    let holder = match ports[..index].iter().any(|other| overlap(other, port)) {
                        true => "another -p of the same command".to_owned(),
                        false => sandbox_with(port, sandboxes).or_else(|| process_with(port)).unwrap_or_else(|| {
                            "a container that is just starting, or a program of another container".to_owned()
                        }),
                    };
                    return Err(CniError::PortTaken { port: name(port), holder });
                }
                Err(errno) => return Err(CniError::Port { port: name(port), source: errno.into() }),
            }
        }
    }
    Ok(held)
}

/// As `-p` takes it.
fn name(port: &PortMapping) -> String {
    let address = port.host_ip.map(|address| SocketAddr::new(address, port.host_port).to_string());
    format!("{}/{}", address.unwrap_or_else(|| port.host_port.to_string()), port.protocol)
}

fn addresses(port: &PortMapping) -> Vec<IpAddr> {
    match port.host_ip {
        Some(address) => vec![address],
        None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
    }
}

fn hold_one(address: SocketAddr, protocol: &str) -> Result<OwnedFd, Errno> {
    let is_udp = protocol == "udp";
    let kind = if is_udp { SocketType::DGRAM } else { SocketType::STREAM };
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    // An address that the host gets later, such as one that moves between hosts, can be redirected as well.
    match address {
        SocketAddr::V4(_) => sockopt::set_ip_freebind(&socket, true)?,
        SocketAddr::V6(_) => {
            sockopt::set_ipv6_freebind(&socket, true)?;
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
    }
    if is_udp {
        // What nobody redirects is not read either.
        sockopt::set_socket_recv_buffer_size(&socket, 0)?;
        bind(&socket, &address)?;
        return Ok(socket);
    }
    // Connections that have ended, and are remembered for a minute, are in nobody's way, while whoever listens is; and of two that
    // bind it at once only one can listen. From then on nobody else can bind it, whatever they allow.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    listen(&socket, 0)?;
    sockopt::set_socket_reuseaddr(&socket, false)?;
    shutdown(&socket, Shutdown::Read)?;
    Ok(socket)
}

/// Whether one address and port belongs to both.
fn overlap(one: &PortMapping, other: &PortMapping) -> bool {
    let meet = match (one.host_ip, other.host_ip) {
        (Some(one), Some(other)) => addresses_meet(one, other),
        _ => true,
    };
    meet && one.host_port == other.host_port && one.protocol == other.protocol
}

fn addresses_meet(one: IpAddr, other: IpAddr) -> bool {
    one == other || one.is_unspecified() || other.is_unspecified()
}

/// The sandbox that has published this port, by its note.
fn sandbox_with(port: &PortMapping, sandboxes: &Path) -> Option<String> {
    let dirs = std::fs::read_dir(sandboxes).ok()?.flatten();
    let notes = dirs.filter_map(|dir| std::fs::read(dir.path().join(NOTE)).ok());
    let notes = notes.filter_map(|json| serde_json::from_slice::<Note>(&json).ok()?.cni);
    let mut others = notes.filter(|note| note.ports.iter().any(|other| overlap(other, port)));
    others.next().map(|note| format!("the container {}", note.container_id))
}

/// The program that has this port open.
fn process_with(port: &PortMapping) -> Option<String> {
    let tables = TABLES.iter().filter(|(protocol, _)| *protocol == port.protocol);
    let tables: String = tables.filter_map(|(_, table)| std::fs::read_to_string(table).ok()).collect();
    let inodes = tables.lines().filter_map(|line| inode_at(line, port));
    let sockets: Vec<String> = inodes.map(|inode| format!("socket:[{inode}]")).collect();
    let has_it = |process: &Path| {
        let fds = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let mut links = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        links.any(|link| sockets.iter().any(|socket| link.as_os_str() == socket.as_str()))
    };
    let entries = std::fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    // What is there under its own name, such as `self`, is under its number as well.
    let is_number = |path: &PathBuf| path.file_name().is_some_and(|name| name.as_encoded_bytes()[0].is_ascii_digit());
    let process = entries.filter(is_number).find(|process| has_it(process))?;
    let program = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
    Some(format!("{} (process {})", printable(program.trim_end()), process.file_name()?.display()))
}

/// The inode of the socket in a line of a table, if it is in the way of this port.
fn inode_at<'a>(line: &'a str, port: &PortMapping) -> Option<&'a str> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (address, number) = fields.get(ADDRESS_FIELD)?.split_once(':')?;
    let address = address_of(address)?;
    let is_it = u16::from_str_radix(number, 16) == Ok(port.host_port)
        && port.host_ip.is_none_or(|wanted| addresses_meet(wanted, address));
    // Those that nobody has open any more have none.
    fields.get(INODE_FIELD).copied().filter(|inode| is_it && *inode != "0")
}

/// An address as these tables have it: words of 32 bits in the host's order.
fn address_of(digits: &str) -> Option<IpAddr> {
    let words = digits.as_bytes().chunks(WORD_DIGITS).map(|word| {
        let word = std::str::from_utf8(word).ok().filter(|word| word.len() == WORD_DIGITS)?;
        Some(u32::from_str_radix(word, 16).ok()?.to_ne_bytes())
    });
    let bytes = words.collect::<Option<Vec<_>>>()?.concat();
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use serde_json::json;

    use super::*;

    fn port(address: Option<&str>, host_port: u16, protocol: &str) -> PortMapping {
        let host_ip = address.map(|address| address.parse().unwrap());
        PortMapping { host_ip, host_port, container_port: 80, protocol: protocol.to_owned() }
    }

    /// A port that was free a moment ago.
    fn free() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    fn refused(ports: &[PortMapping], sandboxes: &Path) -> String {
        hold(ports, sandboxes).unwrap_err().to_string()
    }

    #[test]
    fn a_port_is_held_once_and_nobody_listens_on_it() {
        let dir = tempfile::tempdir().unwrap();
        let number = free();
        let held = hold(&[port(Some("127.0.0.1"), number, "tcp")], dir.path()).unwrap();
        let said = refused(&[port(None, number, "tcp")], dir.path());
        assert!(
            said.contains(&format!("the port {number}/tcp of the host")) && said.contains("just starting"),
            "{said}"
        );
        // Not even to a program that allows others.
        assert_eq!(TcpListener::bind(("127.0.0.1", number)).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let connected = TcpStream::connect(("127.0.0.1", number));
        assert_eq!(connected.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        drop(held);
        hold(&[port(Some("127.0.0.1"), number, "tcp"), port(Some("127.0.0.1"), number, "udp")], dir.path()).unwrap();
    }

    #[test]
    fn connections_that_have_ended_are_in_nobodys_way() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        // The server's end is closed first, so it is the one that is remembered.
        drop(listener.accept().unwrap());
        drop((client, listener));
        hold(&[port(Some("127.0.0.1"), address.port(), "tcp")], Path::new("/no/such")).unwrap();
    }

    #[test]
    fn who_has_a_port_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let number = listener.local_addr().unwrap().port();
        let said = refused(&[port(None, number, "tcp")], dir.path());
        assert!(said.contains(&format!("(process {})", std::process::id())), "{said}");
        let socket = UdpSocket::bind("[::1]:0").unwrap();
        let number = socket.local_addr().unwrap().port();
        let said = refused(&[port(Some("::1"), number, "udp")], dir.path());
        assert!(said.contains(&format!("[::1]:{number}/udp")) && said.contains("(process "), "{said}");

        let note = json!({ "redirected": null, "cni": {
            "container_id": "c0ffee", "list": { "name": "n", "cniVersion": "1.0.0", "plugins": [{ "type": "x" }] },
            "ports": [{ "hostPort": number, "containerPort": 1, "protocol": "udp" }], "result": null } });
        std::fs::create_dir(dir.path().join("c0ffee")).unwrap();
        std::fs::write(dir.path().join("c0ffee").join(NOTE), note.to_string()).unwrap();
        let said = refused(&[port(Some("::1"), number, "udp")], dir.path());
        assert!(said.contains("taken by the container c0ffee; "), "{said}");

        let twice = port(Some("127.0.0.1"), free(), "tcp");
        let said = refused(&[twice.clone(), twice], dir.path());
        assert!(said.contains("another -p of the same command"), "{said}");
    }

    #[test]
    fn lines_of_the_kernels_tables_are_read() {
        let line =
            "   1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 0 100";
        assert_eq!(inode_at(line, &port(Some("127.0.0.1"), 8080, "tcp")), Some("4242"));
        assert_eq!(inode_at(line, &port(None, 8080, "tcp")), Some("4242"));
        assert_eq!(inode_at(line, &port(Some("127.0.0.2"), 8080, "tcp")), None);
        assert_eq!(inode_at(line, &port(None, 8081, "tcp")), None);
        assert_eq!(address_of("00000000000000000000000001000000"), Some(Ipv6Addr::LOCALHOST.into()));
        for odd in ["", "x", "0100", "é00000000"] {
            assert_eq!(address_of(odd), None, "{odd:?}");
        }
        for odd in ["  sl  local_address rem_address", "", "1: 0100007F"] {
            assert_eq!(inode_at(odd, &port(None, 1, "tcp")), None);
        }
    }
}
