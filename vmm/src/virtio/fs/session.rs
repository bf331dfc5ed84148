//! One FUSE request from the queue to its answer (virtio 1.3, section 5.11.6).
//!
//! Most requests go to the server of fuse-backend-rs. Kept from it are reads, which are to have a short way; those about
//! [locks](super::locks) and [watches], which may wait; those it does not know (`FUSE_TMPFILE`, `FUSE_COPY_FILE_RANGE`,
//! `FUSE_SYNCFS`, `FUSE_STATX`, `FUSE_UNLINK_FORGET`) or whose newer form it does not know (`FUSE_INIT`, `FUSE_SETXATTR`); those
//! that change something if the share is read-only; and those that do not parse, which it may leave without an answer.

use std::io::{self, Write as _};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::{MAX_BUFFER_SIZE, Server};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::super::queue::RawChain;
use super::extensions;
use super::locks::requests;
use super::reads::{self, Taken};
use super::share::Share;
use super::state::errno;
use super::waiting::{Answer, HEADER_BYTES};
use super::watches::{self, FUSE_WATCH, FUSE_WATCH_EVENTS};

/// Opcodes that fuse-backend-rs does not name.
pub(super) const FUSE_SYNCFS: u32 = 50;
pub(super) const FUSE_TMPFILE: u32 = 51;
pub(super) const FUSE_STATX: u32 = 52;
/// Hull's own: `FUSE_UNLINK` and `FUSE_FORGET` in one (guest-kernel-config/patches/0013).
pub(super) const FUSE_UNLINK_FORGET: u32 = 3002;

/// Longest request: the largest write and its headers.
const MAX_REQUEST: u32 = MAX_BUFFER_SIZE + 4096;

/// What serves one share.
pub(super) struct Session {
    share: Arc<Share>,
    server: Server<Arc<Share>>,
    read_only: bool,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Server,
    Extension,
    /// Changes something: what a read-only share refuses.
    Change,
    ChangeExtension,
    /// About locks: may have to wait.
    Lock,
    /// About watches: may have to wait.
    Watch,
    Unknown,
}

fn way(opcode: u32) -> Way {
    const fn is(opcode: u32, known: Opcode) -> bool {
        opcode == known as u32
    }
    use Opcode as O;
    let among = |list: &[Opcode]| list.iter().any(|known| is(opcode, *known));
    let served = [
        O::Lookup,
        O::Forget,
        O::BatchForget,
        O::Getattr,
        O::Readlink,
        O::Open,
        O::Statfs,
        O::Release,
        O::Fsync,
        O::Getxattr,
        O::Listxattr,
        O::Flush,
        O::Opendir,
        O::Readdir,
        O::Readdirplus,
        O::Releasedir,
        O::Fsyncdir,
        O::Destroy,
        O::Lseek,
    ];
    let changes = [
        O::Setattr,
        O::Symlink,
        O::Mknod,
        O::Mkdir,
        O::Unlink,
        O::Rmdir,
        O::Rename,
        O::Rename2,
        O::Link,
        O::Write,
        O::Removexattr,
        O::Create,
        O::Fallocate,
    ];
    match opcode {
        _ if among(&served) => Way::Server,
        _ if among(&changes) => Way::Change,
        FUSE_TMPFILE | FUSE_UNLINK_FORGET => Way::ChangeExtension,
        _ if among(&[O::Setxattr, O::CopyFileRange]) => Way::ChangeExtension,
        _ if among(&[O::Getlk, O::Setlk, O::Setlkw, O::Interrupt]) => Way::Lock,
        FUSE_SYNCFS | FUSE_STATX => Way::Extension,
        FUSE_WATCH | FUSE_WATCH_EVENTS => Way::Watch,
        _ if is(opcode, O::Init) => Way::Extension,
        _ => Way::Unknown,
    }
}

impl Session {
    pub(super) fn new(share: Arc<Share>, read_only: bool) -> Self {
        Self { server: Server::new(share.clone()), share, read_only }
    }

    pub(super) fn share(&self) -> &Share {
        &self.share
    }

