//! The network of a request, checked and in the agent's own types.

use std::net::IpAddr;

use hull_protocol::agent as wire;

use crate::error::{Error, Result};
use crate::network::{AF_INET, AF_INET6, Address, Interface, Neighbour, Network, NextHop, Route, Rule, family};

/// Longest name of an interface in Linux.
const NAME_BYTES: usize = 15;
/// Most attributes of a rule, of which Linux knows 25, and longest value: an interface's name.
const ATTRIBUTES: usize = 64;
const VALUE_BYTES: usize = 16;
/// Most next hops of a route, and metrics: they share one attribute of 64 KiB. Linux knows 17 metrics.
const HOPS: usize = 256;
const METRICS: usize = 64;

pub(super) fn network(network: wire::Network) -> Result<Network> {
    if let Some(path) = network.sysctls.keys().find(|path| !is_sysctl(path)) {
        return Err(Error::invalid("network.sysctls", format!("{path:?} is no path below /proc/sys/net")));
    }
    Ok(Network {
        interfaces: network.interfaces.into_iter().map(interface).collect::<Result<_>>()?,
        routes: network.routes.into_iter().map(route).collect::<Result<_>>()?,
        sysctls: network.sysctls,
        rules: network.rules.into_iter().map(rule).collect::<Result<_>>()?,
        missing_rules: network.missing_rules.into_iter().map(rule).collect::<Result<_>>()?,
    })
}

fn is_sysctl(path: &str) -> bool {
    path.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\0'))
}

fn interface(interface: wire::Interface) -> Result<Interface> {
    Ok(Interface {
        mac: mac("network.interfaces.mac", &interface.mac)?,
        name: name("network.interfaces.name", interface.name)?,
        mtu: interface.mtu,
        no_arp: interface.no_arp,
        addresses: interface.addresses.into_iter().map(address).collect::<Result<_>>()?,
        neighbours: interface.neighbours.into_iter().map(neighbour).collect::<Result<_>>()?,
    })
}

fn address(address: wire::Address) -> Result<Address> {
    let own = needed("network.interfaces.addresses.address", &address.address)?;
    let same_family = |field: &'static str, bytes: &[u8]| of_family(field, bytes, family(own));
    Ok(Address {
        address: own,
        prefix_length: prefix_length("network.interfaces.addresses.prefix_length", address.prefix_length, family(own))?,
        peer: same_family("network.interfaces.addresses.peer", &address.peer)?,
        broadcast: same_family("network.interfaces.addresses.broadcast", &address.broadcast)?,
        scope: byte("network.interfaces.addresses.scope", address.scope)?,
    })
}

fn neighbour(neighbour: wire::Neighbour) -> Result<Neighbour> {
    Ok(Neighbour {
        address: needed("network.interfaces.neighbours.address", &neighbour.address)?,
        mac: match &neighbour.mac[..] {
            [] => None,
            bytes => Some(mac("network.interfaces.neighbours.mac", bytes)?),
        },
    })
}

fn route(route: wire::Route) -> Result<Route> {
    let family = known_family("network.routes.family", route.family)?;
    if route.next_hops.len() > HOPS || route.metrics.len() > METRICS {
        return Err(Error::invalid("network.routes", format!("one has more than {HOPS} hops or {METRICS} metrics")));
    }
    let metric = |(kind, value): (u32, u32)| match u16::try_from(kind) {
        Ok(kind) => Ok((kind, value)),
        Err(_) => Err(Error::invalid("network.routes.metrics", format!("{kind} is no metric"))),
    };
    Ok(Route {
        family,
        destination: of_family("network.routes.destination", &route.destination, family)?,
        prefix_length: prefix_length("network.routes.prefix_length", route.prefix_length, family)?,
        source: of_family("network.routes.source", &route.source, family)?,
        source_prefix_length: prefix_length("network.routes.source_prefix_length", route.source_prefix_length, family)?,
        tos: byte("network.routes.tos", route.tos)?,
        table: route.table,
        protocol: byte("network.routes.protocol", route.protocol)?,
        scope: byte("network.routes.scope", route.scope)?,
        kind: byte("network.routes.type", route.type_)?,
        priority: route.priority,
        preferred_source: of_family("network.routes.preferred_source", &route.preferred_source, family)?,
        next_hops: route.next_hops.into_iter().map(next_hop).collect::<Result<_>>()?,
        metrics: sorted(route.metrics.into_iter().map(metric).collect::<Result<_>>()?),
    })
}

