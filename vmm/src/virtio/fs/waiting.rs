//! Requests that are answered later than those that come after them: who waits for a lock, or for what happens to watched files.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::queue::RawChain;
use super::snapshot::Input;

/// Length of an answer's header (`struct fuse_out_header`).
pub(super) const HEADER_BYTES: u32 = 16;
/// Places for an answer: no chain has more descriptors than its queue has entries.
const MAX_PLACES: u32 = super::REQUEST_SIZE as u32;

/// Where to answer a request.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    queue: u16,
    head: u16,
    pub(super) unique: u64,
    /// Stretches of guest memory, addresses and lengths.
    places: Vec<(u64, u32)>,
}

impl Answer {
    /// The answer to the request in `chain`, from the queue of that index, with `most` bytes at most.
    pub(super) fn new(queue: u16, chain: &RawChain, unique: u64, most: u32) -> Self {
        let (mut places, mut left) = (Vec::new(), most);
        for descriptor in chain.clone().writable() {
            let len = descriptor.len().min(left);
            if len > 0 {
                places.push((descriptor.addr().0, len));
            }
            left -= len;
            if left == 0 {
                break;
            }
        }
        Self { queue, head: chain.head_index(), unique, places }
    }

    /// How many bytes it may have.
    pub(super) fn room(&self) -> u32 {
        self.places.iter().fold(0, |sum, (_, len)| sum.saturating_add(*len))
    }

    /// Writes the answer, a header and a body or an error; returns its queue, head and length. One that does not fit has no length.
    pub(super) fn write(&self, memory: &GuestMemoryMmap, error: i32, body: &[u8]) -> (u16, u16, u32) {
        let len = HEADER_BYTES + body.len() as u32;
        let mut answer = Vec::with_capacity(len as usize);
        answer.extend(len.to_le_bytes());
        answer.extend((-error).to_le_bytes());
        answer.extend(self.unique.to_le_bytes());
        answer.extend(body);
        let mut rest = &answer[..];
        for (at, len) in &self.places {
            let (part, others) = rest.split_at(rest.len().min(*len as usize));
            if memory.write_slice(part, GuestAddress(*at)).is_err() {
                return (self.queue, self.head, 0);
            }
            rest = others;
        }
        (self.queue, self.head, if rest.is_empty() { len } else { 0 })
    }

    /// Adds what [`parse`](Self::parse) takes: queue, head (u32), unique number (u64), number of places (u32), for each its address (u64)
    /// and length (u32).
    pub(super) fn save(&self, out: &mut Vec<u8>) {
        out.extend(u32::from(self.queue).to_le_bytes());
        out.extend(u32::from(self.head).to_le_bytes());
        out.extend(self.unique.to_le_bytes());
        out.extend((self.places.len() as u32).to_le_bytes());
        for (at, len) in &self.places {
            out.extend(at.to_le_bytes());
            out.extend(len.to_le_bytes());
        }
    }

    /// `None` if it does not parse.
    pub(super) fn parse(input: &mut Input<'_>) -> Option<Self> {
        let (queue, head) = (u16::try_from(input.u32()?).ok()?, u16::try_from(input.u32()?).ok()?);
        let (unique, count) = (input.u64()?, input.u32()?);
        let mut places = Vec::new();
        for _ in 0..(count <= MAX_PLACES).then_some(count)? {
            places.push((input.u64()?, input.u32()?));
        }
        Some(Self { queue, head, unique, places })
    }
}
