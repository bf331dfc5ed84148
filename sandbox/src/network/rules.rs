//! Routing rules (`ip rule`) of a namespace.

use std::io;

use hull_protocol::agent as wire;
use netlink_packet_core::Nla;
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::Netlink;

/// The rules that every namespace has: priority and table. The guest has them already.
const OWN: [(u32, u32); 3] = [(0, 255), (32_766, 254), (32_767, 253)];

/// The rules beyond those that every namespace has.
pub(super) fn describe(netlink: &mut Netlink) -> io::Result<Vec<wire::Rule>> {
    let mut rules = Vec::new();
    for message in netlink.dump(&RouteNetlinkMessage::GetRule(RuleMessage::default()))? {
        if let RouteNetlinkMessage::NewRule(message) = message {
            rules.extend(rule(&message));
        }
    }
    Ok(rules)
}

fn rule(message: &RuleMessage) -> Option<wire::Rule> {
    let header = &message.header;
    let family = match header.family {
        AddressFamily::Inet => 2,
        AddressFamily::Inet6 => 10,
        // Those for multicast routing, which the guest has no use for.
        _ => return None,
    };
    let (mut priority, mut table) = (0, u32::from(header.table));
    let mut attributes = std::collections::HashMap::new();
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Table(number) => table = *number,
            _ => {}
        }
        let mut value = vec![0; attribute.value_len()];
        attribute.emit_value(&mut value);
        attributes.insert(u32::from(attribute.kind()), value);
    }
    if OWN.contains(&(priority, table)) {
        return None;
    }
    Some(wire::Rule {
        family,
        destination_prefix_length: header.dst_len.into(),
        source_prefix_length: header.src_len.into(),
        tos: header.tos.into(),
        action: u8::from(header.action).into(),
        flags: header.flags.bits(),
        attributes,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_ones_own_keep_all_that_they_say() {
        let mut message = RuleMessage::default();
        message.header.family = AddressFamily::Inet;
        message.attributes = vec![RuleAttribute::Priority(100), RuleAttribute::Table(77)];
        let rule = rule(&message).unwrap();
        // FRA_PRIORITY and FRA_TABLE.
        assert_eq!(rule.attributes[&6], 100_u32.to_ne_bytes());
        assert_eq!(rule.attributes[&15], 77_u32.to_ne_bytes());
    }

    #[test]
    fn rules_that_every_namespace_has_are_left_out() {
        let mut message = RuleMessage::default();
        message.header.family = AddressFamily::Inet6;
        message.attributes = vec![RuleAttribute::Priority(32_766), RuleAttribute::Table(254)];
        assert!(rule(&message).is_none());
        // The first has no priority at all.
        message.attributes = vec![RuleAttribute::Table(255)];
        assert!(rule(&message).is_none());
    }
}
