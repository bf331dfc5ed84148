//! Settings of a network namespace that a pod's programs can tell from their defaults.
//!
//! A CNI plugin (`tuning`, say) or the kubelet may have changed them, and the host's own defaults differ from those of the
//! guest's kernel. Programs in the guest are to find what they would find without a VM.

use std::collections::HashMap;
use std::path::Path;

use super::describe::LOOPBACK;

const ROOT: &str = "/proc/sys/net";

/// Of the namespace as a whole.
const GLOBAL: [&str; 11] = [
    "core/somaxconn",
    "ipv4/ip_local_port_range",
    "ipv4/ip_local_reserved_ports",
    "ipv4/ip_nonlocal_bind",
    "ipv4/ip_unprivileged_port_start",
    "ipv4/ping_group_range",
    "ipv4/tcp_fin_timeout",
    "ipv4/tcp_keepalive_intvl",
    "ipv4/tcp_keepalive_probes",
    "ipv4/tcp_keepalive_time",
    "ipv6/bindv6only",
];
/// Of each interface, and of `all`.
const IPV4: [&str; 16] = [
    "accept_local",
    "accept_redirects",
    "accept_source_route",
    "arp_accept",
    "arp_announce",
    "arp_filter",
    "arp_ignore",
    "arp_notify",
    "forwarding",
    "promote_secondaries",
    "proxy_arp",
    "route_localnet",
    "rp_filter",
    "secure_redirects",
    "send_redirects",
    "src_valid_mark",
];
const IPV6: [&str; 6] = ["accept_ra", "accept_redirects", "autoconf", "disable_ipv6", "forwarding", "proxy_ndp"];

/// Reads those of the calling thread's namespace. What there is none of, such as IPv6 where that is off, is left out.
pub(super) fn read<'a>(interfaces: impl Iterator<Item = &'a str>) -> HashMap<String, String> {
    let mut found = HashMap::new();
    let mut add = |path: String| {
        if let Ok(value) = std::fs::read_to_string(Path::new(ROOT).join(&path)) {
            found.insert(path, value.trim_end().to_owned());
        }
    };
    GLOBAL.iter().for_each(|path| add((*path).to_owned()));
    let mut own = Vec::new();
    for name in std::iter::once("all").chain(interfaces) {
        IPV4.iter().for_each(|key| add(format!("ipv4/conf/{name}/{key}")));
        IPV6.iter().for_each(|key| add(format!("ipv6/conf/{name}/{key}")));
        if name != "all" && name != LOOPBACK {
            own.push(format!("ipv6/conf/{name}/addr_gen_mode"));
        }
    }
    // The guest gets the link-local addresses that the host's end has, and makes up none.
    found.extend(own.into_iter().map(|path| (path, "1".to_owned())));
    found
}

/// Keeps the calling thread's namespace from speaking IPv6 on an interface of its own accord. Before it is up.
///
/// # Errors
///
/// As for writing a file; that there is no IPv6 is none.
pub(super) fn disable_ipv6(interface: &str) -> std::io::Result<()> {
    match std::fs::write(Path::new(ROOT).join("ipv6/conf").join(interface).join("disable_ipv6"), "1") {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_settings() {
        let found = read(["lo", "no-such"].into_iter());
        assert!(found.contains_key("ipv4/conf/lo/rp_filter"));
        assert!(!found.contains_key("ipv4/conf/no-such/rp_filter"));
        assert!(found.values().all(|value| !value.ends_with('\n')));
    }
}
