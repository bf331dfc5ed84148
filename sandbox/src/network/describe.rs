//! What a network namespace has, as the guest is to have it.
//!
//! Everything is taken as the kernel lists it, but for what belongs to the host's end alone: routes that follow from an
//! interface's addresses in the table `local`, routes that were learned from a redirect, neighbours that were found
//! out, and the loopback interface's first addresses. The guest finds out its own.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hull_protocol::agent as wire;
use netlink_packet_core::Nla;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteNextHop, RouteNextHopFlags, RouteProtocol, RouteType,
    RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::LOOPBACK_INDEX;
use super::netlink::Netlink;

/// The table that the kernel fills with the host's own addresses (`RT_TABLE_LOCAL`).
const TABLE_LOCAL: u32 = 255;
/// The scope of a link's own routes and of those on the host itself; smaller numbers reach further.
const SCOPE_LINK: u8 = 253;
pub(super) const LOOPBACK: &str = "lo";
/// What the kernel gives every loopback interface that comes up.
const ADDRESSES_OF_LOOPBACK: [(IpAddr, u32); 2] =
    [(IpAddr::V4(Ipv4Addr::LOCALHOST), 8), (IpAddr::V6(Ipv6Addr::LOCALHOST), 128)];

/// An interface of the namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Vec<u8>,
    pub(super) mtu: u32,
    pub(super) is_ethernet: bool,
    pub(super) is_up: bool,
    pub(super) is_loopback: bool,
    /// Something is at its other end (`IFF_LOWER_UP`).
    pub(super) has_carrier: bool,
    /// Nobody on the link is asked for an address, as on an ipvlan in mode l3 (`IFF_NOARP`).
    pub(super) no_arp: bool,
    /// The bridge or bond that it is part of.
    pub(super) controller: Option<u32>,
    /// The interface of the same namespace that it sits on, such as a VLAN's.
    pub(super) lower: Option<u32>,
}

/// The interfaces in the order of their numbers.
pub(super) fn links(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    let mut links: Vec<Link> = netlink
        .dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(link(message)),
            _ => None,
        })
        .collect();
    links.sort_by_key(|link| link.index);
    Ok(links)
}

fn link(message: LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: Vec::new(),
        mtu: 0,
        is_ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        is_up: flags.contains(LinkFlags::Up),
        is_loopback: flags.contains(LinkFlags::Loopback),
        has_carrier: flags.contains(LinkFlags::LowerUp),
        no_arp: flags.contains(LinkFlags::Noarp),
        controller: None,
        lower: None,
    };
    let mut elsewhere = false;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(mac) => link.mac = mac,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Controller(index) => link.controller = Some(index),
            LinkAttribute::Link(index) if index != link.index => link.lower = Some(index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            _ => {}
        }
    }
    if elsewhere {
        link.lower = None;
    }
    link
}

/// Describes these interfaces and all routes that lead through them.
pub(super) fn describe(netlink: &mut Netlink, links: &[Link]) -> io::Result<wire::Network> {
    let mut interfaces: Vec<wire::Interface> = links
        .iter()
        .map(|link| wire::Interface {
            mac: link.mac.clone(),
            name: link.name.clone(),
            mtu: link.mtu,
            no_arp: link.no_arp,
            ..Default::default()
        })
        .collect();
    let place: HashMap<u32, usize> = links.iter().enumerate().map(|(at, link)| (link.index, at)).collect();
    for message in netlink.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        if let RouteNetlinkMessage::NewAddress(message) = message
            && let Some(&at) = place.get(&message.header.index)
            && let Some(address) = address(&message)
            && !(links[at].is_loopback && is_given(&address))
        {
            interfaces[at].addresses.push(address);
        }
    }
    for proxies in [false, true] {
        let mut request = NeighbourMessage::default();
        if proxies {
            request.header.flags = NeighbourFlags::Proxy;
        }
        for message in netlink.dump(&RouteNetlinkMessage::GetNeighbour(request))? {
            if let RouteNetlinkMessage::NewNeighbour(message) = message
                && let Some(&at) = place.get(&message.header.ifindex)
                && let Some(neighbour) = neighbour(&message)
            {
                interfaces[at].neighbours.push(neighbour);
            }
        }
    }
    let mut names: HashMap<u32, &str> = links.iter().map(|link| (link.index, link.name.as_str())).collect();
    // The loopback interface is the first of every namespace, and the guest's is there whether this one is up or not.
    names.entry(LOOPBACK_INDEX).or_insert(LOOPBACK);
    let mut routes = Vec::new();
    for message in netlink.dump(&RouteNetlinkMessage::GetRoute(RouteMessage::default()))? {
        if let RouteNetlinkMessage::NewRoute(message) = message {
            routes.extend(route(&message, &names));
        }
    }
    sort(&mut routes);
    Ok(wire::Network { interfaces, routes, ..Default::default() })
}

