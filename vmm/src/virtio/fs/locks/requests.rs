//! Requests about locks as the guest's kernel makes them (`FUSE_GETLK`, `FUSE_SETLK`, `FUSE_SETLKW`, `FUSE_INTERRUPT`).

use std::io;

use fuse_backend_rs::abi::fuse_abi::{FileLock, InHeader, InterruptIn, LK_FLOCK, LkIn, LkOut, Opcode};
use fuse_backend_rs::api::filesystem::FsOptions;
use fuse_backend_rs::transport::Reader;
use vm_memory::ByteValued;

use super::super::share::Share;
use super::super::state::{State, errno};
use super::super::waiting::Answer;
use super::ranges::{Kind, Range, Segment};
use super::{Owner, Request};

const GETLK: u32 = Opcode::Getlk as u32;
const SETLK: u32 = Opcode::Setlk as u32;
const SETLKW: u32 = Opcode::Setlkw as u32;
const INTERRUPT: u32 = Opcode::Interrupt as u32;

/// Serves the request whose header was read from `body`; returns the answer's body, or `None` if the request waits and is
/// answered at `answer`.
pub(in super::super) fn serve(
    share: &Share,
    header: &InHeader,
    mut body: Reader<'_>,
    answer: impl FnOnce() -> Answer,
) -> Option<io::Result<Vec<u8>>> {
    let mut state = share.state();
    if header.opcode == INTERRUPT {
        if let Ok(request) = body.read_obj::<InterruptIn>() {
            state.interrupt_lock(request.unique);
        }
        return Some(Ok(Vec::new()));
    }
    let Ok(request) = body.read_obj::<LkIn>() else { return Some(Err(errno(libc::EINVAL))) };
    match header.opcode {
        GETLK => Some(find(&mut state, header, &request)),
        SETLK | SETLKW => match change(&mut state, header, &request, answer) {
            Ok(done) => done.map(|()| Ok(Vec::new())),
            Err(error) => Some(Err(error)),
        },
        _ => Some(Err(errno(libc::ENOSYS))),
    }
}

/// What the request is about. The kind of lock is `None` for none.
fn parse(state: &State, request: &LkIn) -> io::Result<(Owner, Range, Option<Kind>)> {
    let whole = request.lk_flags & LK_FLOCK != 0;
    let agreed = if whole { FsOptions::FLOCK_LOCKS } else { FsOptions::POSIX_LOCKS };
    if state.features & agreed.bits() == 0 {
        return Err(errno(libc::ENOSYS));
    }
    let kind = match request.lk.type_ as i32 {
        libc::F_RDLCK => Some(Kind::Shared),
        libc::F_WRLCK => Some(Kind::Exclusive),
        libc::F_UNLCK => None,
        _ => return Err(errno(libc::EINVAL)),
    };
    // The open file is the owner: the guest's number for it says no more.
    let owner = if whole { Owner::Whole(request.fh) } else { Owner::Bytes(request.owner) };
    let range = if whole { Some(Range::ALL) } else { Range::new(request.lk.start, request.lk.end) };
    Ok((owner, range.ok_or_else(|| errno(libc::EINVAL))?, kind))
}

fn find(state: &mut State, header: &InHeader, request: &LkIn) -> io::Result<Vec<u8>> {
    let (owner, range, kind) = parse(state, request)?;
    let kind = kind.ok_or_else(|| errno(libc::EINVAL))?;
    // Any open file may ask about any lock.
    let node = state.check_lock(header.nodeid, request.fh, owner, None)?;
    let wanted = Segment { range, kind };
    let asked = Request { node, handle: request.fh, owner, wanted, process: request.lk.pid };
    let lk = match state.find_conflict(&asked)? {
        None => FileLock { type_: libc::F_UNLCK as u32, ..request.lk },
        Some((Segment { range, kind }, pid)) => {
            let type_ = if kind == Kind::Shared { libc::F_RDLCK } else { libc::F_WRLCK };
            FileLock { start: range.start(), end: range.end(), type_: type_ as u32, pid }
        }
    };
    Ok(LkOut { lk }.as_slice().to_vec())
}

/// Changes what is locked; `None` if the request waits.
fn change(
    state: &mut State,
    header: &InHeader,
    request: &LkIn,
    answer: impl FnOnce() -> Answer,
) -> io::Result<Option<()>> {
    let (owner, range, kind) = parse(state, request)?;
    let node = state.check_lock(header.nodeid, request.fh, owner, kind)?;
    let Some(kind) = kind else { return state.unlock(node, owner, range).map(Some) };
    let wanted = Segment { range, kind };
    let request = Request { node, handle: request.fh, owner, wanted, process: request.lk.pid };
    if header.opcode == SETLKW {
        state.lock_or_wait(&request, answer).transpose()
    } else {
        state.lock(&request).map(Some)
    }
}
