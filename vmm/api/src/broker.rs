//! What a jailed VMM asks of its caller for the files of its shares, by the socket of `--broker-fd`.
//!
//! Some of what a file server does takes capabilities of the host: device nodes, attributes for administrators. The VMM has none,
//! so it asks the process that started it, which looks at each request before it obeys. The VMM may have been taken over by its
//! guest: who answers trusts nothing in a message, and whoever reads this to answer must keep to what [`Request`] says.
//!
//! The socket is of the type `SOCK_SEQPACKET`: a request is one message with one descriptor, which stands for the file (`O_PATH`
//! will do), and its answer one message, before the next request. All numbers are little-endian.
//!
//! | request | bytes |
//! |---|---|
//! | operation, then five numbers by operation, then the length of the name | 7 × 4 |
//! | the name, without its end | |
//! | the value | up to the message's end |
//!
//! | answer | bytes |
//! |---|---|
//! | 0, or an error number of the host | 4 |
//! | what was asked for | up to the message's end |

/// Longest name that a request may have: of a file, or of an attribute (`NAME_MAX`, `XATTR_NAME_MAX`).
pub const NAME_MAX: usize = 255;
/// Longest value of an attribute, or list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
pub const VALUE_MAX: usize = 64 << 10;
/// Longest request.
pub const REQUEST_MAX: usize = HEADER + NAME_MAX + VALUE_MAX;

const HEADER: usize = 7 * 4;
const STATUS: usize = 4;

const MAKE_NODE: u32 = 1;
const GET_ATTRIBUTE: u32 = 2;
const LIST_TRUSTED: u32 = 3;
const SET_ATTRIBUTE: u32 = 4;
const REMOVE_ATTRIBUTE: u32 = 5;

/// What names of attributes for administrators begin with (xattr(7)).
pub const TRUSTED: &[u8] = b"trusted.";

/// A request. The descriptor beside it is the directory for [`MakeNode`](Self::MakeNode), and else the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Make a device node (mknod(2)); the answer is empty.
    MakeNode {
        /// What it is to be called.
        name: &'a [u8],
        /// Type and permissions, before the umask.
        mode: u32,
        /// The device, as the kernel packs it for user programs (`new_encode_dev`).
        device: u32,
        /// Whom it is to belong to: user and group.
        owner: (u32, u32),
        /// The umask of who makes it.
        umask: u32,
    },
    /// Tell the value of an attribute.
    GetAttribute {
        /// Its name.
        name: &'a [u8],
    },
    /// Tell the names of all attributes that begin with [`TRUSTED`], each with a zero byte at its end.
    ListTrusted,
    /// Set an attribute; the answer is empty.
    SetAttribute {
        /// Its name.
        name: &'a [u8],
        /// Its value.
        value: &'a [u8],
        /// As for setxattr(2).
        flags: u32,
    },
    /// Remove an attribute; the answer is empty.
    RemoveAttribute {
        /// Its name.
        name: &'a [u8],
    },
}

impl<'a> Request<'a> {
    /// The message.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let (operation, numbers, name, value): (u32, [u32; 5], &[u8], &[u8]) = match *self {
            Self::MakeNode { name, mode, device, owner, umask } => {
                (MAKE_NODE, [mode, device, owner.0, owner.1, umask], name, &[])
            }
            Self::GetAttribute { name } => (GET_ATTRIBUTE, [0; 5], name, &[]),
            Self::ListTrusted => (LIST_TRUSTED, [0; 5], &[], &[]),
            Self::SetAttribute { name, value, flags } => (SET_ATTRIBUTE, [flags, 0, 0, 0, 0], name, value),
            Self::RemoveAttribute { name } => (REMOVE_ATTRIBUTE, [0; 5], name, &[]),
        };
        let mut bytes = Vec::with_capacity(HEADER + name.len() + value.len());
        bytes.extend(operation.to_le_bytes());
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend(name);
        bytes.extend(value);
        bytes
    }

    /// The length of the longest answer to it, in bytes.
    #[must_use]
    pub fn longest_answer(&self) -> usize {
        match self {
            Self::GetAttribute { .. } | Self::ListTrusted => STATUS + VALUE_MAX,
            Self::MakeNode { .. } | Self::SetAttribute { .. } | Self::RemoveAttribute { .. } => STATUS,
        }
    }

    /// Reads a message that anybody may have made; `None` for one that is no request.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, rest) = bytes.split_at_checked(HEADER)?;
        let mut numbers = header.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        let mut next = || numbers.next();
        let (operation, arguments, length) = (next()?, [next()?, next()?, next()?, next()?, next()?], next()?);
        let (name, value) = rest.split_at_checked(length as usize)?;
        if name.len() > NAME_MAX || name.contains(&0) || value.len() > VALUE_MAX {
            return None;
        }
        let has_value = operation == SET_ATTRIBUTE;
        if name.is_empty() != (operation == LIST_TRUSTED) || (!has_value && !value.is_empty()) {
            return None;
        }
        Some(match operation {
            MAKE_NODE => {
                let [mode, device, user, group, umask] = arguments;
                Self::MakeNode { name, mode, device, owner: (user, group), umask }
            }
            GET_ATTRIBUTE => Self::GetAttribute { name },
            LIST_TRUSTED => Self::ListTrusted,
            SET_ATTRIBUTE => Self::SetAttribute { name, value, flags: arguments[0] },
            REMOVE_ATTRIBUTE => Self::RemoveAttribute { name },
            _ => return None,
        })
    }
}

