//! Routing rules (`ip rule`) of a namespace.

use std::collections::HashMap;
use std::io;

use hull_protocol::agent as wire;
use netlink_packet_core::Nla;
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use super::netlink::Netlink;

/// The rules that the kernel gives every namespace: priority and table. IPv6 has the first two.
const OWN: [(u32, u32); 3] = [(0, 255), (32_766, 254), (32_767, 253)];

/// Families of addresses, and the rules that the kernel gives each. Rules for multicast routing have families of their own,
/// which the guest has no use for.
const FAMILIES: [(AddressFamily, &[(u32, u32)]); 2] =
    [(AddressFamily::Inet, &OWN), (AddressFamily::Inet6, OWN.split_at(2).0)];

// Attributes of rules (`<linux/fib_rules.h>`).
const FRA_PRIORITY: u32 = 6;
const FRA_TABLE: u32 = 15;
const FRA_PROTOCOL: u32 = 21;

/// The rules of a namespace, as they differ from those that the kernel gives every one.
#[derive(Debug, Default)]
pub(super) struct Rules {
    pub(super) added: Vec<wire::Rule>,
    /// Those that the kernel gave it and it has not any more.
    pub(super) missing: Vec<wire::Rule>,
}

pub(super) fn describe(netlink: &mut Netlink) -> io::Result<Rules> {
    let mut rules = Rules::default();
    for (family, own) in FAMILIES {
        // A kernel without IPv6, or without rules, is one thing; a namespace that has none left another.
        let Some(messages) = list(netlink, family)? else { continue };
        let mut missing = own.to_vec();
        for message in messages {
            match missing.iter().position(|own| is_own(&message, *own)) {
                Some(at) => drop(missing.remove(at)),
                None => rules.added.push(rule(&message)),
            }
        }
        rules.missing.extend(missing.into_iter().map(|own| own_rule(family, own)));
    }
    Ok(rules)
}

/// The rules of a family, in their order; None where the kernel knows of no rules for it.
fn list(netlink: &mut Netlink, family: AddressFamily) -> io::Result<Option<Vec<RuleMessage>>> {
    let mut request = RuleMessage::default();
    request.header.family = family;
    let list = match netlink.dump(&RouteNetlinkMessage::GetRule(request)) {
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::AFNOSUPPORT | Errno::OPNOTSUPP)) => {
            return Ok(None);
        }
        list => list?,
    };
    let rule = |message| match message {
        RouteNetlinkMessage::NewRule(rule) => Some(rule),
        _ => None,
    };
    Ok(Some(list.into_iter().filter_map(rule).collect()))
}

/// Whether a rule is this one of the kernel's own. One of the same effect that somebody made is not: it says who made it,
/// and has its own place among others of its priority.
fn is_own(message: &RuleMessage, own: (u32, u32)) -> bool {
    let header = &message.header;
    let (mut priority, mut table, mut is_kernels) = (0, u32::from(header.table), false);
    for attribute in &message.attributes {
        match attribute {
            // The first has none.
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Protocol(protocol) => is_kernels = *protocol == RouteProtocol::Kernel,
            _ => {}
        }
    }
    is_kernels && header.action == RuleAction::ToTable && (priority, table) == own
}

fn own_rule(family: AddressFamily, (priority, table): (u32, u32)) -> wire::Rule {
    let attributes = [
        (FRA_PRIORITY, priority.to_ne_bytes().to_vec()),
        (FRA_TABLE, table.to_ne_bytes().to_vec()),
        // By which the guest's kernel tells it from others of the same priority.
        (FRA_PROTOCOL, vec![RouteProtocol::Kernel.into()]),
    ];
    let action = u8::from(RuleAction::ToTable).into();
    wire::Rule { family: u8::from(family).into(), action, attributes: attributes.into(), ..Default::default() }
}

