//! The control queue (virtio 1.3, section 5.1.6.5): what a driver may ask, as values.
//!
//! The device filters nothing: a driver in promiscuous mode, or with a list of addresses or of VLANs, gets what it wants
//! and more, which the specification allows (sections 5.1.6.5.1 and 5.1.6.5.3).

use super::super::queue::Chain;

/// Longest command with its data. A table of 64 unicast and 64 multicast addresses has less; nothing longer is read.
const MAX_COMMAND_BYTES: usize = 1024;

/// Answers (section 5.1.6.5).
pub(super) const OK: u8 = 0;
pub(super) const ERROR: u8 = 1;

/// Classes of commands and the commands of each.
const CLASS_RX: u8 = 0;
const RX_COMMANDS: std::ops::RangeInclusive<u8> = 0..=5;
const CLASS_MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const CLASS_VLAN: u8 = 2;
const VLAN_ADD: u8 = 0;
const VLAN_DEL: u8 = 1;
/// Length of a VLAN's number.
const VLAN_BYTES: usize = 2;
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const CLASS_GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;

/// What a driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// A filter, of which there are none: granted as it is.
    Filter,
    /// Another address (section 5.1.6.5.2).
    SetMac([u8; 6]),
    /// Use so many queue pairs from now on (section 5.1.6.5.5).
    SetPairs(u16),
    /// Leave these to the guest from now on, as feature bits (section 5.1.6.5.6).
    SetOffloads(u64),
}

/// Reads a command; `None` where it is unknown or malformed.
pub(super) fn parse(bytes: &[u8]) -> Option<Command> {
    let (&[class, command], data) = bytes.split_first_chunk()?;
    match (class, command) {
        (CLASS_RX, command) if RX_COMMANDS.contains(&command) => (data.len() == 1).then_some(Command::Filter),
        (CLASS_MAC, MAC_TABLE_SET) => is_table_pair(data).then_some(Command::Filter),
        (CLASS_MAC, MAC_ADDR_SET) => data.try_into().ok().map(Command::SetMac),
        (CLASS_VLAN, VLAN_ADD | VLAN_DEL) => (data.len() == VLAN_BYTES).then_some(Command::Filter),
        (CLASS_MQ, MQ_VQ_PAIRS_SET) => Some(Command::SetPairs(u16::from_le_bytes(data.try_into().ok()?))),
        (CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET) => {
            Some(Command::SetOffloads(u64::from_le_bytes(data.try_into().ok()?)))
        }
        _ => None,
    }
}

/// Whether `data` is two tables of addresses, each behind its number of entries.
fn is_table_pair(data: &[u8]) -> bool {
    after_table(data).and_then(after_table).is_some_and(<[u8]>::is_empty)
}

/// What follows a table of addresses.
fn after_table(data: &[u8]) -> Option<&[u8]> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    rest.get(len..)
}

/// Serves one chain: `apply` does what a command asks and says whether it could. Answers the bytes written.
pub(super) fn serve(chain: &Chain, apply: impl FnOnce(Command) -> bool) -> u32 {
    if chain.writable_len() == 0 {
        return 0;
    }
    let mut bytes = [0; MAX_COMMAND_BYTES];
    let len = chain.read_at(0, &mut bytes);
    let command = if chain.readable_len() > MAX_COMMAND_BYTES { None } else { parse(&bytes[..len]) };
    let answer = if command.is_some_and(apply) { OK } else { ERROR };
    chain.write_at(0, &[answer]) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn commands_are_read_as_the_specification_writes_them() {
        assert_eq!(parse(&[0, 0, 1]), Some(Command::Filter));
        assert_eq!(parse(&[1, 1, 2, 0, 0, 0, 0, 1]), Some(Command::SetMac([2, 0, 0, 0, 0, 1])));
        for command in [0, 1] {
            assert_eq!(parse(&[2, command, 7, 0]), Some(Command::Filter));
        }
        assert_eq!(parse(&[4, 0, 3, 0]), Some(Command::SetPairs(3)));
        assert_eq!(parse(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), Some(Command::SetOffloads(2)));
        let mut table = vec![1, 0, 1, 0, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0];
        assert_eq!(parse(&table), Some(Command::Filter));
        table.pop();
        assert_eq!(parse(&table), None);
        assert_eq!(parse(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]), None);
        for bad in
            [&[][..], &[0], &[0, 0], &[0, 6, 1], &[2, 0, 1], &[2, 2, 1, 0], &[3, 0, 1, 0], &[4, 0, 1], &[4, 1, 1, 0]]
        {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_command_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&bytes);
        }
    }
}
