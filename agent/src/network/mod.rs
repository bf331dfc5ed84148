//! The guest's network: interfaces, addresses, routes and neighbours as the host describes them.
//!
//! The order matters to the kernel. Interfaces have their names before any is up, sysctls are there before addresses, all
//! interfaces are up before the first route, and routes come in the order of the request, in which the host has put
//! those that others depend on first.

mod netlink;
mod rules;

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

/// What the guest's network is to be, or is. Checked by `server::network`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Network {
    pub(crate) interfaces: Vec<Interface>,
    pub(crate) routes: Vec<Route>,
    /// By path below /proc/sys/net.
    pub(crate) sysctls: HashMap<String, String>,
    /// Beyond those that the kernel makes.
    pub(crate) rules: Vec<Rule>,
    /// Those of the kernel's that are not there.
    pub(crate) missing_rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Interface {
    pub(crate) mac: [u8; 6],
    pub(crate) name: String,
    pub(crate) mtu: u32,
    /// Neighbours are not asked for their addresses.
    pub(crate) no_arp: bool,
    pub(crate) addresses: Vec<Address>,
    pub(crate) neighbours: Vec<Neighbour>,
}

impl Interface {
    /// An interface that has its name, and nothing else yet.
    fn unraised(&self) -> Self {
        let (addresses, neighbours) = (Vec::new(), Vec::new());
        // Nobody wants this MTU.
        Self { mac: self.mac, name: self.name.clone(), mtu: 0, no_arp: false, addresses, neighbours }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Address {
    pub(crate) address: IpAddr,
    pub(crate) prefix_length: u8,
    pub(crate) peer: Option<IpAddr>,
    pub(crate) broadcast: Option<IpAddr>,
    pub(crate) scope: u8,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Neighbour {
    pub(crate) address: IpAddr,
    /// None for a proxy.
    pub(crate) mac: Option<[u8; 6]>,
}

#[derive(Clone, Debug, PartialEq)]
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

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NextHop {
    pub(crate) interface: String,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) onlink: bool,
    /// 1 to 256.
    pub(crate) weight: u16,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rule {
    pub(crate) family: u8,
    pub(crate) destination_prefix_length: u8,
    pub(crate) source_prefix_length: u8,
    pub(crate) tos: u8,
    pub(crate) action: u8,
    pub(crate) flags: u32,
    pub(crate) attributes: Vec<(u16, Vec<u8>)>,
}

/// Most refusals that an answer tells of; a message has bounds, and one interface that is missing may take a hundred routes along.
const MOST_TOLD: usize = 8;

/// Steps of a change that were refused; the others were carried out.
#[derive(Debug, Default)]
struct Refused(Vec<Error>);

impl Refused {
    /// What a step answers, if it was carried out; otherwise takes note.
    fn unless<T>(&mut self, step: Result<T>) -> Option<T> {
        step.map_err(|error| self.0.push(error)).ok()
    }

    /// Whether a step was carried out; takes note if not.
    fn is_done(&mut self, step: Result<()>) -> bool {
        self.unless(step).is_some()
    }

    fn into_result(mut self) -> Result<()> {
        match self.0.len() {
            0 => Ok(()),
            1 => Err(self.0.remove(0)),
            count => {
                let mut told: Vec<String> = self.0.iter().take(MOST_TOLD).map(Error::to_string).collect();
                if count > MOST_TOLD {
                    told.push(format!("and {} more", count - MOST_TOLD));
                }
                Err(Error::failed("set up the network", told.join("; ")))
            }
        }
    }
}

/// Makes the guest's network.
pub(crate) fn set_up(network: &Network) -> Result<()> {
    update(&Network::default(), network).1
}

/// Makes the network `old` into `new`. Devices of interfaces that come are there already; those of interfaces that go still
/// are, or the kernel has taken along what belonged to them.
///
/// What the kernel refuses keeps nothing else waiting. Answers the network as it is then, from which the next change tries
/// that again, and what was refused.
pub(crate) fn update(old: &Network, new: &Network) -> (Network, Result<()>) {
    let mut now = old.clone();
    let mut refused = Refused::default();
    match Netlink::open().step("open a netlink socket") {
        Ok(mut netlink) => {
            // What has vanished and is wanted all the same comes anew.
            now.interfaces.retain(|interface| index_of(&interface.name).is_ok());
            take_away(&mut netlink, &mut now, new, &mut refused);
            add(&mut netlink, &mut now, new, &mut refused);
        }
        Err(error) => refused.0.push(error),
    }
    (now, refused.into_result())
}

/// Takes away what `now` has and `new` has not, against the order in which it was made, but for rules.
fn take_away(netlink: &mut Netlink, now: &mut Network, new: &Network, refused: &mut Refused) {
    remove_others(&mut now.routes, &new.routes, |route| {
        // It went with its interface.
        let Ok(hops) = resolve(&route.next_hops) else { return true };
        refused.is_done(remove(netlink, route_message(Request::removal, route, &hops), "remove a route"))
    });
    for interface in &mut now.interfaces {
        let Ok(index) = index_of(&interface.name) else { continue };
        let wanted = new.interfaces.iter().find(|other| other.name == interface.name);
        remove_others(&mut interface.neighbours, wanted.map_or(&[], |wanted| &wanted.neighbours), |neighbour| {
            let request = neighbour_message(Request::removal, neighbour, index);
            refused.is_done(remove(netlink, request, "remove a neighbour"))
        });
        remove_others(&mut interface.addresses, wanted.map_or(&[], |wanted| &wanted.addresses), |address| {
            refused.is_done(remove(netlink, address_message(Request::removal, address, index), "remove an address"))
        });
    }
    // The devices go next, and take along what is left on them.
    now.interfaces.retain(|interface| new.interfaces.iter().any(|other| other.name == interface.name));
    now.sysctls.retain(|path, _| new.sysctls.contains_key(path));
}

/// Adds what `new` has and `now` has not, and takes away rules.
fn add(netlink: &mut Netlink, now: &mut Network, new: &Network, refused: &mut Refused) {
    // Their names come before their sysctls, which have them in their paths.
    let named = name_interfaces(netlink, &now.interfaces, &new.interfaces, refused);
    now.interfaces.extend(named.into_iter().map(Interface::unraised));
    for (path, value) in in_order(&new.sysctls) {
        if now.sysctls.get(path) != Some(value) && refused.is_done(set_sysctl(path, value)) {
            now.sysctls.insert(path.clone(), value.clone());
        }
    }
    for wanted in &new.interfaces {
        let Some(interface) = now.interfaces.iter_mut().find(|interface| interface.name == wanted.name) else {
            continue;
        };
        let Some(index) = refused.unless(index_of(&wanted.name)) else { continue };
        let settings = (wanted.mtu, wanted.no_arp);
        if (interface.mtu, interface.no_arp) != settings && refused.is_done(raise(netlink, wanted, index)) {
            (interface.mtu, interface.no_arp) = settings;
        }
        add_missing(&mut interface.addresses, &wanted.addresses, |address| {
            refused.is_done(add_address(netlink, wanted, address, index))
        });
        add_missing(&mut interface.neighbours, &wanted.neighbours, |neighbour| {
            refused.is_done(add_neighbour(netlink, wanted, neighbour, index))
        });
    }
    // The kernel takes routes away with the addresses that they prefer, so all are asked for again.
    now.routes.retain(|route| !new.routes.contains(route));
    add_missing(&mut now.routes, &new.routes, |route| add_route(netlink, route).is_ok());
    // It looks for gateways by its rules, of which the namespace may have lost one since it got these routes.
    if new.routes.iter().any(|route| !now.routes.contains(route)) {
        rules::restore(netlink, now, &[], refused);
    }
    add_missing(&mut now.routes, &new.routes, |route| refused.is_done(add_route(netlink, route)));
    rules::exchange(netlink, now, new, refused);
}

/// Removes those of `items` that are not `wanted`, the last first, but for those that `remove` fails at.
fn remove_others<T: PartialEq>(items: &mut Vec<T>, wanted: &[T], mut remove: impl FnMut(&T) -> bool) {
    for at in (0..items.len()).rev() {
        if !wanted.contains(&items[at]) && remove(&items[at]) {
            items.remove(at);
        }
    }
}

/// Adds those of `wanted` that `items` lacks, but for those that `add` fails at.
fn add_missing<T: PartialEq + Clone>(items: &mut Vec<T>, wanted: &[T], mut add: impl FnMut(&T) -> bool) {
    for item in wanted {
        if !items.contains(item) && add(item) {
            items.push(item.clone());
        }
    }
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

/// Finds those of the interfaces that are not `kept` by their addresses, among those that have no name to be kept, and gives
/// them their names; answers those that have theirs then.
fn name_interfaces<'a>(
    netlink: &mut Netlink,
    kept: &[Interface],
    interfaces: &'a [Interface],
    refused: &mut Refused,
) -> Vec<&'a Interface> {
    let is_kept = |name: &str| kept.iter().any(|interface| interface.name == name);
    let present = present(Path::new(INTERFACES)).step("list the interfaces");
    let Some(mut present) = refused.unless(present) else { return Vec::new() };
    present.retain(|(_, name, _)| !is_kept(name));
    let mut found = Vec::new();
    for interface in interfaces.iter().filter(|interface| !is_kept(&interface.name)) {
        match present.iter().position(|(_, _, mac)| *mac == interface.mac) {
            Some(at) => found.push((present.remove(at), interface)),
            None => refused.0.push(Error::NotFound(format!("interface for {}", interface.name))),
        }
    }
    // Two interfaces may want each other's name, so all let go of theirs first.
    found.retain(|((index, name, _), wanted)| {
        *name == wanted.name || refused.is_done(rename(netlink, *index, &format!("hull{index}")))
    });
    found.retain(|((index, name, _), wanted)| {
        *name == wanted.name || refused.is_done(rename(netlink, *index, &wanted.name))
    });
    found.into_iter().map(|(_, interface)| interface).collect()
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

/// The sysctls in an order in which they can be set: some of all interfaces change those of each.
fn in_order(sysctls: &HashMap<String, String>) -> Vec<(&String, &String)> {
    let mut sysctls: Vec<_> = sysctls.iter().collect();
    sysctls.sort_by_key(|(path, _)| (!path.contains("/conf/all/"), *path));
    sysctls
}

/// Sets a sysctl, if there is one; a guest's kernel may have been built without some of what the host's has.
fn set_sysctl(path: &str, value: &str) -> Result<()> {
    match fs::write(Path::new(SYSCTLS).join(path), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            tracing::info!("the kernel has no sysctl net/{path}");
            Ok(())
        }
        result => result.step_with(|| format!("set the sysctl net/{path} to {value:?}")),
    }
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
        let (now, outcome) = update(&Network::default(), &new);
        assert_eq!(outcome.unwrap_err().to_string(), "no such interface for eth7");
        // It is looked for again.
        assert_eq!(now, Network::default());
        assert!(update(&new, &Network::default()).1.is_ok());
        assert!(update(&Network::default(), &Network::default()).1.is_ok());
    }

    #[test]
    fn what_a_step_fails_at_stays_as_it_was() {
        let mut items = vec![1, 2, 3, 4];
        let mut asked = Vec::new();
        remove_others(&mut items, &[2], |item| {
            asked.push(*item);
            *item != 3
        });
        assert_eq!((&items[..], &asked[..]), (&[2, 3][..], &[4, 3, 1][..]));
        add_missing(&mut items, &[2, 5, 6], |item| *item != 5);
        assert_eq!(items, [2, 3, 6]);
    }

    #[test]
    fn all_refusals_are_told_up_to_a_number() {
        let refused = |count: usize| {
            let errors = (0..count).map(|number| Error::failed(format!("step {number}"), "no"));
            Refused(errors.collect()).into_result().unwrap_err().to_string()
        };
        assert_eq!(refused(1), "step 0: no");
        assert_eq!(refused(2), "set up the network: step 0: no; step 1: no");
        assert!(refused(MOST_TOLD + 2).ends_with("; step 7: no; and 2 more"));
    }

    /// Does `work` on a thread with a network and a view of it of its own, where this machine lets it.
    pub(super) fn elsewhere(work: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(|| {
            use nix::sched::CloneFlags;
            use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

            if nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).is_err() {
                eprintln!("skipped: this machine lets nobody make network namespaces");
                return;
            }
            mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).unwrap();
            mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None).unwrap();
            work();
        });
        thread.join().unwrap();
    }

    /// The one interface that any namespace has, with addresses in 192.0.2.0/24.
    pub(super) fn lo(mtu: u32, hosts: &[u8]) -> Interface {
        let address = |host: &u8| {
            let address = [192, 0, 2, *host].into();
            Address { address, prefix_length: 32, peer: None, broadcast: None, scope: 0 }
        };
        Interface { mac: [0; 6], name: "lo".into(), mtu, addresses: hosts.iter().map(address).collect(), ..eth7() }
    }

    /// A route to 198.51.`third`.0/24.
    pub(super) fn route(third: u8, preferred_source: Option<IpAddr>) -> Route {
        let hop = NextHop { interface: "lo".into(), gateway: None, onlink: false, weight: 1 };
        Route {
            family: AF_INET,
            destination: Some([198, 51, third, 0].into()),
            prefix_length: 24,
            source: None,
            source_prefix_length: 0,
            tos: 0,
            table: 254,
            protocol: 3,
            scope: 253,
            kind: 1,
            priority: 0,
            preferred_source,
            next_hops: vec![hop],
            metrics: Vec::new(),
        }
    }

    /// The third bytes of the destinations of the main table's routes.
    pub(super) fn routes_of_the_kernel() -> Vec<u8> {
        let table = fs::read_to_string("/proc/thread-self/net/route").unwrap();
        let destinations = table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1));
        let third = |destination: &str| u8::from_str_radix(&destination[2..4], 16).unwrap();
        let mut found: Vec<u8> = destinations.map(third).collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn what_is_refused_keeps_nothing_else_waiting_and_is_tried_again() {
        elsewhere(|| {
            // An MTU that no kernel takes, and a route from an address that is not there.
            let routes = vec![route(1, None), route(2, Some([192, 0, 2, 9].into())), route(3, None)];
            let missing = Interface { name: "eth7".into(), ..eth7() };
            let interfaces = vec![missing, lo(u32::MAX, &[7])];
            let sysctls = [("ipv4/ip_forward".to_owned(), "1".to_owned())].into();
            let wanted = Network { interfaces, routes, sysctls, ..Network::default() };
            // An interface that is down takes no routes; this one is up already.
            set_up(&Network { interfaces: vec![lo(65_536, &[])], ..Network::default() }).unwrap();
            let (now, outcome) = update(&Network::default(), &wanted);
            let told = outcome.unwrap_err().to_string();
            for step in ["no such interface for eth7", "bring up lo", "add the route to 198.51.2.0/24"] {
                assert!(told.contains(step), "{step} is not in {told}");
            }
            assert_eq!((routes_of_the_kernel(), now.routes.len()), (vec![1, 3], 2));
            assert_eq!((now.interfaces.len(), now.interfaces[0].mtu, &now.sysctls), (1, 0, &wanted.sysctls));

            // With the next change what was refused is taken, and what went goes.
            let interfaces = vec![lo(1400, &[7, 9])];
            let routes = wanted.routes[1..].to_vec();
            let wanted = Network { interfaces, routes, ..Network::default() };
            let (now, outcome) = update(&now, &wanted);
            outcome.unwrap();
            assert_eq!(routes_of_the_kernel(), [2, 3]);
            assert_eq!(fs::read_to_string("/sys/class/net/lo/mtu").unwrap(), "1400\n");
            assert_eq!((now.routes.len(), now.interfaces), (2, wanted.interfaces));
        });
    }

    #[test]
    fn the_loopback_interface_gets_addresses_beside_its_own() {
        elsewhere(|| {
            let is_local = |address: &str| std::net::UdpSocket::bind((address, 0)).is_ok();
            let of_ipv6 = Address {
                address: "2001:db8::7".parse().unwrap(),
                prefix_length: 128,
                peer: None,
                broadcast: None,
                scope: 0,
            };
            let mut wanted = lo(65_536, &[7]);
            wanted.addresses[0].prefix_length = 24;
            wanted.addresses.push(of_ipv6);
            let range = |destination: [u8; 4], source| {
                let destination = Some(destination.into());
                Route { destination, table: 255, scope: 254, kind: 2, ..route(0, source) }
            };
            // The one that follows from that prefix on a host, and one without an address.
            let routes = vec![range([192, 0, 2, 0], Some([192, 0, 2, 7].into())), range([198, 51, 100, 0], None)];
            let network = Network { interfaces: vec![wanted], routes, ..Network::default() };
            let before = Network { interfaces: vec![lo(65_536, &[])], ..Network::default() };
            set_up(&before).unwrap();
            let all = ["192.0.2.7", "192.0.2.200", "198.51.100.1", "2001:db8::7"];
            let (now, outcome) = update(&before, &network);
            outcome.unwrap();
            assert_eq!(all.map(is_local), [true; 4]);
            let (_, outcome) = update(&now, &before);
            outcome.unwrap();
            assert_eq!(all.map(is_local), [false; 4]);
            assert!(is_local("127.0.0.1") && is_local("127.8.8.8") && is_local("::1"));
        });
    }

    #[test]
    fn sysctls_of_all_interfaces_leave_those_of_one_alone() {
        elsewhere(|| {
            let value =
                |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6")).unwrap();
            let path = |name: &str| format!("ipv6/conf/{name}/disable_ipv6");
            // A map has its entries in another order each time.
            for (all, one) in [("0", "1"), ("1", "0")].repeat(8) {
                let sysctls = [(path("all"), all.to_owned()), (path("lo"), one.to_owned())].into();
                set_up(&Network { sysctls, ..Network::default() }).unwrap();
                assert_eq!((value("all").trim(), value("lo").trim()), (all, one));
            }
        });
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