fn rule(message: &RuleMessage) -> wire::Rule {
    let header = &message.header;
    let value = |attribute: &RuleAttribute| {
        let mut value = vec![0; attribute.value_len()];
        attribute.emit_value(&mut value);
        (u32::from(attribute.kind()), value)
    };
    let mut attributes: HashMap<_, _> = message.attributes.iter().map(value).collect();
    // The kernel lists no 0, and would find a place of its own for a rule that came without.
    attributes.entry(FRA_PRIORITY).or_insert_with(|| 0_u32.to_ne_bytes().to_vec());
    wire::Rule {
        family: u8::from(header.family).into(),
        destination_prefix_length: header.dst_len.into(),
        source_prefix_length: header.src_len.into(),
        tos: header.tos.into(),
        action: u8::from(header.action).into(),
        flags: header.flags.bits(),
        attributes,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};

    use super::super::tests::Namespace;
    use super::*;

    fn message(priority: u32, table: u32, protocol: RouteProtocol) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.action = RuleAction::ToTable;
        message.attributes =
            vec![RuleAttribute::Priority(priority), RuleAttribute::Table(table), RuleAttribute::Protocol(protocol)];
        message
    }

    #[test]
    fn rules_of_ones_own_keep_all_that_they_say() {
        let rule = rule(&message(100, 77, RouteProtocol::Boot));
        assert_eq!(rule.attributes[&FRA_PRIORITY], 100_u32.to_ne_bytes());
        assert_eq!(rule.attributes[&FRA_TABLE], 77_u32.to_ne_bytes());
        assert_eq!(rule.attributes[&FRA_PROTOCOL], [3]);
    }

    #[test]
    fn rules_that_every_namespace_has_are_told_by_who_made_them() {
        assert!(is_own(&message(32_766, 254, RouteProtocol::Kernel), OWN[1]));
        assert!(!is_own(&message(32_766, 254, RouteProtocol::Boot), OWN[1]));
        assert!(!is_own(&message(0, 254, RouteProtocol::Kernel), OWN[1]));
        // The first has no priority at all.
        let mut first = message(0, 255, RouteProtocol::Kernel);
        first.attributes.remove(0);
        assert!(is_own(&first, OWN[0]));
        first.header.action = RuleAction::Unreachable;
        assert!(!is_own(&first, OWN[0]));
    }

    #[test]
    fn a_kernel_without_rules_for_a_family_has_none_to_miss() {
        let mut netlink = Netlink::open().unwrap();
        assert!(list(&mut netlink, AddressFamily::Inet).unwrap().is_some());
        // One whose addresses nobody routes to.
        assert!(list(&mut netlink, AddressFamily::Alg).unwrap().is_none());
    }

    /// Priority and table of rules of IPv4, and of IPv6.
    fn seen(rules: &[wire::Rule]) -> [Vec<(u32, u32)>; 2] {
        let number = |value: &Vec<u8>| u32::from_ne_bytes(value[..].try_into().unwrap());
        let of_family = |family| {
            let rules = rules.iter().filter(|rule| rule.family == family).map(|rule| &rule.attributes);
            rules.map(|rule| (number(&rule[&FRA_PRIORITY]), number(&rule[&FRA_TABLE]))).collect()
        };
        [2, 10].map(of_family)
    }

    #[test]
    fn what_a_namespace_misses_of_the_kernels_rules_is_described() {
        let Some(mut namespace) = Namespace::new() else { return };
        let mut look = |change: Option<RouteNetlinkMessage>, flags| {
            change.into_iter().for_each(|change| namespace.netlink.call(change, flags).unwrap());
            let Rules { added, missing } = describe(&mut namespace.netlink).unwrap();
            (seen(&added), seen(&missing))
        };
        assert_eq!(look(None, 0), ([vec![], vec![]], [vec![], vec![]]));
        let moved = message(100, 255, RouteProtocol::Boot);
        look(Some(RouteNetlinkMessage::NewRule(moved)), NLM_F_CREATE | NLM_F_EXCL);
        let first = message(0, 255, RouteProtocol::Kernel);
        let found = look(Some(RouteNetlinkMessage::DelRule(first)), 0);
        assert_eq!(found, ([vec![(100, 255)], vec![]], [vec![(0, 255)], vec![]]));
        let mut second = message(32_766, 254, RouteProtocol::Kernel);
        second.header.family = AddressFamily::Inet6;
        let found = look(Some(RouteNetlinkMessage::DelRule(second)), 0);
        assert_eq!(found, ([vec![(100, 255)], vec![]], [vec![(0, 255)], vec![(32_766, 254)]]));
        // Back, by hand: where it was, but not the kernel's.
        let back = message(0, 255, RouteProtocol::Boot);
        let found = look(Some(RouteNetlinkMessage::NewRule(back)), NLM_F_CREATE | NLM_F_EXCL);
        assert_eq!(found.0[0], [(0, 255), (100, 255)]);
    }
}
