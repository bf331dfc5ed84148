//! Requests that the server of fuse-backend-rs does not serve, or not in full.

use std::ffi::CStr;
use std::io::{self, Read as _};

use fuse_backend_rs::abi::fuse_abi::{
    CopyFileRangeIn, CreateIn, EntryOut, ForgetOne, InHeader, InitIn, InitIn2, InitOut, Opcode, OpenOut, SetxattrIn,
    WriteOut,
};
use fuse_backend_rs::api::filesystem::{Context, FsOptions};
use fuse_backend_rs::api::server::{MAX_BUFFER_SIZE, MAX_REQ_PAGES};
use fuse_backend_rs::transport::Reader;
use vm_memory::ByteValued;

use super::files::CopyRange;
use super::host::XATTR_MAX;
use super::policy::SETXATTR_EXT;
use super::session::{FUSE_STATX, FUSE_SYNCFS, FUSE_TMPFILE, FUSE_UNLINK_FORGET};
use super::share::Share;
use super::state::errno;
use super::statx;

/// The protocol that is spoken: 7.39. Any 7.x guest understands the answer; those before 7.31 know no virtio-fs.
const MAJOR: u32 = 7;
const MINOR: u32 = 39;
const LEAST_MINOR: u32 = 31;
/// Background requests that a guest has on the way at most, read-ahead above all; and from when on it writes back slower.
const MAX_BACKGROUND: u16 = 128;

const FUSE_SETXATTR_ACL_KILL_SGID: u32 = 1;
/// Longest name in a directory, terminated.
const NAME_MAX: usize = 256;
/// Longest name of an extended attribute (`XATTR_NAME_MAX`), terminated.
const XATTR_NAME_MAX: usize = 256;

const INIT: u32 = Opcode::Init as u32;
const SETXATTR: u32 = Opcode::Setxattr as u32;
const COPY_FILE_RANGE: u32 = Opcode::CopyFileRange as u32;

/// Serves the request whose header was read from `body`; returns the answer's body.
pub(super) fn serve(share: &Share, header: &InHeader, mut body: Reader<'_>) -> io::Result<Vec<u8>> {
    match header.opcode {
        INIT => init(share, header, &mut body),
        SETXATTR => set_xattr(share, header, &mut body),
        COPY_FILE_RANGE => copy_file_range(share, header, &mut body),
        FUSE_TMPFILE => create_unnamed(share, header, &mut body),
        FUSE_UNLINK_FORGET => unlink_forget(share, header, &mut body),
        FUSE_STATX => describe(share, header, &mut body),
        FUSE_SYNCFS => share.state().sync_all().map(|()| Vec::new()),
        _ => Err(errno(libc::ENOSYS)),
    }
}

/// Reads a structure that must be all there.
fn take<T: ByteValued>(body: &mut Reader<'_>) -> io::Result<T> {
    body.read_obj().map_err(|_| errno(libc::EINVAL))
}

/// Agrees on the protocol. A guest that starts anew knows no file any more.
fn init(share: &Share, header: &InHeader, body: &mut Reader<'_>) -> io::Result<Vec<u8>> {
    let request: InitIn = take(body)?;
    let mut answer = InitOut { major: MAJOR, minor: MINOR, ..InitOut::default() };
    if request.major > MAJOR {
        // The guest asks again in this version.
        return Ok(answer.as_slice().to_vec());
    }
    if request.major < MAJOR || request.minor < LEAST_MINOR {
        return Err(errno(libc::EPROTO));
    }
    let mut offered = u64::from(request.flags);
    if offered & FsOptions::INIT_EXT.bits() != 0 && header.len as usize >= size_of::<InHeader>() + 20 {
        // As much of the second part as there is; it has grown over time.
        let mut more = InitIn2::default();
        let len = body.read(more.as_mut_slice())?;
        if len >= size_of::<u32>() {
            offered |= u64::from(more.flags2) << 32;
        }
    }
    let mut state = share.state();
    state.clear();
    state.features = offered & state.policy.features;
    answer.flags = state.features as u32;
    answer.flags2 = (state.features >> 32) as u32;
    answer.max_readahead = request.max_readahead;
    answer.max_background = MAX_BACKGROUND;
    answer.congestion_threshold = MAX_BACKGROUND / 4 * 3;
    answer.max_write = MAX_BUFFER_SIZE;
    answer.max_pages = MAX_REQ_PAGES;
    answer.time_gran = 1;
    Ok(answer.as_slice().to_vec())
}