/// Whether the guest's loopback interface has an address already.
fn is_given(address: &wire::Address) -> bool {
    ADDRESSES_OF_LOOPBACK
        .iter()
        .any(|(given, length)| octets(*given) == address.address && *length == address.prefix_length)
}

/// Puts routes without a gateway before those with one, and of the former those on the link first: the kernel takes a
/// gateway only if it knows already how to reach it.
fn sort(routes: &mut [wire::Route]) {
    routes.sort_by_key(|route| {
        let has_gateway = route.next_hops.iter().any(|hop| !hop.gateway.is_empty());
        let is_far = route.scope < u32::from(SCOPE_LINK);
        // Among equals the narrower first, since a gateway may itself be behind another one.
        (has_gateway, is_far && has_gateway, std::cmp::Reverse(route.prefix_length))
    });
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn address(message: &AddressMessage) -> Option<wire::Address> {
    let (mut local, mut other, mut broadcast) = (None, None, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            AddressAttribute::Broadcast(address) => broadcast = address.octets().to_vec(),
            _ => {}
        }
    }
    // IPv6 has only the second without a peer, IPv4 has both.
    let address = local.or(other)?;
    let peer = other.filter(|other| *other != address).map(octets).unwrap_or_default();
    Some(wire::Address {
        address: octets(address),
        prefix_length: message.header.prefix_len.into(),
        peer,
        broadcast,
        scope: u8::from(message.header.scope).into(),
        ..Default::default()
    })
}

fn neighbour(message: &NeighbourMessage) -> Option<wire::Neighbour> {
    let is_proxy = message.header.flags.contains(NeighbourFlags::Proxy);
    if !is_proxy && message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(octets((*ip).into())),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(octets((*ip).into())),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac.clone_from(bytes),
            _ => {}
        }
    }
    // Permanent neighbours without an address of six bytes are those of other kinds of links.
    (is_proxy || mac.len() == 6).then_some(())?;
    Some(wire::Neighbour { address: address?, mac: if is_proxy { Vec::new() } else { mac }, ..Default::default() })
}

/// A route, if it is one for the guest and all its interfaces are.
fn route(message: &RouteMessage, names: &HashMap<u32, &str>) -> Option<wire::Route> {
    let header = &message.header;
    let family = match header.address_family {
        AddressFamily::Inet => 2,
        AddressFamily::Inet6 => 10,
        _ => return None,
    };
    let mut route = wire::Route {
        family,
        prefix_length: header.destination_prefix_length.into(),
        source_prefix_length: header.source_prefix_length.into(),
        tos: header.tos.into(),
        table: header.table.into(),
        protocol: u8::from(header.protocol).into(),
        scope: u8::from(header.scope).into(),
        type_: u8::from(header.kind).into(),
        ..Default::default()
    };
    let (mut through, mut hops) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => route.destination = address_octets(address)?,
            RouteAttribute::Source(address) => route.source = address_octets(address)?,
            RouteAttribute::PrefSource(address) => route.preferred_source = address_octets(address)?,
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Priority(priority) => route.priority = *priority,
            RouteAttribute::Oif(index) => through = Some(*index),
            RouteAttribute::MultiPath(list) => hops = Some(list),
            RouteAttribute::Metrics(metrics) => route.metrics = metrics.iter().filter_map(metric).collect(),
            _ => {}
        }
    }
    let kernels_own = header.protocol == RouteProtocol::Kernel
        && (route.table == TABLE_LOCAL && !is_own_range(&route)
            || matches!(header.kind, RouteType::Multicast | RouteType::Anycast));
    let passing = header.flags.contains(RouteFlags::Cloned) || header.protocol == RouteProtocol::IcmpRedirect;
    if kernels_own || passing || matches!(header.kind, RouteType::Broadcast) {
        return None;
    }
    match (hops, through) {
        (Some(hops), _) => {
            for hop in hops {
                route.next_hops.push(next_hop(hop, names)?);
            }
        }
        (None, Some(index)) => {
            let onlink = header.flags.contains(RouteFlags::Onlink);
            route.next_hops.push(hop(names.get(&index)?, &message.attributes, onlink, 1)?);
        }
        (None, None) => {}
    }
    Some(route)
}

/// Whether a route takes a range of addresses for the namespace's own. The kernel makes one for an address of the loopback
/// interface that has a prefix, and as it does not derive routes to prefixes in the guest, this one is carried over.
fn is_own_range(route: &wire::Route) -> bool {
    let is_given = route.destination.first() == Some(&127);
    route.family == 2 && route.type_ == u32::from(u8::from(RouteType::Local)) && route.prefix_length < 32 && !is_given
}

fn next_hop(next: &RouteNextHop, names: &HashMap<u32, &str>) -> Option<wire::NextHop> {
    let name = names.get(&next.interface_index)?;
    hop(name, &next.attributes, next.flags.contains(RouteNextHopFlags::Onlink), u32::from(next.hops) + 1)
}

