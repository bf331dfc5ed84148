//! Routing rules.
//!
//! A guest's packets are at the mercy of its rules at any time, so a change never takes away before it has given: first
//! come rules, then those go that they stand in for, and of the kernel's own the guest does without any only once all
//! others are there.

use std::io;

use super::netlink::{Kind, Netlink, Request};
use super::{Action, Network, Refused, Rule, add_missing, remove, remove_others};
use crate::error::{Result, Step};

/// Makes the rules of `now` into those of `new`.
pub(super) fn exchange(netlink: &mut Netlink, now: &mut Network, new: &Network, refused: &mut Refused) {
    restore(netlink, now, &new.missing_rules, refused);
    // One that the kernel cannot tell from one that goes, such as a `goto` with another target, has to wait for that.
    add_missing(&mut now.rules, &new.rules, |rule| netlink.call(message(Request::new, rule)).is_ok());
    // Somebody's rule that looks like one of the kernel's own comes behind it, and the first of such goes first.
    remove_own(netlink, now, new, refused);
    remove_others(&mut now.rules, &new.rules, |rule| refused.is_done(take_away(netlink, rule)));
    add_missing(&mut now.rules, &new.rules, |rule| refused.is_done(add(netlink, rule)));
    remove_own(netlink, now, new, refused);
}

/// Gives the guest those of the kernel's own back that are not among `missing`.
pub(super) fn restore(netlink: &mut Netlink, now: &mut Network, missing: &[Rule], refused: &mut Refused) {
    remove_others(&mut now.missing_rules, missing, |own| refused.is_done(add(netlink, own)));
}

/// Removes what the guest is to do without of the kernel's own, if all others are there.
fn remove_own(netlink: &mut Netlink, now: &mut Network, new: &Network, refused: &mut Refused) {
    if new.rules.iter().all(|rule| now.rules.contains(rule)) {
        add_missing(&mut now.missing_rules, &new.missing_rules, |own| refused.is_done(take_away(netlink, own)));
    }
}

fn add(netlink: &mut Netlink, rule: &Rule) -> Result<()> {
    match netlink.call(message(Request::new, rule)) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.step("add a routing rule"),
    }
}

fn take_away(netlink: &mut Netlink, rule: &Rule) -> Result<()> {
    remove(netlink, message(Request::removal, rule), "remove a routing rule")
}

