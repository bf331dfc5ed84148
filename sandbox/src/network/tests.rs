//! Namespaces of the tests' own, where the machine lets them make some; others say that they skip.

use std::sync::mpsc;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};

use super::attachment::{MAX_INTERFACES, chosen};
use super::describe::{self, Link};
use super::redirect::{self, Found};
use super::*;

pub(super) fn link(index: u32, name: &str) -> Link {
    Link {
        index,
        name: name.to_owned(),
        mac: vec![2, 0, 0, 0, 0, 1],
        mtu: 1500,
        is_ethernet: true,
        is_up: true,
        is_loopback: false,
        has_carrier: true,
        no_arp: false,
        controller: None,
        lower: None,
    }
}

fn take_at(path: &Path, queues: usize, dir: &Path) -> Result<Attachment, NetworkError> {
    attach(&Network::Namespace(path.to_owned()), "test", queues, dir).map(Option::unwrap)
}

#[test]
fn what_is_down_or_belongs_to_a_bridge_is_not_taken() {
    let links = [
        Link { is_loopback: true, ..link(1, "lo") },
        Link { is_up: false, is_ethernet: false, ..link(2, "tunl0") },
        Link { controller: Some(4), ..link(3, "port") },
        link(4, "br0"),
        // Its number is that of an interface elsewhere.
        Link { lower: Some(77), ..link(5, "eth0") },
    ];
    let names: Vec<_> = chosen(&links).unwrap().into_iter().map(|link| link.name).collect();
    assert_eq!(names, ["br0", "eth0"]);
}

#[test]
fn what_cannot_be_taken_is_named() {
    let tunnel = Link { is_ethernet: false, ..link(2, "wg0") };
    assert!(chosen(&[tunnel]).unwrap_err().to_string().starts_with("interface wg0: it is not an Ethernet"));
    let vlan = Link { lower: Some(2), ..link(3, "eth0.5") };
    assert!(chosen(&[link(2, "eth0"), vlan]).unwrap_err().to_string().starts_with("interface eth0.5: "));
    let many: Vec<Link> = (1..=17).map(|index| link(index, "x")).collect();
    assert!(matches!(chosen(&many), Err(NetworkError::TooMany { found: 17, most: MAX_INTERFACES })));
}

