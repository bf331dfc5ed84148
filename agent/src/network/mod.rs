//! The guest's network: interfaces, addresses, routes and neighbours as the host describes them.
//!
//! The order matters to the kernel. Interfaces have their names before any is up, sysctls are there before addresses, all
//! interfaces are up before the first route, and routes come in the order of the request, in which the host has put
//! those that others depend on first.

mod netlink;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use self::netlink::{Kind, Netlink, Request};
use crate::error::{Error, Result, Step};

const INTERFACES: &str = "/sys/class/net";
const SYSCTLS: &str = "/proc/sys/net";

/// Address families, as rtnetlink(7) numbers them.
const AF_UNSPEC: u8 = 0;
pub(crate) const AF_INET: u8 = 2;
pub(crate) const AF_INET6: u8 = 10;

// Attributes of links, addresses, neighbours and routes (`<linux/if_link.h>` and its like).
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;

const IFF_UP: u32 = 1;
const IFF_NOARP: u32 = 0x80;
/// No duplicate address detection: the address has been in use on the host.
const IFA_F_NODAD: u32 = 0x02;
/// The address stays.
const IFA_F_PERMANENT: u32 = 0x80;
/// No route by itself: the host lists all.
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
const NUD_PERMANENT: u16 = 0x80;
const NTF_PROXY: u8 = 0x08;
const RTNH_F_ONLINK: u8 = 4;
/// The table number for those that have no place in one byte.
const RT_TABLE_COMPAT: u8 = 252;

