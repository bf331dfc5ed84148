//! `FUSE_STATX` (protocol 7.39), which fuse-backend-rs does not name: what Linux asks for when a program wants the time of a file's birth.

use std::time::Duration;

use vm_memory::ByteValued;

use super::host::Stat;

/// The handle is good, not only the node.
const FUSE_GETATTR_FH: u32 = 1;

/// `struct fuse_statx_in`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Request {
    flags: u32,
    _reserved: u32,
    handle: u64,
    /// How fresh it must be, and what of it is wanted: it is always fresh and whole.
    _sync: u32,
    _mask: u32,
}

/// `struct fuse_sx_time`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Time {
    seconds: i64,
    nanoseconds: u32,
    _reserved: i32,
}

/// `struct fuse_statx`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Description {
    mask: u32,
    block_size: u32,
    attributes: u64,
    links: u32,
    uid: u32,
    gid: u32,
    mode: u16,
    _spare: u16,
    inode: u64,
    size: u64,
    blocks: u64,
    attributes_mask: u64,
    access: Time,
    birth: Time,
    change: Time,
    modification: Time,
    device: [u32; 2],
    file_system: [u32; 2],
    _spare2: [u64; 14],
}

/// `struct fuse_statx_out`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Answer {
    valid_seconds: u64,
    valid_nanoseconds: u32,
    _flags: u32,
    _spare: [u64; 2],
    description: Description,
}

// SAFETY: integers without padding between them.
unsafe impl ByteValued for Request {}
// SAFETY: as above.
unsafe impl ByteValued for Answer {}

impl Request {
    /// The open file that is asked about, if it is not the node.
    pub(super) fn handle(&self) -> Option<u64> {
        (self.flags & FUSE_GETATTR_FH != 0).then_some(self.handle)
    }
}

impl Time {
    fn new(seconds: i64, nanoseconds: i64) -> Self {
        Self { seconds, nanoseconds: nanoseconds as u32, _reserved: 0 }
    }
}

impl Answer {
    /// What `stat` tells, good for `valid`.
    pub(super) fn new(stat: &Stat, valid: Duration) -> Self {
        let attr = &stat.attr;
        // The host tells no time of birth by telling none.
        let birth = if stat.birth == 0 { 0 } else { libc::STATX_BTIME };
        let split = |device| [libc::major(device), libc::minor(device)];
        let description = Description {
            mask: libc::STATX_BASIC_STATS | birth,
            block_size: attr.st_blksize as u32,
            links: attr.st_nlink as u32,
            uid: attr.st_uid,
            gid: attr.st_gid,
            mode: attr.st_mode as u16,
            inode: attr.st_ino,
            size: attr.st_size as u64,
            blocks: attr.st_blocks as u64,
            access: Time::new(attr.st_atime, attr.st_atime_nsec),
            birth: Time::new(stat.birth.div_euclid(1_000_000_000), stat.birth.rem_euclid(1_000_000_000)),
            change: Time::new(attr.st_ctime, attr.st_ctime_nsec),
            modification: Time::new(attr.st_mtime, attr.st_mtime_nsec),
            device: split(attr.st_rdev),
            ..Description::default()
        };
        Self { valid_seconds: valid.as_secs(), valid_nanoseconds: valid.subsec_nanos(), description, ..Self::default() }
    }
}