/// `FUSE_SETXATTR`, in the long form if `FUSE_INIT` agreed on it.
fn set_xattr(share: &Share, header: &InHeader, body: &mut Reader<'_>) -> io::Result<Vec<u8>> {
    let request: SetxattrIn = take(body)?;
    let mut state = share.state();
    let mut kill_set_gid = false;
    if state.features & SETXATTR_EXT != 0 {
        let [flags, _padding]: [u32; 2] = [take(body)?, take(body)?];
        kill_set_gid = flags & FUSE_SETXATTR_ACL_KILL_SGID != 0;
    }
    let size = request.size as usize;
    if size > XATTR_MAX {
        return Err(errno(libc::E2BIG));
    }
    let mut rest = vec![0; body.available_bytes().min(XATTR_NAME_MAX + size)];
    body.read_exact(&mut rest)?;
    let name = CStr::from_bytes_until_nul(&rest).map_err(|_| errno(libc::EINVAL))?;
    let start = name.to_bytes_with_nul().len();
    let value = rest.get(start..start + size).ok_or_else(|| errno(libc::EINVAL))?;
    state.set_xattr(&Context::from(header), header.nodeid, name, value, (request.flags, kill_set_gid))?;
    Ok(Vec::new())
}

/// `FUSE_COPY_FILE_RANGE`.
fn copy_file_range(share: &Share, header: &InHeader, body: &mut Reader<'_>) -> io::Result<Vec<u8>> {
    let request: CopyFileRangeIn = take(body)?;
    let range = CopyRange {
        from: (header.nodeid, request.fh_in, request.offset_in),
        to: (request.nodeid_out, request.fh_out, request.offset_out),
        len: request.len,
        flags: request.flags,
    };
    let copied = share.state().copy(&Context::from(header), &range)?;
    let answer = WriteOut { size: u32::try_from(copied).unwrap_or(u32::MAX), ..WriteOut::default() };
    Ok(answer.as_slice().to_vec())
}

/// `FUSE_STATX`: like `FUSE_GETATTR`, with the time of birth.
fn describe(share: &Share, header: &InHeader, body: &mut Reader<'_>) -> io::Result<Vec<u8>> {
    let request: statx::Request = take(body)?;
    let mut state = share.state();
    let stat = state.describe(header.nodeid, request.handle())?;
    Ok(statx::Answer::new(&stat, state.policy.timeout).as_slice().to_vec())
}

/// `FUSE_TMPFILE`: like `FUSE_CREATE`, with a name that means nothing.
fn create_unnamed(share: &Share, header: &InHeader, body: &mut Reader<'_>) -> io::Result<Vec<u8>> {
    let request: CreateIn = take(body)?;
    let (entry, (fh, options)) = share.state().create_unnamed(&Context::from(header), header.nodeid, &request)?;
    let open = OpenOut { fh, open_flags: options.bits(), ..OpenOut::default() };
    Ok([EntryOut::from(entry).as_slice(), open.as_slice()].concat())
}

/// `FUSE_UNLINK_FORGET`: what is named is a file that the guest has no other use for.
fn unlink_forget(share: &Share, header: &InHeader, body: &mut Reader<'_>) -> io::Result<Vec<u8>> {
    let ForgetOne { nodeid, nlookup } = take(body)?;
    let mut name = vec![0; body.available_bytes().min(NAME_MAX)];
    let is_long = body.available_bytes() > NAME_MAX;
    body.read_exact(&mut name)?;
    let error = if is_long { libc::ENAMETOOLONG } else { libc::EINVAL };
    let name = CStr::from_bytes_until_nul(&name).map_err(|_| errno(error))?;
    share.state().remove_and_forget(header.nodeid, name, (nodeid, nlookup))?;
    Ok(Vec::new())
}