/// What the guest's network is to be. Checked by `server::convert`.
#[derive(Debug, Default)]
pub(crate) struct Network {
    pub(crate) interfaces: Vec<Interface>,
    pub(crate) routes: Vec<Route>,
    /// By path below /proc/sys/net.
    pub(crate) sysctls: HashMap<String, String>,
    pub(crate) rules: Vec<Rule>,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Interface {
    pub(crate) mac: [u8; 6],
    pub(crate) name: String,
    pub(crate) mtu: u32,
    /// Neighbours are not asked for their addresses.
    pub(crate) no_arp: bool,
    pub(crate) addresses: Vec<Address>,
    pub(crate) neighbours: Vec<Neighbour>,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Address {
    pub(crate) address: IpAddr,
    pub(crate) prefix_length: u8,
    pub(crate) peer: Option<IpAddr>,
    pub(crate) broadcast: Option<IpAddr>,
    pub(crate) scope: u8,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Neighbour {
    pub(crate) address: IpAddr,
    /// None for a proxy.
    pub(crate) mac: Option<[u8; 6]>,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Route {
    pub(crate) family: u8,
    pub(crate) destination: Option<IpAddr>,
    pub(crate) prefix_length: u8,
    pub(crate) source: Option<IpAddr>,
    pub(crate) source_prefix_length: u8,
    pub(crate) tos: u8,
    pub(crate) table: u32,
    pub(crate) protocol: u8,
    pub(crate) scope: u8,
    pub(crate) kind: u8,
    pub(crate) priority: u32,
    pub(crate) preferred_source: Option<IpAddr>,
    pub(crate) next_hops: Vec<NextHop>,
    pub(crate) metrics: Vec<(u16, u32)>,
}

#[derive(Debug, PartialEq)]
pub(crate) struct NextHop {
    pub(crate) interface: String,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) onlink: bool,
    /// 1 to 256.
    pub(crate) weight: u16,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Rule {
    pub(crate) family: u8,
    pub(crate) destination_prefix_length: u8,
    pub(crate) source_prefix_length: u8,
    pub(crate) tos: u8,
    pub(crate) action: u8,
    pub(crate) flags: u32,
    pub(crate) attributes: Vec<(u16, Vec<u8>)>,
}

/// Makes the guest's network.
pub(crate) fn set_up(network: &Network) -> Result<()> {
    let mut netlink = Netlink::open().step("open a netlink socket")?;
    let all: Vec<&Interface> = network.interfaces.iter().collect();
    let indices = name_interfaces(&mut netlink, &all, |_| false)?;
    set_sysctls(&network.sysctls)?;
    for (interface, &index) in network.interfaces.iter().zip(&indices) {
        raise(&mut netlink, interface, index)?;
        for address in &interface.addresses {
            add_address(&mut netlink, interface, address, index)?;
        }
        for neighbour in &interface.neighbours {
            add_neighbour(&mut netlink, interface, neighbour, index)?;
        }
    }
    for route in &network.routes {
        add_route(&mut netlink, route)?;
    }
    for rule in &network.rules {
        add_rule(&mut netlink, rule)?;
    }
    Ok(())
}

/// Makes the network `old` into `new`. Devices of interfaces that come are there already; those of interfaces that go still
/// are, or the kernel has taken along what belonged to them.
pub(crate) fn update(old: &Network, new: &Network) -> Result<()> {
    let before = |name: &str| old.interfaces.iter().find(|interface| interface.name == name);
    let mut netlink = Netlink::open().step("open a netlink socket")?;
    // Against the order in which they were made.
    for rule in gone(&old.rules, &new.rules) {
        remove(&mut netlink, rule_message(Request::removal, rule), "remove a routing rule")?;
    }
    for route in gone(&old.routes, &new.routes).rev() {
        let Ok(hops) = resolve(&route.next_hops) else { continue };
        remove(&mut netlink, route_message(Request::removal, route, &hops), "remove a route")?;
    }
    for interface in &old.interfaces {
        let Ok(index) = index_of(&interface.name) else { continue };
        let now = new.interfaces.iter().find(|other| other.name == interface.name);
        let neighbours = now.map_or(&[][..], |now| &now.neighbours);
        for neighbour in gone(&interface.neighbours, neighbours) {
            remove(&mut netlink, neighbour_message(Request::removal, neighbour, index), "remove a neighbour")?;
        }
        for address in gone(&interface.addresses, now.map_or(&[][..], |now| &now.addresses)) {
            remove(&mut netlink, address_message(Request::removal, address, index), "remove an address")?;
        }
    }
    // Their names come before their sysctls, which have them in their paths.
    let come: Vec<&Interface> = new.interfaces.iter().filter(|interface| before(&interface.name).is_none()).collect();
    name_interfaces(&mut netlink, &come, |name| before(name).is_some())?;
    let changed = new.sysctls.iter().filter(|(path, value)| old.sysctls.get(*path) != Some(value));
    set_sysctls(&changed.map(|(path, value)| (path.clone(), value.clone())).collect())?;
    for interface in &new.interfaces {
        let was = before(&interface.name);
        let index = index_of(&interface.name)?;
        if was.is_none_or(|was| (was.mtu, was.no_arp) != (interface.mtu, interface.no_arp)) {
            raise(&mut netlink, interface, index)?;
        }
        for address in gone(&interface.addresses, was.map_or(&[][..], |was| &was.addresses)) {
            add_address(&mut netlink, interface, address, index)?;
        }
        for neighbour in gone(&interface.neighbours, was.map_or(&[][..], |was| &was.neighbours)) {
            add_neighbour(&mut netlink, interface, neighbour, index)?;
        }
    }
    // The kernel takes routes away with the addresses that they prefer, so all are asked for again.
    for route in &new.routes {
        add_route(&mut netlink, route)?;
    }
    for rule in gone(&new.rules, &old.rules) {
        add_rule(&mut netlink, rule)?;
    }
    Ok(())
}

/// What `old` has and `new` has not.
fn gone<'a, T: PartialEq>(old: &'a [T], new: &'a [T]) -> impl DoubleEndedIterator<Item = &'a T> {
    old.iter().filter(|item| !new.contains(item))
}

/// Takes something away that may have gone by itself.
fn remove(netlink: &mut Netlink, request: Request, step: &'static str) -> Result<()> {
    match netlink.call(request) {
        Err(error) if error.raw_os_error().is_some_and(|code| ABSENT.contains(&code)) => Ok(()),
        result => result.step(step),
    }
}

/// What the kernel says of a route, rule, neighbour or address that is not there.
const ABSENT: [i32; 3] = [libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL];

/// Finds the interfaces by their addresses among those that have no name to be kept, and gives them their names; answers
/// their indices.
fn name_interfaces(
    netlink: &mut Netlink,
    interfaces: &[&Interface],
    is_kept: impl Fn(&str) -> bool,
) -> Result<Vec<u32>> {
    let mut present = present(Path::new(INTERFACES)).step("list the interfaces")?;
    present.retain(|(_, name, _)| !is_kept(name));
    let mut found = Vec::new();
    for interface in interfaces {
        let at = present.iter().position(|(_, _, mac)| *mac == interface.mac);
        let at = at.ok_or_else(|| Error::NotFound(format!("interface for {}", interface.name)))?;
        let (index, name, _) = present.remove(at);
        found.push((index, name));
    }
    let misnamed: Vec<_> = found.iter().zip(interfaces).filter(|((_, name), wanted)| *name != wanted.name).collect();
    // Two interfaces may want each other's name, so all let go of theirs first.
    for ((index, _), _) in &misnamed {
        rename(netlink, *index, &format!("hull{index}"))?;
    }
    for ((index, _), wanted) in &misnamed {
        rename(netlink, *index, &wanted.name)?;
    }
    Ok(found.into_iter().map(|(index, _)| index).collect())
}

/// The interfaces that there are, in the order in which they appeared: index, name, address.
fn present(directory: &Path) -> io::Result<Vec<(u32, String, [u8; 6])>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        // An interface that vanishes while it is looked at has neither.
        if let (Ok(index), Some(mac), Ok(name)) =
            (read("ifindex").trim().parse(), parse_mac(read("address").trim()), entry.file_name().into_string())
        {
            found.push((index, name, mac));
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// `struct ifinfomsg`: family, kind of hardware, index, flags, which flags to change.
fn link(index: u32, flags: u32, change: u32) -> Request {
    let mut body = vec![AF_UNSPEC, 0, 0, 0];
    for word in [index, flags, change] {
        body.extend(word.to_ne_bytes());
    }
    Request::new(Kind::Link, &body)
}

fn rename(netlink: &mut Netlink, index: u32, name: &str) -> Result<()> {
    let request = link(index, 0, 0).with(IFLA_IFNAME, &zero_terminated(name));
    netlink.call(request).step_with(|| format!("name the interface {name}"))
}

fn zero_terminated(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// Sets what there is; a guest's kernel may have been built without some of what the host's has.
fn set_sysctls(sysctls: &HashMap<String, String>) -> Result<()> {
    for (path, value) in sysctls {
        match fs::write(Path::new(SYSCTLS).join(path), value) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::info!("the kernel has no sysctl net/{path}");
            }
            result => result.step_with(|| format!("set the sysctl net/{path} to {value:?}"))?,
        }
    }
    Ok(())
}

/// Brings an interface up, or changes one that is.
fn raise(netlink: &mut Netlink, interface: &Interface, index: u32) -> Result<()> {
    let Interface { name, mtu, .. } = interface;
    netlink.call(raising(interface, index)).step_with(|| format!("bring up {name} with an MTU of {mtu}"))
}

fn raising(interface: &Interface, index: u32) -> Request {
    let arp = if interface.no_arp { IFF_NOARP } else { 0 };
    link(index, IFF_UP | arp, IFF_UP | IFF_NOARP).with(IFLA_MTU, &interface.mtu.to_ne_bytes())
}

fn add_address(netlink: &mut Netlink, interface: &Interface, address: &Address, index: u32) -> Result<()> {
    let Address { address: ip, prefix_length, .. } = address;
    netlink
        .call(address_message(Request::new, address, index))
        .step_with(|| format!("give {} the address {ip}/{prefix_length}", interface.name))
}

fn add_neighbour(netlink: &mut Netlink, interface: &Interface, neighbour: &Neighbour, index: u32) -> Result<()> {
    netlink
        .call(neighbour_message(Request::new, neighbour, index))
        .step_with(|| format!("tell {} of its neighbour {}", interface.name, neighbour.address))
}

fn add_rule(netlink: &mut Netlink, rule: &Rule) -> Result<()> {
    match netlink.call(rule_message(Request::new, rule)) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.step("add a routing rule"),
    }
}

/// What becomes of what a message describes: [`Request::new`] or [`Request::removal`].
type Action = fn(Kind, &[u8]) -> Request;

/// `struct ifaddrmsg`: family, prefix length, flags, scope, index.
fn address_message(action: Action, address: &Address, index: u32) -> Request {
    // The flags of duplicate address detection and of routes do not fit the structure's own byte.
    let flags = IFA_F_NODAD | IFA_F_PERMANENT | IFA_F_NOPREFIXROUTE;
    let mut body = vec![family(address.address), address.prefix_length, 0, address.scope];
    body.extend(index.to_ne_bytes());
    action(Kind::Address, &body)
        .with(IFA_LOCAL, &octets(Some(address.address)))
        .with(IFA_ADDRESS, &octets(address.peer.or(Some(address.address))))
        .with_some(IFA_BROADCAST, &octets(address.broadcast))
        .with(IFA_FLAGS, &flags.to_ne_bytes())
}

/// `struct ndmsg`: family, padding, index, state, flags, type.
fn neighbour_message(action: Action, neighbour: &Neighbour, index: u32) -> Request {
    let mut body = vec![family(neighbour.address), 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(NUD_PERMANENT.to_ne_bytes());
    body.extend([if neighbour.mac.is_none() { NTF_PROXY } else { 0 }, 0]);
    action(Kind::Neighbour, &body)
        .with(NDA_DST, &octets(Some(neighbour.address)))
        .with_some(NDA_LLADDR, neighbour.mac.as_ref().map_or(&[], |mac| &mac[..]))
}

fn add_route(netlink: &mut Netlink, route: &Route) -> Result<()> {
    let step = || match route.destination {
        Some(destination) => format!("add the route to {destination}/{}", route.prefix_length),
        None => "add the default route".to_owned(),
    };
    let hops = resolve(&route.next_hops)?;
    match netlink.call(route_message(Request::new, route, &hops)) {
        // The kernel made it with an interface or address.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.step_with(step),
    }
}

/// Next hops with the indices of their interfaces.
fn resolve(hops: &[NextHop]) -> Result<Vec<(&NextHop, u32)>> {
    hops.iter().map(|hop| Ok((hop, index_of(&hop.interface)?))).collect()
}

fn index_of(interface: &str) -> Result<u32> {
    let index = fs::read_to_string(Path::new(INTERFACES).join(interface).join("ifindex"));
    let index = index.step_with(|| format!("find the interface {interface}"))?;
    index.trim().parse().step_with(|| format!("read the index of {interface}"))
}

/// `struct rtmsg`: family, prefix lengths of destination and source, type of service, table, protocol, scope, type, flags.
fn route_message(action: Action, route: &Route, hops: &[(&NextHop, u32)]) -> Request {
    let one = if let [one] = hops { Some(one) } else { None };
    let flags = one.map_or(0, |(hop, _)| hop_flags(hop));
    let mut body = vec![
        route.family,
        route.prefix_length,
        route.source_prefix_length,
        route.tos,
        u8::try_from(route.table).unwrap_or(RT_TABLE_COMPAT),
        route.protocol,
        route.scope,
        route.kind,
    ];
    body.extend(u32::from(flags).to_ne_bytes());
    let mut request = action(Kind::Route, &body)
        .with_some(RTA_DST, &octets(route.destination))
        .with_some(RTA_SRC, &octets(route.source))
        .with_some(RTA_PREFSRC, &octets(route.preferred_source))
        .with(RTA_TABLE, &route.table.to_ne_bytes())
        .with(RTA_PRIORITY, &route.priority.to_ne_bytes());
    if !route.metrics.is_empty() {
        request = request.with_nested(RTA_METRICS, |request| {
            let add = |request: Request, (kind, value): &(u16, u32)| request.with(*kind, &value.to_ne_bytes());
            route.metrics.iter().fold(request, add)
        });
    }
    if let Some((hop, index)) = one {
        return with_gateway(request, route.family, hop).with(RTA_OIF, &index.to_ne_bytes());
    }
    if hops.is_empty() {
        return request;
    }
    request.with_nested(RTA_MULTIPATH, |request| {
        hops.iter().fold(request, |request, (hop, index)| {
            // The kernel counts from 0.
            let hops = (hop.weight - 1) as u8;
            request.with_hop(hop_flags(hop), hops, *index, |request| with_gateway(request, route.family, hop))
        })
    })
}

/// `struct fib_rule_hdr`: family, prefix lengths of destination and source, type of service, table, action, flags.
fn rule_message(action: Action, rule: &Rule) -> Request {
    let (family, lengths) = (rule.family, [rule.destination_prefix_length, rule.source_prefix_length]);
    // The table is an attribute; behind it two bytes without a meaning.
    let mut body = vec![family, lengths[0], lengths[1], rule.tos, 0, 0, 0, rule.action];
    body.extend(rule.flags.to_ne_bytes());
    let add = |request: Request, (kind, value): &(u16, Vec<u8>)| request.with(*kind, value);
    rule.attributes.iter().fold(action(Kind::Rule, &body), add)
}

fn hop_flags(hop: &NextHop) -> u8 {
    if hop.onlink { RTNH_F_ONLINK } else { 0 }
}

fn with_gateway(request: Request, route_family: u8, hop: &NextHop) -> Request {
    match hop.gateway {
        Some(gateway) if family(gateway) != route_family => {
            // `struct rtvia`: family, address.
            let mut via = u16::from(family(gateway)).to_ne_bytes().to_vec();
            via.extend(octets(Some(gateway)));
            request.with(RTA_VIA, &via)
        }
        gateway => request.with_some(RTA_GATEWAY, &octets(gateway)),
    }
}

pub(crate) fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

fn octets(address: Option<IpAddr>) -> Vec<u8> {
    match address {
        Some(IpAddr::V4(address)) => address.octets().to_vec(),
        Some(IpAddr::V6(address)) => address.octets().to_vec(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_listed_in_the_order_of_their_indices() {
        let directory = tempfile::tempdir().unwrap();
        for (name, index, mac) in [("b", "2", "02:00:00:00:00:01"), ("a", "3", "02:00:00:00:00:01"), ("tun", "4", "")] {
            let interface = directory.path().join(name);
            fs::create_dir(&interface).unwrap();
            fs::write(interface.join("ifindex"), format!("{index}\n")).unwrap();
            fs::write(interface.join("address"), format!("{mac}\n")).unwrap();
        }
        let mac = [2, 0, 0, 0, 0, 1];
        assert_eq!(present(directory.path()).unwrap(), [(2, "b".to_owned(), mac), (3, "a".to_owned(), mac)]);
    }

    #[test]
    fn an_update_needs_the_devices_of_interfaces_that_come_and_not_of_those_that_went() {
        let new = Network { interfaces: vec![eth7()], ..Network::default() };
        let error = update(&Network::default(), &new).unwrap_err().to_string();
        assert_eq!(error, "no such interface for eth7");
        assert!(update(&new, &Network::default()).is_ok());
        assert!(update(&Network::default(), &Network::default()).is_ok());
    }

    #[test]
    fn what_went_is_what_the_new_list_has_not() {
        assert_eq!(gone(&[1, 2, 3], &[3, 4]).collect::<Vec<_>>(), [&1, &2]);
    }

    #[test]
    fn a_missing_interface_is_named() {
        let network = Network { interfaces: vec![eth7()], ..Network::default() };
        assert_eq!(set_up(&network).unwrap_err().to_string(), "no such interface for eth7");
    }

    #[test]
    fn an_interface_is_raised_with_arp_or_without() {
        for (no_arp, flags) in [(false, IFF_UP), (true, IFF_UP | IFF_NOARP)] {
            let message = raising(&Interface { no_arp, ..eth7() }, 3).finished(1);
            // Behind the message's header and the structure's first eight bytes: what flags to have, of which ones.
            let words = [flags, IFF_UP | IFF_NOARP].map(u32::to_ne_bytes).concat();
            assert_eq!(message[24..32], words);
        }
    }

    fn eth7() -> Interface {
        Interface {
            mac: [0xfe, 1, 2, 3, 4, 5],
            name: "eth7".into(),
            mtu: 1500,
            no_arp: false,
            addresses: Vec::new(),
            neighbours: Vec::new(),
        }
    }
}