/// The message for an outcome.
#[must_use]
pub fn answer_to_bytes(outcome: Result<&[u8], i32>) -> Vec<u8> {
    let (status, data) = match outcome {
        Ok(data) => (0, data),
        Err(errno) => (errno, &[][..]),
    };
    [&status.to_le_bytes()[..], data].concat()
}

/// The outcome of a message; `None` for one that is no answer.
#[must_use]
pub fn parse_answer(bytes: &[u8]) -> Option<Result<&[u8], i32>> {
    let (status, data) = bytes.split_at_checked(STATUS)?;
    match i32::from_le_bytes(status.try_into().ok()?) {
        0 => Some(Ok(data)),
        errno => Some(Err(errno)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_are_understood() {
        let requests = [
            Request::MakeNode {
                name: b"disk",
                mode: 0o60_0644,
                device: 0x810,
                owner: (1000, u32::MAX - 1),
                umask: 0o27,
            },
            Request::GetAttribute { name: b"trusted.a" },
            Request::ListTrusted,
            Request::SetAttribute { name: b"trusted.a", value: b"1\x002", flags: 2 },
            Request::SetAttribute { name: b"trusted.a", value: b"", flags: 0 },
            Request::RemoveAttribute { name: b"security.b" },
        ];
        for request in requests {
            assert_eq!(Request::parse(&request.to_bytes()), Some(request));
        }
        assert_eq!(parse_answer(&answer_to_bytes(Ok(b"value"))), Some(Ok(&b"value"[..])));
        assert_eq!(parse_answer(&answer_to_bytes(Err(28))), Some(Err(28)));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let good = Request::GetAttribute { name: b"trusted.a" }.to_bytes();
        for len in 0..good.len() {
            assert_eq!(Request::parse(&good[..len]), None, "{len}");
        }
        assert_eq!(Request::parse(&[&good[..], b"value"].concat()), None);
        assert_eq!(Request::parse(&Request::GetAttribute { name: b"" }.to_bytes()), None);
        assert_eq!(Request::parse(&Request::GetAttribute { name: b"a\0b" }.to_bytes()), None);
        assert_eq!(Request::parse(&Request::GetAttribute { name: &[b'a'; 256] }.to_bytes()), None);
        let value = vec![0; VALUE_MAX + 1];
        assert_eq!(Request::parse(&Request::SetAttribute { name: b"a", value: &value, flags: 0 }.to_bytes()), None);
        for operation in [0, 6, u32::MAX] {
            let other = [&operation.to_le_bytes()[..], &good[4..]].concat();
            assert_eq!(Request::parse(&other), None);
        }
        assert_eq!(parse_answer(&[0; 3]), None);
    }

    proptest! {
        #[test]
        fn any_message_is_a_request_or_none(operation in 0_u32..7, name in 0_u32..300, rest in vec(any::<u8>(), 0..400)) {
            let message = [&operation.to_le_bytes()[..], &[1; 20], &name.to_le_bytes(), &rest].concat();
            if let Some(request) = Request::parse(&message) {
                let again = request.to_bytes();
                prop_assert_eq!(Request::parse(&again), Some(request));
                prop_assert_eq!(again.len(), message.len());
            }
        }
    }
}
