//! What a container finds in /etc/resolv.conf and /etc/hosts.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;

use hull_sandbox::network::Network;

/// The host's own.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where ip-netns(8) keeps the files of a namespace, by the name under which it is in [`NAMESPACES`].
const NAMESPACE_FILES: &str = "/etc/netns";
const NAMESPACES: &str = "/run/netns";

/// The contents of /etc/resolv.conf, if the container has a network: these servers, or what the network's maker `wants`,
/// or what the namespace or the host has.
pub(crate) fn resolv_conf(network: &Network, servers: &[IpAddr], wants: String) -> Option<String> {
    if !servers.is_empty() {
        return Some(servers.iter().map(|server| format!("nameserver {server}\n")).collect());
    }
    let path = match network {
        Network::None => return None,
        Network::Namespace(path) => path.strip_prefix(NAMESPACES).ok(),
        Network::Cni { .. } | Network::User { .. } => None,
    };
    if !wants.is_empty() {
        return Some(wants);
    }
    let of_namespace = path.map(|name| Path::new(NAMESPACE_FILES).join(name).join("resolv.conf"));
    let own = of_namespace.and_then(|path| std::fs::read_to_string(path).ok());
    Some(own.unwrap_or_else(|| reachable(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default())))
}

/// Leaves out servers on the host's loopback interface, which is another one in the guest.
fn reachable(resolv_conf: &str) -> String {
    let is_local = |line: &str| {
        let server = line.trim().strip_prefix("nameserver").map(str::trim);
        server.and_then(|server| server.parse::<IpAddr>().ok()).is_some_and(|server| server.is_loopback())
    };
    resolv_conf.lines().filter(|line| !is_local(line)).map(|line| format!("{line}\n")).collect()
}

/// The contents of /etc/hosts: the container's name stands for its first address, or for a loopback address where it has
/// none; `extra` are more names and addresses.
pub(crate) fn hosts(hostname: &str, addresses: &[IpAddr], extra: &[(String, IpAddr)]) -> String {
    let mut hosts = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    let own = if addresses.is_empty() { &[IpAddr::from([127, 0, 1, 1])][..] } else { addresses };
    let lines =
        own.iter().map(|address| (hostname, address)).chain(extra.iter().map(|(name, address)| (&name[..], address)));
    for (name, address) in lines {
        // Writing to a string does not fail.
        let _ = writeln!(hosts, "{address}\t{name}");
    }
    hosts
}

/// Reads `NAME:ADDRESS`.
pub(crate) fn parse_host(text: &str) -> Result<(String, IpAddr), String> {
    let parsed = text.split_once(':').and_then(|(name, address)| Some((name, address.parse().ok()?)));
    match parsed {
        Some((name, address)) if !name.is_empty() && !name.contains(char::is_whitespace) => {
            Ok((name.to_owned(), address))
        }
        _ => Err("write NAME:ADDRESS".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_the_hosts_own_are_left_out() {
        let host = "# made by hand\nnameserver 127.0.0.53\nnameserver ::1\nnameserver 192.0.2.1\nsearch example.org\n";
        assert_eq!(reachable(host), "# made by hand\nnameserver 192.0.2.1\nsearch example.org\n");
        assert_eq!(resolv_conf(&Network::None, &[], String::new()), None);
        let servers = ["192.0.2.7".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let network = Network::Namespace("/run/netns/x".into());
        let wanted = "nameserver 192.0.2.9\n".to_owned();
        assert_eq!(resolv_conf(&network, &[], wanted.clone()).as_ref(), Some(&wanted));
        assert_eq!(resolv_conf(&network, &servers, wanted).unwrap(), "nameserver 192.0.2.7\nnameserver 2001:db8::1\n");
    }

    #[test]
    fn the_name_stands_for_the_address() {
        assert!(hosts("web", &[], &[]).ends_with("127.0.1.1\tweb\n"));
        let extra = [("db".to_owned(), "10.0.0.9".parse().unwrap())];
        assert!(hosts("web", &["10.0.0.2".parse().unwrap()], &extra).ends_with("\n10.0.0.2\tweb\n10.0.0.9\tdb\n"));
    }

    #[test]
    fn names_come_with_an_address() {
        assert_eq!(parse_host("db:::1").unwrap(), ("db".to_owned(), "::1".parse().unwrap()));
        for bad in ["", "db", "db:", ":10.0.0.1", "d b:10.0.0.1", "db:x"] {
            assert!(parse_host(bad).is_err(), "{bad:?}");
        }
    }
}