fn rule(rule: wire::Rule) -> Result<Rule> {
    let field = "network.rules";
    let family = known_family("network.rules.family", rule.family)?;
    if rule.attributes.len() > ATTRIBUTES || rule.attributes.values().any(|value| value.len() > VALUE_BYTES) {
        return Err(Error::invalid(field, format!("one has more than {ATTRIBUTES} attributes, or a long one")));
    }
    let attribute = |(kind, value): (u32, Vec<u8>)| match u16::try_from(kind) {
        Ok(kind) => Ok((kind, value)),
        Err(_) => Err(Error::invalid(field, format!("{kind} is no attribute"))),
    };
    let length = |length| prefix_length(field, length, family);
    Ok(Rule {
        family,
        destination_prefix_length: length(rule.destination_prefix_length)?,
        source_prefix_length: length(rule.source_prefix_length)?,
        tos: byte(field, rule.tos)?,
        action: byte(field, rule.action)?,
        flags: rule.flags,
        attributes: sorted(rule.attributes.into_iter().map(attribute).collect::<Result<_>>()?),
    })
}

/// What a map has in no order of its own, in one in which what is the same in two requests is found to be.
fn sorted<T: Ord>(mut entries: Vec<T>) -> Vec<T> {
    entries.sort_unstable();
    entries
}

fn known_family(field: &'static str, family: u32) -> Result<u8> {
    match u8::try_from(family) {
        Ok(family @ (AF_INET | AF_INET6)) => Ok(family),
        _ => Err(Error::invalid(field, format!("{family} is not known"))),
    }
}

fn next_hop(hop: wire::NextHop) -> Result<NextHop> {
    let weight = match u16::try_from(hop.weight) {
        Ok(weight @ 1..=256) => weight,
        _ => return Err(Error::invalid("network.routes.next_hops.weight", "is not from 1 to 256")),
    };
    Ok(NextHop {
        interface: name("network.routes.next_hops.interface", hop.interface)?,
        gateway: ip("network.routes.next_hops.gateway", &hop.gateway)?,
        onlink: hop.onlink,
        weight,
    })
}

/// A name that the kernel would take, and that is a single component of a path.
fn name(field: &'static str, name: String) -> Result<String> {
    let forbidden = |byte: u8| byte == b'/' || byte == b':' || byte == 0 || byte.is_ascii_whitespace();
    if name.is_empty() || name.len() > NAME_BYTES || name == "." || name == ".." || name.bytes().any(forbidden) {
        return Err(Error::invalid(field, format!("{name:?} is no name of an interface")));
    }
    Ok(name)
}

fn mac(field: &'static str, bytes: &[u8]) -> Result<[u8; 6]> {
    bytes.try_into().map_err(|_| Error::invalid(field, "is not six bytes"))
}

fn ip(field: &'static str, bytes: &[u8]) -> Result<Option<IpAddr>> {
    match bytes.len() {
        0 => return Ok(None),
        4 => <[u8; 4]>::try_from(bytes).map(IpAddr::from).ok(),
        16 => <[u8; 16]>::try_from(bytes).map(IpAddr::from).ok(),
        _ => None,
    }
    .map(Some)
    .ok_or_else(|| Error::invalid(field, "is neither 4 nor 16 bytes"))
}

fn needed(field: &'static str, bytes: &[u8]) -> Result<IpAddr> {
    ip(field, bytes)?.ok_or_else(|| Error::invalid(field, "is missing"))
}

fn of_family(field: &'static str, bytes: &[u8], wanted: u8) -> Result<Option<IpAddr>> {
    match ip(field, bytes)? {
        Some(address) if family(address) != wanted => Err(Error::invalid(field, "is of the other family")),
        address => Ok(address),
    }
}

fn prefix_length(field: &'static str, length: u32, family: u8) -> Result<u8> {
    let most = if family == AF_INET { 32 } else { 128 };
    match u8::try_from(length) {
        Ok(length) if length <= most => Ok(length),
        _ => Err(Error::invalid(field, format!("{length} is more than {most}"))),
    }
}