fn hop(interface: &str, attributes: &[RouteAttribute], onlink: bool, weight: u32) -> Option<wire::NextHop> {
    let mut gateway = Vec::new();
    for attribute in attributes {
        match attribute {
            RouteAttribute::Gateway(address) => gateway = address_octets(address)?,
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = address.octets().to_vec(),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = address.octets().to_vec(),
            _ => {}
        }
    }
    Some(wire::NextHop { interface: interface.to_owned(), gateway, onlink, weight, ..Default::default() })
}

fn metric(metric: &impl Nla) -> Option<(u32, u32)> {
    if metric.value_len() != 4 {
        return None;
    }
    let mut value = [0; 4];
    metric.emit_value(&mut value);
    Some((metric.kind().into(), u32::from_ne_bytes(value)))
}

fn address_octets(address: &RouteAddress) -> Option<Vec<u8>> {
    match address {
        RouteAddress::Inet(address) => Some(address.octets().to_vec()),
        RouteAddress::Inet6(address) => Some(address.octets().to_vec()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::route::{RouteMetric, RouteScope};

    use super::*;

    fn names() -> HashMap<u32, &'static str> {
        HashMap::from([(1, "lo"), (2, "eth0")])
    }

    fn message(attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.table = 254;
        message.header.kind = RouteType::Unicast;
        message.header.protocol = RouteProtocol::Boot;
        message.attributes = attributes;
        message
    }

    fn gateway() -> RouteAttribute {
        RouteAttribute::Gateway(RouteAddress::Inet([10, 0, 0, 1].into()))
    }

    #[test]
    fn a_link_without_arp_is_one() {
        for (flags, no_arp) in [(LinkFlags::Up | LinkFlags::Noarp, true), (LinkFlags::Up | LinkFlags::Broadcast, false)]
        {
            let mut message = LinkMessage::default();
            message.header.flags = flags;
            assert_eq!(link(message).no_arp, no_arp);
        }
    }

    #[test]
    fn a_link_has_a_carrier_if_something_is_at_its_other_end() {
        for (flags, has_carrier) in [(LinkFlags::Up | LinkFlags::LowerUp, true), (LinkFlags::Up, false)] {
            let mut message = LinkMessage::default();
            message.header.flags = flags;
            assert_eq!(link(message).has_carrier, has_carrier);
        }
    }

    #[test]
    fn a_route_keeps_its_gateway_and_metrics() {
        let mut message = message(vec![
            gateway(),
            RouteAttribute::Oif(2),
            RouteAttribute::Priority(7),
            RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400)]),
        ]);
        message.header.flags = RouteFlags::Onlink;
        let route = route(&message, &names()).unwrap();
        assert_eq!((route.table, route.priority, route.metrics.get(&2)), (254, 7, Some(&1400)));
        let hop = &route.next_hops[0];
        assert_eq!((hop.interface.as_str(), &hop.gateway[..], hop.onlink), ("eth0", &[10, 0, 0, 1][..], true));
    }

    #[test]
    fn routes_of_the_host_alone_are_left_out() {
        assert!(route(&message(vec![RouteAttribute::Oif(9)]), &names()).is_none());
        let mut local = message(vec![RouteAttribute::Oif(2)]);
        (local.header.table, local.header.kind, local.header.protocol) = (255, RouteType::Local, RouteProtocol::Kernel);
        local.header.destination_prefix_length = 32;
        assert!(route(&local, &names()).is_none());
        // A range of the loopback interface's is not, but for the one that any has.
        local.header.destination_prefix_length = 24;
        for (network, is_left_out) in [([10, 96, 0, 0], false), ([127, 0, 0, 0], true)] {
            local.attributes =
                vec![RouteAttribute::Destination(RouteAddress::Inet(network.into())), RouteAttribute::Oif(1)];
            assert_eq!(route(&local, &names()).is_none(), is_left_out);
        }
        // Somebody's own in that table is not.
        local.header.protocol = RouteProtocol::Static;
        assert!(route(&local, &names()).is_some());
        let mut unreachable = message(vec![]);
        unreachable.header.kind = RouteType::Unreachable;
        assert!(route(&unreachable, &names()).unwrap().next_hops.is_empty());
    }

    #[test]
    fn gateways_come_after_the_routes_to_them() {
        let mut link = message(vec![RouteAttribute::Oif(2)]);
        link.header.scope = RouteScope::Link;
        link.header.destination_prefix_length = 32;
        let default = message(vec![gateway(), RouteAttribute::Oif(2)]);
        let mut routes: Vec<_> = [&default, &link].into_iter().filter_map(|message| route(message, &names())).collect();
        sort(&mut routes);
        assert_eq!(routes.iter().map(|route| route.prefix_length).collect::<Vec<_>>(), [32, 0]);
    }
}
