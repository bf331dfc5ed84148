//! Traffic between an interface and the tap beside it, by traffic control: what arrives at one leaves by the other
//! (`tc qdisc add dev X ingress; tc filter add dev X ingress u32 match u32 0 0 action mirred egress redirect dev Y`, both
//! ways). The classifier u32 is older than `matchall`, and every kernel with traffic control has it.
//!
//! The filters carry a mark of Hull's, by which they are known again after their owner died. A filter whose tap has gone
//! still swallows all that arrives, until it is removed.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
    TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};

use super::netlink::Netlink;

/// The qdisc whose filters see what arrives.
const INGRESS: &str = "ingress";
/// Its handle, and where its filters hang. The same place is there if somebody has put a `clsact` qdisc instead.
const HANDLE: TcHandle = TcHandle { major: 0xffff, minor: 0 };
const FILTERS: TcHandle = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };
/// Behind filters that others put there, such as policies of a CNI plugin: theirs have smaller numbers by default.
const PRIORITY: u16 = 0xf000;
/// All protocols.
const ETH_P_ALL: u16 = 3;
/// The mark on the filters' actions.
const COOKIE: &[u8] = b"hull";

/// What is there of Hull's at an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing.
    Nothing,
    /// A filter that leads to an interface that exists.
    Live,
    /// A filter that leads nowhere any more.
    Stale,
}

/// Sends what arrives at the interface `from` out by the interface `to`.
pub(super) fn add(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    let made = match netlink.call(RouteNetlinkMessage::NewQueueDiscipline(qdisc(from)), NLM_F_CREATE | NLM_F_EXCL) {
        // Somebody else's serves as well.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        result => result.map(|()| true)?,
    };
    let added = netlink.call(RouteNetlinkMessage::NewTrafficFilter(filter(from, to)), NLM_F_CREATE | NLM_F_EXCL);
    if added.is_err() && made {
        // Without a filter nobody would know whose it is. The first error is the one to tell of.
        let _ = netlink.call(RouteNetlinkMessage::DelQueueDiscipline(qdisc(from)), 0);
    }
    added
}

/// Takes back what [`add`] did at the interface `from`. That there is nothing is no error.
pub(super) fn remove(netlink: &mut Netlink, from: u32) -> io::Result<()> {
    let filters = filters(netlink, from)?;
    if !filters.iter().any(|filter| destination(filter).is_some()) {
        return Ok(());
    }
    // The kernel lists a filter several times: itself, its table, its chain.
    let others = filters.iter().any(|filter| filter.header.info >> 16 != u32::from(PRIORITY));
    let request = if others || kind_of_qdisc(netlink, from)?.as_deref() != Some(INGRESS) {
        let mut filter = TcMessage::with_index(from.cast_signed());
        filter.header.parent = FILTERS;
        filter.header.info = info();
        RouteNetlinkMessage::DelTrafficFilter(filter)
    } else {
        RouteNetlinkMessage::DelQueueDiscipline(qdisc(from))
    };
    netlink.call(request, 0)
}

/// Looks for a filter of Hull's at the interface `from`.
pub(super) fn look(netlink: &mut Netlink, from: u32) -> io::Result<Found> {
    Ok(match filters(netlink, from)?.iter().find_map(destination) {
        None => Found::Nothing,
        Some(0) => Found::Stale,
        Some(_) => Found::Live,
    })
}

/// The filters on what arrives at an interface.
fn filters(netlink: &mut Netlink, index: u32) -> io::Result<Vec<TcMessage>> {
    let mut request = TcMessage::with_index(index.cast_signed());
    request.header.parent = FILTERS;
    let list = match netlink.dump(&RouteNetlinkMessage::GetTrafficFilter(request)) {
        // Without a qdisc the kernel ends the list with one of these, or as an empty one, by its version.
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotFound) => Vec::new(),
        list => list?,
    };
    Ok(list
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewTrafficFilter(filter) => Some(filter),
            _ => None,
        })
        .collect())
}

/// Where a filter leads if it is one of Hull's: 0 for an interface that has gone.
fn destination(filter: &TcMessage) -> Option<u32> {
    let options = filter.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let actions = options.flatten().filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    });
    let ours = |action: &&TcAction| action.attributes.contains(&TcActionAttribute::Cookie(COOKIE.to_vec()));
    let attributes = actions.flatten().find(ours)?.attributes.iter();
    attributes
        .filter_map(|attribute| match attribute {
            TcActionAttribute::Options(options) => Some(options),
            _ => None,
        })
        .flatten()
        .find_map(|option| match option {
            TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => Some(mirror.ifindex),
            _ => None,
        })
}

/// The kind of the qdisc that sees what arrives.
pub(super) fn kind_of_qdisc(netlink: &mut Netlink, index: u32) -> io::Result<Option<String>> {
    let list = netlink.dump(&RouteNetlinkMessage::GetQueueDiscipline(TcMessage::with_index(index.cast_signed())))?;
    Ok(list.into_iter().find_map(|message| match message {
        RouteNetlinkMessage::NewQueueDiscipline(qdisc)
            if qdisc.header.index == index.cast_signed() && qdisc.header.parent == TcHandle::INGRESS =>
        {
            qdisc.attributes.into_iter().find_map(|attribute| match attribute {
                TcAttribute::Kind(kind) => Some(kind),
                _ => None,
            })
        }
        _ => None,
    }))
}

fn qdisc(index: u32) -> TcMessage {
    let mut qdisc = TcMessage::with_index(index.cast_signed());
    qdisc.header.handle = HANDLE;
    qdisc.header.parent = TcHandle::INGRESS;
    qdisc.attributes.push(TcAttribute::Kind(INGRESS.to_owned()));
    qdisc
}

/// Priority and protocol as one number, the latter in network order.
fn info() -> u32 {
    u32::from(PRIORITY) << 16 | u32::from(ETH_P_ALL.to_be())
}

fn filter(from: u32, to: u32) -> TcMessage {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Cookie(COOKIE.to_vec()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut filter = TcMessage::with_index(from.cast_signed());
    filter.header.parent = FILTERS;
    filter.header.info = info();
    // One key, whose mask leaves nothing to compare.
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    filter.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    filter
}

/// Gives a tap another MTU, that of the interface beside it.
pub(super) fn resize(netlink: &mut Netlink, tap: u32, mtu: u32) -> io::Result<()> {
    let mut change = LinkMessage::default();
    change.header.index = tap;
    change.attributes.push(LinkAttribute::Mtu(mtu));
    netlink.call(RouteNetlinkMessage::SetLink(change), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_known_again_by_its_mark() {
        assert_eq!(destination(&filter(3, 7)), Some(7));
        assert_eq!(destination(&qdisc(3)), None);
        let mut others = filter(3, 7);
        others.attributes.retain(|attribute| matches!(attribute, TcAttribute::Kind(_)));
        assert_eq!(destination(&others), None);
    }
}