#[test]
fn the_callers_own_network_is_never_taken() {
    let dir = tempfile::tempdir().unwrap();
    let error = take_at(Path::new("/proc/self/ns/net"), 1, dir.path()).unwrap_err();
    assert!(matches!(error, NetworkError::Host(_)), "{error}");
    let error = take_at(Path::new("/no/such/namespace"), 1, dir.path()).unwrap_err();
    assert!(error.to_string().starts_with("cannot open the network namespace /no/such/namespace"), "{error}");
    assert!(matches!(take_at(Path::new("/dev/null"), 1, dir.path()), Err(NetworkError::Enter { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_sweep_of_nothing_does_nothing() {
    let dir = tempfile::tempdir().unwrap();
    sweep(dir.path());
    std::fs::write(dir.path().join(NOTE), "{}").unwrap();
    sweep(dir.path());
}

/// A namespace that lives as long as its thread.
pub(super) struct Namespace {
    pub(super) path: PathBuf,
    pub(super) netlink: Netlink,
    /// Closed to end the thread.
    _end: mpsc::Sender<()>,
}

impl Namespace {
    /// One with `eth0` (10.9.0.2/24, a default route) and its other end `peer`, both up.
    pub(super) fn new() -> Option<Self> {
        let (ready, wait) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            let made = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_ok();
            let id = rustix::thread::gettid();
            let _ = ready.send(made.then(|| (id, Netlink::open().unwrap())));
            let _ = ended.recv();
        });
        let Some((id, netlink)) = wait.recv().unwrap() else {
            eprintln!("skipped: this machine lets nobody make network namespaces");
            return None;
        };
        let path = PathBuf::from(format!("/proc/self/task/{}/ns/net", id.as_raw_nonzero()));
        let mut namespace = Self { path, netlink, _end: end };
        namespace.furnish();
        Some(namespace)
    }

    fn furnish(&mut self) {
        let mut peer = LinkMessage::default();
        peer.attributes.push(LinkAttribute::IfName("peer".into()));
        let mut veth = LinkMessage::default();
        veth.attributes = vec![
            LinkAttribute::IfName("eth0".into()),
            LinkAttribute::Mtu(1450),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        self.make(RouteNetlinkMessage::NewLink(veth));
        self.set_up("peer", true);
        self.set_up("eth0", true);
        self.add_address("eth0", [10, 9, 0, 2]);
        let index = self.index("eth0").unwrap();
        let mut route = RouteMessage::default();
        route.header.address_family = AddressFamily::Inet;
        route.header.table = 254;
        route.header.protocol = RouteProtocol::Boot;
        route.header.scope = RouteScope::Universe;
        route.header.kind = RouteType::Unicast;
        route.attributes =
            vec![RouteAttribute::Gateway(RouteAddress::Inet([10, 9, 0, 1].into())), RouteAttribute::Oif(index)];
        self.make(RouteNetlinkMessage::NewRoute(route));
    }

    /// Gives an interface an address of a network of 256.
    fn add_address(&mut self, interface: &str, own: [u8; 4]) {
        let mut address = AddressMessage::default();
        address.header.family = AddressFamily::Inet;
        address.header.prefix_len = 24;
        address.header.index = self.index(interface).unwrap();
        address.attributes = vec![AddressAttribute::Local(own.into())];
        self.make(RouteNetlinkMessage::NewAddress(address));
    }

    fn make(&mut self, message: RouteNetlinkMessage) {
        self.netlink.call(message, NLM_F_CREATE | NLM_F_EXCL).unwrap();
    }

    pub(super) fn index(&mut self, name: &str) -> Option<u32> {
        describe::links(&mut self.netlink).unwrap().into_iter().find(|link| link.name == name).map(|link| link.index)
    }

    fn set_up(&mut self, name: &str, up: bool) {
        let mut link = LinkMessage::default();
        link.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        link.header.index = self.index(name).unwrap();
        link.header.change_mask = LinkFlags::Up;
        self.netlink.call(RouteNetlinkMessage::SetLink(link), 0).unwrap();
    }

    /// Whether a filter of Hull's is at `eth0`, and where it leads.
    pub(super) fn found(&mut self) -> Found {
        let index = self.index("eth0").unwrap();
        redirect::look(&mut self.netlink, index).unwrap()
    }

    fn has_qdisc(&mut self) -> bool {
        let index = self.index("eth0").unwrap();
        redirect::kind_of_qdisc(&mut self.netlink, index).unwrap().is_some()
    }
}

/// Brings up the loopback interface of the calling thread's namespace.
pub(super) fn raise_loopback() {
    let mut lo = LinkMessage::default();
    lo.header.index = LOOPBACK_INDEX;
    lo.header.flags = LinkFlags::Up;
    lo.header.change_mask = LinkFlags::Up;
    Netlink::open().unwrap().call(RouteNetlinkMessage::SetLink(lo), 0).unwrap();
}

/// A namespace whose one interface to take is `eth0`.
pub(super) fn namespace() -> Option<Namespace> {
    let mut namespace = Namespace::new()?;
    // The other end, which is in the host's namespace in real life.
    namespace.set_up("peer", false);
    Some(namespace)
}

#[test]
fn an_interface_is_described_and_joined_to_a_tap() {
    let Some(mut namespace) = Namespace::new() else { return };
    let links = describe::links(&mut namespace.netlink).unwrap();
    let eth0 = links.iter().find(|link| link.name == "eth0").unwrap().clone();
    let network = describe::describe(&mut namespace.netlink, std::slice::from_ref(&eth0)).unwrap();
    assert_eq!((network.interfaces[0].mtu, &network.interfaces[0].mac), (1450, &eth0.mac));
    let address = &network.interfaces[0].addresses[0];
    assert_eq!((&address.address[..], address.prefix_length, address.scope), (&[10, 9, 0, 2][..], 24, 0));
    let routes: Vec<_> = network.routes.iter().filter(|route| route.family == 2).collect();
    assert_eq!((&routes[0].destination[..], routes[0].prefix_length), (&[10, 9, 0, 0][..], 24));
    assert_eq!(routes[1].next_hops[0].gateway, [10, 9, 0, 1]);
    assert_eq!(routes.len(), 2);
}

#[test]
fn the_loopback_interface_is_described_with_what_it_has_beyond_any() {
    let Some(mut namespace) = namespace() else { return };
    let dir = tempfile::tempdir().unwrap();
    namespace.add_address("lo", [10, 96, 0, 10]);
    // While it is down it has none that anybody reaches.
    let attachment = take_at(&namespace.path, 1, dir.path()).unwrap();
    assert_eq!(attachment.description().interfaces.len(), 1);
    drop(attachment);
    namespace.set_up("lo", true);
    let attachment = take_at(&namespace.path, 1, dir.path()).unwrap();
    let wire::Network { interfaces, routes, sysctls, .. } = attachment.description();
    let [eth0, lo] = &interfaces[..] else { panic!("{interfaces:?}") };
    assert_eq!((&eth0.name[..], &lo.name[..], lo.mtu, &lo.mac[..]), ("eth0", "lo", 65_536, &[0; 6][..]));
    let addresses: Vec<_> = lo.addresses.iter().map(|own| (&own.address[..], own.prefix_length, own.scope)).collect();
    assert_eq!(addresses, [(&[10, 96, 0, 10][..], 24, 0)]);
    // What its prefix makes the namespace's own, and nothing else of the table `local`.
    let ranges: Vec<_> = routes.iter().filter(|route| route.family == 2 && route.table == 255).collect();
    assert_eq!((ranges.len(), &ranges[0].destination[..], ranges[0].type_), (1, &[10, 96, 0, 0][..], 2));
    assert_eq!(ranges[0].next_hops[0].interface, "lo");
    assert!(sysctls.contains_key("ipv4/conf/lo/arp_ignore") && !sysctls.contains_key("ipv6/conf/lo/addr_gen_mode"));
    assert_eq!(attachment.addresses(), [IpAddr::from([10, 9, 0, 2])]);
}

#[test]
fn what_was_done_is_undone() {
    let Some(mut namespace) = namespace() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut attachment = take_at(&namespace.path, 2, dir.path()).unwrap();
    assert_eq!(namespace.found(), Found::Live);
    let taps = attachment.take_ends();
    assert_eq!((taps.len(), taps[0].queues.len(), taps[0].mtu), (1, 2, Some(1450)));
    assert!(attachment.description().sysctls.contains_key("ipv4/conf/eth0/rp_filter"));
    assert!(matches!(take_at(&namespace.path, 1, dir.path()), Err(NetworkError::Taken(name)) if name == "eth0"));
    assert!(namespace.index("hull0").is_some());
    drop(attachment);
    assert!(!namespace.has_qdisc());
    assert!(!dir.path().join(NOTE).exists());
    drop(taps);
    assert_eq!(namespace.index("hull0"), None);
}

#[test]
fn a_dead_owners_filter_is_swept() {
    let Some(mut namespace) = namespace() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut attachment = take_at(&namespace.path, 1, dir.path()).unwrap();
    drop(attachment.take_ends());
    // As if killed: nothing of it runs.
    std::mem::forget(attachment);
    assert_eq!(namespace.found(), Found::Stale);
    sweep(dir.path());
    assert!(!namespace.has_qdisc());
}

#[test]
fn the_next_sandbox_removes_what_a_dead_one_left() {
    let Some(mut namespace) = namespace() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut attachment = take_at(&namespace.path, 1, dir.path()).unwrap();
    drop(attachment.take_ends());
    std::mem::forget(attachment);
    let attachment = take_at(&namespace.path, 1, dir.path()).unwrap();
    assert_eq!(namespace.found(), Found::Live);
    drop(attachment);
    assert!(!namespace.has_qdisc());
}

#[test]
fn an_interface_that_vanishes_while_it_is_taken_is_named_and_leaves_nothing() {
    let Some(mut namespace) = namespace() else { return };
    let dir = tempfile::tempdir().unwrap();
    let note = dir.path().join(NOTE);
    let place = Place::new(&namespace.path, open(&namespace.path).unwrap(), 1, note.clone(), Some((0, 0)));
    let error = place.join(&link(9999, "gone0"), "net0".to_owned()).unwrap_err().to_string();
    assert!(error.starts_with("interface gone0: cannot ") && error.contains("it vanished"), "{error}");
    assert_eq!(namespace.index("hull0"), None);
    assert_eq!(noted(&note), [0; 0]);
}

/// The interfaces in a note.
pub(super) fn noted(note: &Path) -> Vec<u32> {
    serde_json::from_slice::<Note>(&std::fs::read(note).unwrap()).unwrap().redirected.unwrap().interfaces
}
