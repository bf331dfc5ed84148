//! What a guest may cache of a share, in FUSE's terms.

use std::time::Duration;

use fuse_backend_rs::api::filesystem::{FsOptions, OpenOptions};
use hull_vmm_api::config::CachePolicy;

/// `FUSE_SETXATTR_EXT`, which fuse-backend-rs does not name: `FUSE_SETXATTR` says whether to clear the set-group-ID bit.
pub(super) const SETXATTR_EXT: u64 = 1 << 29;
/// `FUSE_DIRECT_IO_ALLOW_MMAP`, which fuse-backend-rs does not name either: files that bypass the page cache can be mapped shared.
const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
/// Of an open file, beyond the protocol: its locks are the guest's own affair (guest-kernel-config/patches/0009).
pub(super) const LOCAL_LOCKS: OpenOptions =
    // SAFETY: any bits are a value of this type; it asks for care only.
    unsafe { OpenOptions::from_bits_unchecked(1 << 31) };
/// "Without limit": longer than any VM lives.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// A cache policy worked out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    /// How long names and attributes stay good.
    pub(super) timeout: Duration,
    /// Whether the guest may remember that a name does not exist.
    pub(super) negative_names: bool,
    /// For each open file.
    pub(super) file: OpenOptions,
    /// For each open directory.
    pub(super) directory: OpenOptions,
    /// What to agree on in `FUSE_INIT`, if the guest offers it.
    pub(super) features: u64,
}

impl Policy {
    pub(super) fn new(cache: CachePolicy) -> Self {
        let common = FsOptions::ASYNC_READ
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::BIG_WRITES
            | FsOptions::DONT_MASK
            | FsOptions::ASYNC_DIO
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::POSIX_ACL
            | FsOptions::MAX_PAGES
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::POSIX_LOCKS
            | FsOptions::FLOCK_LOCKS
            | FsOptions::INIT_EXT;
        let read_ahead = FsOptions::DO_READDIRPLUS | FsOptions::READDIRPLUS_AUTO;
        let common_bits = common.bits() | SETXATTR_EXT;
        match cache {
            CachePolicy::Never => Self {
                timeout: Duration::ZERO,
                negative_names: false,
                file: OpenOptions::DIRECT_IO,
                directory: OpenOptions::empty(),
                features: common_bits | FsOptions::AUTO_INVAL_DATA.bits() | DIRECT_IO_ALLOW_MMAP,
            },
            CachePolicy::Auto => Self {
                timeout: Duration::from_secs(1),
                negative_names: false,
                file: OpenOptions::empty(),
                directory: OpenOptions::empty(),
                features: common_bits | FsOptions::AUTO_INVAL_DATA.bits() | read_ahead.bits(),
            },
            CachePolicy::Always => Self {
                timeout: FOREVER,
                negative_names: true,
                file: OpenOptions::KEEP_CACHE,
                directory: OpenOptions::KEEP_CACHE.union(OpenOptions::CACHE_DIR),
                features: common_bits
                    | (FsOptions::EXPLICIT_INVAL_DATA | FsOptions::CACHE_SYMLINKS | read_ahead).bits(),
            },
        }
    }
}