/// `struct fib_rule_hdr`: family, prefix lengths of destination and source, type of service, table, action, flags.
fn message(action: Action, rule: &Rule) -> Request {
    let (family, lengths) = (rule.family, [rule.destination_prefix_length, rule.source_prefix_length]);
    // The table is an attribute; behind it two bytes without a meaning.
    let mut body = vec![family, lengths[0], lengths[1], rule.tos, 0, 0, 0, rule.action];
    body.extend(rule.flags.to_ne_bytes());
    let add = |request: Request, (kind, value): &(u16, Vec<u8>)| request.with(*kind, value);
    rule.attributes.iter().fold(action(Kind::Rule, &body), add)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::net::netlink::SocketAddrNetlink;
    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

    use super::super::tests::{elsewhere, lo, route, routes_of_the_kernel};
    use super::super::{AF_INET, AF_INET6, NextHop, Route, set_up, update};
    use super::*;

    const FRA_GOTO: u16 = 4;
    const FRA_PRIORITY: u16 = 6;
    const FRA_TABLE: u16 = 15;
    const FRA_PROTOCOL: u16 = 21;
    const FR_ACT_TO_TBL: u8 = 1;
    const FR_ACT_GOTO: u8 = 2;
    const BOOT: u8 = 3;
    const KERNEL: u8 = 2;

    fn rule(family: u8, priority: u32, action: u8, target: (u16, u32), maker: u8) -> Rule {
        let attributes = vec![
            (FRA_PRIORITY, priority.to_ne_bytes().to_vec()),
            (target.0, target.1.to_ne_bytes().to_vec()),
            (FRA_PROTOCOL, vec![maker]),
        ];
        let (destination_prefix_length, source_prefix_length, tos, flags) = (0, 0, 0, 0);
        Rule { family, destination_prefix_length, source_prefix_length, tos, action, flags, attributes }
    }

    /// One that looks into the table `local`.
    fn local(family: u8, priority: u32, maker: u8) -> Rule {
        rule(family, priority, FR_ACT_TO_TBL, (FRA_TABLE, 255), maker)
    }

    fn network(rules: Vec<Rule>, missing_rules: Vec<Rule>) -> Network {
        Network { rules, missing_rules, ..Network::default() }
    }

    /// Hears of rules that come and go.
    struct Listener(OwnedFd);

    impl Listener {
        fn open() -> Self {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None).unwrap();
            // RTNLGRP_IPV4_RULE and RTNLGRP_IPV6_RULE.
            bind(&socket, &SocketAddrNetlink::new(0, 1 << 7 | 1 << 18)).unwrap();
            Self(socket)
        }

        /// What has happened since: a sign and a priority each.
        fn heard(&self) -> Vec<String> {
            let mut heard = Vec::new();
            let mut bytes = [0_u8; 4096];
            while let Ok((_, length)) = recv(&self.0, &mut bytes, RecvFlags::empty()) {
                let sign = if bytes[4] == Kind::Rule as u8 { '+' } else { '-' };
                // Behind the message's header and the rule's. The first of all rules has no priority.
                let (mut at, mut priority) = (16 + 12, 0);
                while at < length {
                    let [size, kind] = [at, at + 2].map(|at| u16::from_ne_bytes([bytes[at], bytes[at + 1]]));
                    if kind == FRA_PRIORITY {
                        priority = u32::from_ne_bytes(bytes[at + 4..at + 8].try_into().unwrap());
                    }
                    at += usize::from(size).next_multiple_of(4);
                }
                heard.push(format!("{sign}{priority}"));
            }
            heard
        }
    }

    /// The network that `now` is after an update that the kernel carries out as a whole.
    fn updated(now: &Network, new: &Network) -> Network {
        let (now, outcome) = update(now, new);
        outcome.unwrap();
        assert_eq!(&now, new);
        now
    }

    #[test]
    fn a_rule_of_the_kernels_goes_after_and_comes_before_what_stands_in_for_it() {
        elsewhere(|| {
            for family in [AF_INET, AF_INET6] {
                let listener = Listener::open();
                let moved = network(vec![local(family, 100, BOOT)], vec![local(family, 0, KERNEL)]);
                let now = updated(&Network::default(), &moved);
                assert_eq!(listener.heard(), ["+100", "-0"], "{family}");
                updated(&now, &Network::default());
                assert_eq!(listener.heard(), ["+0", "-100"], "{family}");
            }
        });
    }

    #[test]
    fn a_rule_of_the_kernels_stays_until_all_others_are_there() {
        elsewhere(|| {
            let listener = Listener::open();
            // From a network that it does not name.
            let refused = Rule { source_prefix_length: 8, ..rule(AF_INET, 7, FR_ACT_TO_TBL, (FRA_TABLE, 77), BOOT) };
            let main = rule(AF_INET, 32_766, FR_ACT_TO_TBL, (FRA_TABLE, 254), KERNEL);
            let rules = vec![refused, local(AF_INET, 100, BOOT)];
            let wanted = network(rules, vec![local(AF_INET, 0, KERNEL), main]);
            let (now, outcome) = update(&Network::default(), &wanted);
            assert!(outcome.unwrap_err().to_string().contains("add a routing rule"));
            assert_eq!((listener.heard(), now.missing_rules.len()), (vec!["+100".to_owned()], 0));
            updated(&now, &network(wanted.rules[1..].to_vec(), wanted.missing_rules));
            assert_eq!(listener.heard(), ["-0", "-32766"]);
        });
    }

    #[test]
    fn a_route_whose_gateway_only_a_missing_rule_leads_to_stays() {
        elsewhere(|| {
            let main = rule(AF_INET, 32_766, FR_ACT_TO_TBL, (FRA_TABLE, 254), KERNEL);
            let hop = NextHop { gateway: Some([198, 51, 1, 9].into()), ..route(1, None).next_hops[0].clone() };
            let behind = Route { scope: 0, next_hops: vec![hop], ..route(2, None) };
            let interfaces = vec![lo(65_536, &[])];
            let routes = vec![route(1, None), behind];
            let wanted = Network { interfaces, routes, missing_rules: vec![main], ..Network::default() };
            // An interface that is down takes no routes; this one is up already.
            set_up(&Network { interfaces: wanted.interfaces.clone(), ..Network::default() }).unwrap();
            let now = updated(&Network::default(), &wanted);
            let listener = Listener::open();
            let more = Network { rules: vec![local(AF_INET, 100, BOOT)], ..wanted };
            updated(&now, &more);
            assert_eq!(listener.heard(), ["+32766", "+100", "-32766"]);
            assert_eq!(routes_of_the_kernel(), [1, 2]);
        });
    }

    #[test]
    fn a_rule_in_the_place_of_the_kernels_is_another() {
        elsewhere(|| {
            let listener = Listener::open();
            let (own, others) = (local(AF_INET, 0, KERNEL), local(AF_INET, 0, 0));
            let now = updated(&Network::default(), &network(vec![others.clone()], Vec::new()));
            let now = updated(&now, &network(vec![others], vec![own.clone()]));
            assert_eq!(listener.heard(), ["+0", "-0"]);
            let both = updated(&updated(&now, &Network::default()), &network(now.rules, Vec::new()));
            listener.heard();
            updated(&both, &network(Vec::new(), vec![own]));
            assert_eq!(listener.heard(), ["-0", "-0"]);
        });
    }

    #[test]
    fn a_rule_that_the_kernel_cannot_tell_from_one_that_goes_comes_after_it() {
        elsewhere(|| {
            let listener = Listener::open();
            let goto = |target| rule(AF_INET, 700, FR_ACT_GOTO, (FRA_GOTO, target), BOOT);
            let now = updated(&Network::default(), &network(vec![goto(32_766)], Vec::new()));
            updated(&now, &network(vec![goto(32_767)], Vec::new()));
            assert_eq!(listener.heard(), ["+700", "-700", "+700"]);
        });
    }
}