fn byte(field: &'static str, value: u32) -> Result<u8> {
    u8::try_from(value).map_err(|_| Error::invalid(field, format!("{value} is more than a byte")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eth0(change: impl FnOnce(&mut wire::Interface)) -> Result<Network> {
        let mut interface =
            wire::Interface { mac: vec![2, 0, 0, 0, 0, 1], name: "eth0".into(), mtu: 1500, ..Default::default() };
        change(&mut interface);
        network(wire::Network { interfaces: vec![interface], ..Default::default() })
    }

    #[test]
    fn interfaces_need_an_address_and_a_plain_name() {
        assert_eq!(eth0(|_| {}).unwrap().interfaces[0].mac, [2, 0, 0, 0, 0, 1]);
        for bad in ["", "..", "a/b", "a b", "a:b", "0123456789abcdef", "a\0"] {
            assert!(eth0(|interface| interface.name = bad.into()).is_err(), "{bad:?}");
        }
        assert!(eth0(|interface| interface.mac.truncate(5)).is_err());
    }

    #[test]
    fn what_two_requests_have_alike_is_alike() {
        let request = || {
            let rule =
                wire::Rule { family: 2, attributes: (1..20).map(|at| (at, vec![7])).collect(), ..Default::default() };
            let route = wire::Route { family: 2, metrics: (1..20).map(|at| (at, 7)).collect(), ..Default::default() };
            let missing_rules = vec![wire::Rule { family: 10, ..rule.clone() }];
            wire::Network { rules: vec![rule], routes: vec![route], missing_rules, ..Default::default() }
        };
        let first = network(request()).unwrap();
        assert_eq!((first.rules.len(), first.missing_rules[0].family), (1, AF_INET6));
        assert_eq!(first, network(request()).unwrap());
    }

    #[test]
    fn addresses_fit_their_family() {
        let address = |address: &[u8], prefix_length, broadcast: &[u8]| {
            let (address, broadcast) = (address.to_vec(), broadcast.to_vec());
            eth0(|interface| {
                interface.addresses = vec![wire::Address { address, prefix_length, broadcast, ..Default::default() }];
            })
        };
        assert!(address(&[10, 0, 0, 1], 24, &[10, 0, 0, 255]).is_ok());
        assert!(address(&[1; 16], 64, &[]).is_ok());
        assert!(address(&[10, 0, 0, 1], 33, &[]).is_err());
        assert!(address(&[10, 0, 0, 1], 24, &[1; 16]).is_err());
        assert!(address(&[10, 0, 0], 24, &[]).is_err());
        assert!(address(&[], 24, &[]).is_err());
    }

    #[test]
    fn routes_and_sysctls_are_checked() {
        let route = |change: fn(&mut wire::Route)| {
            let mut route = wire::Route { family: 2, table: 254, ..Default::default() };
            change(&mut route);
            network(wire::Network { routes: vec![route], ..Default::default() })
        };
        assert!(route(|_| {}).is_ok());
        assert!(route(|route| route.family = 7).is_err());
        assert!(route(|route| route.destination = vec![1; 16]).is_err());
        assert!(route(|route| route.scope = 256).is_err());
        let hop = |weight| wire::NextHop { interface: "eth0".into(), weight, ..Default::default() };
        let with_hop = |weight| {
            let route = wire::Route { family: 2, next_hops: vec![hop(weight)], ..Default::default() };
            network(wire::Network { routes: vec![route], ..Default::default() })
        };
        assert!(with_hop(256).is_ok());
        assert!(with_hop(0).is_err() && with_hop(257).is_err());
        let rule = |value: Vec<u8>| {
            let rule = wire::Rule { family: 2, attributes: [(6, value)].into(), ..Default::default() };
            network(wire::Network { rules: vec![rule], ..Default::default() })
        };
        assert!(rule(vec![1, 0, 0, 0]).is_ok());
        assert!(rule(vec![0; 17]).is_err());
        for (path, valid) in [("ipv4/conf/eth0.5/rp_filter", true), ("../kernel/x", false), ("/ipv4/x", false)] {
            let sysctls = [(path.to_owned(), "1".to_owned())].into();
            assert_eq!(network(wire::Network { sysctls, ..Default::default() }).is_ok(), valid, "{path}");
        }
    }
}