    /// Serves the request in `chain`, from the queue of that index; returns how many bytes the answer has. `None` if it waits:
    /// [`Locks`](super::locks::Locks) or [`Watches`](super::watches::Watches) have the answer later.
    pub(super) fn serve(&self, memory: &GuestMemoryMmap, queue: u16, chain: RawChain) -> Option<u32> {
        let header = match reads::take(memory, chain.clone()) {
            Taken::Read(read) => return Some(read.serve(&self.share)),
            Taken::Other(header) => header,
        };
        let writer_of = |chain: &RawChain| VirtioFsWriter::new(memory, chain.clone());
        let (Ok(reader), Ok(writer)) = (Reader::from_descriptor_chain(memory, chain.clone()), writer_of(&chain)) else {
            return Some(0);
        };
        let Some(header) = header.or_else(|| reader.clone().read_obj().ok()) else { return Some(0) };
        let answered = !matches!(header.opcode, FORGET | BATCH_FORGET | INTERRUPT);
        let whole = (size_of::<InHeader>() as u32..=MAX_REQUEST).contains(&header.len)
            && header.len as usize <= reader.available_bytes();
        let way = if whole { way(header.opcode) } else { Way::Unknown };
        let result = match way {
            Way::Unknown if !whole || header.opcode == READ => Err(errno(libc::EINVAL)),
            Way::Unknown => Err(errno(libc::ENOSYS)),
            Way::Change | Way::ChangeExtension if self.read_only => Err(errno(libc::EROFS)),
            Way::Lock | Way::Watch => {
                let later = |most| Answer::new(queue, &chain, header.unique, most);
                let result = if way == Way::Lock {
                    requests::serve(&self.share, &header, past_header(reader), || later(HEADER_BYTES))
                } else {
                    watches::serve(&self.share, &header, past_header(reader), later)
                };
                match result {
                    None => return None,
                    Some(result) => {
                        result.and_then(|body| if answered { answer(writer, &header, Ok(&body)) } else { Ok(0) })
                    }
                }
            }
            Way::Extension | Way::ChangeExtension => extensions::serve(&self.share, &header, past_header(reader))
                .and_then(|body| answer(writer, &header, Ok(&body))),
            Way::Server | Way::Change => self
                .server
                .handle_message(reader, writer.into(), None, None)
                // The message did not parse; the server may have answered nothing.
                .map_err(|_| errno(libc::EINVAL)),
        };
        self.share.state().tidy();
        let written = match result {
            Ok(written) => written,
            Err(error) if answered => {
                writer_of(&chain).map_or(0, |writer| answer(writer, &header, Err(error)).unwrap_or(0))
            }
            Err(_) => 0,
        };
        Some(u32::try_from(written).unwrap_or(0))
    }
}

const FORGET: u32 = Opcode::Forget as u32;
const READ: u32 = Opcode::Read as u32;
const BATCH_FORGET: u32 = Opcode::BatchForget as u32;
const INTERRUPT: u32 = Opcode::Interrupt as u32;

/// The body of a message that has a header.
fn past_header(mut message: Reader<'_>) -> Reader<'_> {
    message.read_obj::<InHeader>().map(|_| message).unwrap_or_default()
}

/// Writes an answer: a header, and a body or an error.
fn answer(mut writer: VirtioFsWriter<'_>, request: &InHeader, body: io::Result<&[u8]>) -> io::Result<usize> {
    let (body, error) = match body {
        Ok(body) => (body, 0),
        Err(error) => (&[][..], -error.raw_os_error().unwrap_or(libc::EIO)),
    };
    let len = size_of::<OutHeader>() + body.len();
    if writer.available_bytes() < len {
        return Err(errno(libc::EINVAL));
    }
    let header = OutHeader { len: len as u32, error, unique: request.unique };
    writer.write_all(header.as_slice())?;
    writer.write_all(body)?;
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_something_is_known_as_a_change() {
        for opcode in [4, 6, 8, 9, 10, 11, 12, 13, 16, 24, 35, 43, 45] {
            assert_eq!(way(opcode), Way::Change, "{opcode}");
        }
        for opcode in [21, 47, FUSE_TMPFILE, FUSE_UNLINK_FORGET] {
            assert_eq!(way(opcode), Way::ChangeExtension, "{opcode}");
        }
        // DAX mappings, ioctls and what the future brings.
        for opcode in [31, 32, 33, 36] {
            assert_eq!(way(opcode), Way::Lock, "{opcode}");
        }
        for opcode in [3000, 3001] {
            assert_eq!(way(opcode), Way::Watch, "{opcode}");
        }
        for opcode in [0, 7, 19, 34, 37, 39, 40, 41, 48, 49, 53, 2999, 3003, 4096, u32::MAX] {
            assert_eq!(way(opcode), Way::Unknown, "{opcode}");
        }
    }
}
