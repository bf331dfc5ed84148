//! `FUSE_READ`, the most frequent request: taken from its chain in one walk, where the general way takes several.

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader, ReadIn};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use vm_memory::{ByteValued, Bytes, GuestMemory, GuestMemoryMmap, VolatileSlice};

use super::super::queue::RawChain;
use super::share::Share;

const HEADER_BYTES: usize = size_of::<InHeader>();
const MESSAGE_BYTES: usize = HEADER_BYTES + size_of::<ReadIn>();
/// From here on a message says what it is.
const OPCODE_END: usize = 8;
const READ: u32 = Opcode::Read as u32;

/// What a chain has in it.
pub(super) enum Taken<'a> {
    Read(Read<'a>),
    /// Something else, or nothing that can be read; with its header if that is in one piece.
    Other(Option<InHeader>),
}

/// A read as its chain has it.
pub(super) struct Read<'a> {
    header: InHeader,
    request: ReadIn,
    /// Where the answer's header goes.
    head: Vec<VolatileSlice<'a>>,
    /// Where what is read goes, as much as is asked for.
    data: Vec<FileVolatileSlice<'a>>,
}

/// Takes a read out of `chain`.
pub(super) fn take(memory: &GuestMemoryMmap, chain: RawChain) -> Taken<'_> {
    let mut message = [0; MESSAGE_BYTES];
    let mut have = 0;
    let (mut head, mut head_left) = (Vec::new(), size_of::<OutHeader>());
    let (mut data, mut data_left) = (Vec::new(), None);
    for descriptor in chain {
        let len = descriptor.len() as usize;
        if !descriptor.is_write_only() {
            let part = len.min(MESSAGE_BYTES - have);
            // What is readable comes first (virtio 1.3, section 2.7.4.2).
            if !head.is_empty() || memory.read_slice(&mut message[have..have + part], descriptor.addr()).is_err() {
                return Taken::Other(None);
            }
            have += part;
            if have >= OPCODE_END && object::<InHeader>(&message).opcode != READ {
                return Taken::Other((have >= HEADER_BYTES).then(|| object(&message)));
            }
            continue;
        }
        let slice = memory.get_slice(descriptor.addr(), len);
        let Ok((first, rest)) = slice.and_then(|slice| Ok(slice.split_at(len.min(head_left))?)) else {
            return Taken::Other(None);
        };
        if head_left > 0 {
            head_left -= first.len();
            head.push(first);
        }
        let left = data_left.get_or_insert_with(|| object::<ReadIn>(&message[HEADER_BYTES..]).size as usize);
        let part = rest.len().min(*left);
        if part > 0
            && let Ok(part) = rest.subslice(0, part)
        {
            *left -= part.len();
            data.push(FileVolatileSlice::from_volatile_slice(&part));
        }
    }
    let header: InHeader = object(&message);
    if have < MESSAGE_BYTES || (header.len as usize) < MESSAGE_BYTES || head_left > 0 {
        return Taken::Other(None);
    }
    Taken::Read(Read { header, request: object(&message[HEADER_BYTES..]), head, data })
}

/// The structure at the beginning of `bytes`.
fn object<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut object = T::default();
    let len = size_of::<T>().min(bytes.len());
    object.as_mut_slice()[..len].copy_from_slice(&bytes[..len]);
    object
}

impl Read<'_> {
    /// Reads from the file into the guest's memory; returns how many bytes the answer has.
    pub(super) fn serve(self, share: &Share) -> u32 {
        let ReadIn { fh, offset, .. } = self.request;
        let mut state = share.state();
        let (read, error) = match state.read(self.header.nodeid, fh, &self.data, offset) {
            Ok(read) => (read, 0),
            Err(error) => (0, -error.raw_os_error().unwrap_or(libc::EIO)),
        };
        state.tidy();
        drop(state);
        // At most what a request of 32 bits asked for.
        let len = (size_of::<OutHeader>() + read) as u32;
        let answer = OutHeader { len, error, unique: self.header.unique };
        let mut rest = answer.as_slice();
        for place in &self.head {
            let (part, others) = rest.split_at(rest.len().min(place.len()));
            if place.write_slice(part, 0).is_err() {
                return 0;
            }
            rest = others;
        }
        len
    }
}
