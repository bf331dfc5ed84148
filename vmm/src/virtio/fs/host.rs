//! The host's file system calls that a share is made of, each a thin and safe cover over one system call.
//!
//! Nothing here takes a path: a file is a descriptor, or a name in a directory's descriptor. What only exists for paths
//! goes through `/proc/self/fd`, opened while the process could still see it. A thread that uses the calls on extended
//! attributes must have [entered](Host::enter_thread) first.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use super::locks::ranges::{Kind, Range, Segment};

const EMPTY: &CStr = c"";
/// This process's `/proc/self/fd`.
static DESCRIPTORS: OnceLock<OwnedFd> = OnceLock::new();

/// Longest value of an extended attribute, and longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
pub(super) const XATTR_MAX: usize = 64 << 10;

/// What the host tells of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stat {
    pub(super) attr: libc::stat64,
    /// The mount that the file was reached through; 0 where the host does not tell.
    pub(super) mount: u64,
    /// When it was made, in nanoseconds; 0 where the file system does not tell. Tells a file from a later one that
    /// got its inode number.
    pub(super) birth: i64,
}

impl Stat {
    pub(super) fn file_type(&self) -> u32 {
        self.attr.st_mode & libc::S_IFMT
    }
}

/// Access to the host.
#[derive(Clone, Copy)]
pub(super) struct Host {
    /// This process's `/proc/self/fd`.
    descriptors: RawFd,
}

/// A descriptor's number as a name in `/proc/self/fd`.
struct FdName([u8; 12]);

impl FdName {
    fn new(fd: RawFd) -> Self {
        let mut name = [0; 12];
        let mut at = name.len() - 1;
        let mut rest = fd.unsigned_abs();
        loop {
            at -= 1;
            name[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        name.rotate_left(at);
        Self(name)
    }

    fn as_ptr(&self) -> *const libc::c_char {
        self.0.as_ptr().cast()
    }
}

impl Host {
    /// Opens what later calls need, unless it was given ([`Host::use_descriptors`]).
    pub(super) fn new() -> io::Result<Self> {
        if let Some(fd) = DESCRIPTORS.get() {
            return Ok(Self { descriptors: fd.as_raw_fd() });
        }
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        // SAFETY: a terminated string.
        let fd = owned(unsafe { libc::open(c"/proc/self/fd".as_ptr(), flags) })?;
        Ok(Self { descriptors: DESCRIPTORS.get_or_init(|| fd).as_raw_fd() })
    }

    /// Makes `descriptors`, this process's `/proc/self/fd`, what all later calls use.
    pub(super) fn use_descriptors(descriptors: OwnedFd) {
        // The first one stays: it is as good.
        let _ = DESCRIPTORS.set(descriptors);
    }

    /// Gives the calling thread a working directory and a umask of its own, which the calls here rely on, and spares it
    /// the signal that a write beyond the process's file size limit brings: an error will do.
    pub(super) fn enter_thread(self) -> io::Result<()> {
        // SAFETY: the signal set lives here. `fchdir` only affects this thread once it has its own file system context.
        unsafe {
            let mut signals = std::mem::zeroed();
            libc::sigemptyset(&raw mut signals);
            libc::sigaddset(&raw mut signals, libc::SIGXFSZ);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
            check(libc::unshare(libc::CLONE_FS))?;
            check(libc::fchdir(self.descriptors))?;
            libc::umask(0);
        }
        Ok(())
    }

    /// Sets the calling thread's umask.
    pub(super) fn set_umask(self, mask: u32) {
        // SAFETY: no pointers; the thread's own, since it entered.
        unsafe { libc::umask(mask & 0o777) };
    }

    /// Returns freed memory to the system.
    pub(super) fn trim_heap(self) {
        // SAFETY: no pointers.
        unsafe { libc::malloc_trim(0) };
    }

    /// A fanotify(7) group that needs no privilege: for single files, which it names by their handles. Reading from it does not block.
    pub(super) fn new_watch_group(self) -> io::Result<File> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_REPORT_FID
            | libc::FAN_REPORT_DIR_FID
            | libc::FAN_REPORT_NAME;
        // SAFETY: no pointers.
        owned(unsafe { libc::fanotify_init(flags, 0) }).map(File::from)
    }

    /// Changes what the group is told of the file that `fd` stands for: `change` is `FAN_MARK_ADD` or `FAN_MARK_REMOVE`.
    pub(super) fn watch(self, group: RawFd, fd: RawFd, change: libc::c_uint, mask: u64) -> io::Result<()> {
        let name = FdName::new(fd);
        // SAFETY: a terminated string.
        check(unsafe { libc::fanotify_mark(group, change, mask, self.descriptors, name.as_ptr()) })
    }

    /// Has the group told of nothing.
    pub(super) fn unwatch_all(self, group: RawFd) {
        // SAFETY: no path; it can only fail for arguments that are wrong.
        unsafe { libc::fanotify_mark(group, libc::FAN_MARK_FLUSH, 0, libc::AT_FDCWD, std::ptr::null()) };
    }

    /// What fanotify(7) calls the file that `fd` stands for: the number of its file system, the length, type and bytes of its handle.
    pub(super) fn file_id(self, fd: RawFd) -> io::Result<Vec<u8>> {
        const NUMBER: usize = size_of::<libc::fsid_t>();
        const HEADER: usize = size_of::<libc::file_handle>();
        const LONGEST: usize = 128;
        #[repr(C, align(8))]
        struct Handle([u8; HEADER + LONGEST]);
        let mut handle = Handle([0; HEADER + LONGEST]);
        handle.0[..4].copy_from_slice(&(LONGEST as u32).to_ne_bytes());
        let mut mount = 0;
        let mut get = |flags| {
            // SAFETY: a terminated string; the handle is as long as it says.
            check(unsafe {
                libc::name_to_handle_at(fd, EMPTY.as_ptr(), (&raw mut handle).cast(), &raw mut mount, flags)
            })
        };
        // Handles that are good for comparing only (Linux 6.5) are had of more file systems.
        match get(libc::AT_EMPTY_PATH | libc::AT_HANDLE_FID) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => get(libc::AT_EMPTY_PATH)?,
            result => result?,
        }
        // SAFETY: all zeroes is a value of this structure of integers, which the kernel fills in.
        let stat = unsafe {
            let mut stat: libc::statfs64 = std::mem::zeroed();
            check(libc::fstatfs64(fd, &raw mut stat))?;
            stat
        };
        // SAFETY: an array of integers by another name.
        let number: [u8; NUMBER] = unsafe { std::mem::transmute(stat.f_fsid) };
        let len = u32::from_ne_bytes([handle.0[0], handle.0[1], handle.0[2], handle.0[3]]) as usize;
        Ok([&number[..], &handle.0[..HEADER + len.min(LONGEST)]].concat())
    }

    pub(super) fn stat(self, fd: RawFd) -> io::Result<Stat> {
        statx(fd, EMPTY, libc::AT_EMPTY_PATH)
    }

    pub(super) fn stat_at(self, dir: RawFd, name: &CStr) -> io::Result<Stat> {
        statx(dir, name, libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT)
    }

    /// A descriptor that only stands for the file.
    pub(super) fn open_path(self, dir: RawFd, name: &CStr) -> io::Result<OwnedFd> {
        // SAFETY: a terminated string.
        owned(unsafe { libc::openat(dir, name.as_ptr(), libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC) })
    }

    /// Opens the regular file or directory that `fd` stands for.
    pub(super) fn reopen(self, fd: RawFd, flags: i32) -> io::Result<File> {
        let name = FdName::new(fd);
        let open = |flags| {
            // SAFETY: a terminated string.
            owned(unsafe { libc::openat(self.descriptors, name.as_ptr(), flags | libc::O_CLOEXEC | libc::O_NOCTTY) })
        };
        match open(flags) {
            // Only the owner may read without a trace; the guest has asked who that is, but this process may be nobody.
            Err(error) if flags & libc::O_NOATIME != 0 && error.raw_os_error() == Some(libc::EPERM) => {
                open(flags & !libc::O_NOATIME)
            }
            result => result,
        }
        .map(File::from)
    }

    /// Makes a regular file that was not there.
    pub(super) fn create(self, dir: RawFd, name: &CStr, flags: i32, mode: u32) -> io::Result<File> {
        let flags = flags | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NOCTTY;
        // SAFETY: a terminated string.
        owned(unsafe { libc::openat(dir, name.as_ptr(), flags, mode) }).map(File::from)
    }

    /// Makes a regular file without a name.
    pub(super) fn create_unnamed(self, dir: RawFd, flags: i32, mode: u32) -> io::Result<File> {
        let flags = flags | libc::O_TMPFILE | libc::O_CLOEXEC;
        // SAFETY: a terminated string.
        owned(unsafe { libc::openat(dir, c".".as_ptr(), flags, mode) }).map(File::from)
    }

    pub(super) fn make_directory(self, dir: RawFd, name: &CStr, mode: u32) -> io::Result<()> {
        // SAFETY: a terminated string.
        check(unsafe { libc::mkdirat(dir, name.as_ptr(), mode) })
    }

    pub(super) fn make_node(self, dir: RawFd, name: &CStr, mode: u32, device: u32) -> io::Result<()> {
        // SAFETY: a terminated string.
        check(unsafe { libc::mknodat(dir, name.as_ptr(), mode, libc::dev_t::from(device)) })
    }

    pub(super) fn make_symlink(self, target: &CStr, dir: RawFd, name: &CStr) -> io::Result<()> {
        // SAFETY: terminated strings.
        check(unsafe { libc::symlinkat(target.as_ptr(), dir, name.as_ptr()) })
    }

    /// Gives the file that `fd` stands for another name.
    pub(super) fn link(self, fd: RawFd, dir: RawFd, name: &CStr) -> io::Result<()> {
        let source = FdName::new(fd);
        // SAFETY: terminated strings. Following the link in `/proc` ends at the file itself, were it a symlink too.
        check(unsafe { libc::linkat(self.descriptors, source.as_ptr(), dir, name.as_ptr(), libc::AT_SYMLINK_FOLLOW) })
    }

    pub(super) fn unlink(self, dir: RawFd, name: &CStr, flags: i32) -> io::Result<()> {
        // SAFETY: a terminated string.
        check(unsafe { libc::unlinkat(dir, name.as_ptr(), flags) })
    }

    pub(super) fn rename(self, from: (RawFd, &CStr), to: (RawFd, &CStr), flags: u32) -> io::Result<()> {
        // SAFETY: terminated strings.
        check(unsafe { libc::renameat2(from.0, from.1.as_ptr(), to.0, to.1.as_ptr(), flags) })
    }

    pub(super) fn read_link(self, fd: RawFd) -> io::Result<Vec<u8>> {
        let mut target = vec![0; libc::PATH_MAX as usize];
        // SAFETY: the kernel writes at most as much as `target` holds.
        let len = unsafe { libc::readlinkat(fd, EMPTY.as_ptr(), target.as_mut_ptr().cast(), target.len()) };
        target.truncate(length(len)?);
        Ok(target)
    }

    pub(super) fn change_mode(self, fd: RawFd, mode: u32) -> io::Result<()> {
        let name = FdName::new(fd);
        // SAFETY: a terminated string.
        check(unsafe { libc::fchmodat(self.descriptors, name.as_ptr(), mode, 0) })
    }

    /// Changes owner and group; `u32::MAX` leaves one as it is.
    pub(super) fn change_owner(self, fd: RawFd, uid: u32, gid: u32) -> io::Result<()> {
        // SAFETY: a terminated string.
        check(unsafe { libc::fchownat(fd, EMPTY.as_ptr(), uid, gid, libc::AT_EMPTY_PATH) })
    }

    /// Changes the times of last access and modification.
    pub(super) fn change_times(self, fd: RawFd, times: &[libc::timespec; 2]) -> io::Result<()> {
        let name = FdName::new(fd);
        // SAFETY: a terminated string and two times.
        check(unsafe { libc::utimensat(self.descriptors, name.as_ptr(), times.as_ptr(), 0) })
    }

    pub(super) fn stat_file_system(self, fd: RawFd) -> io::Result<libc::statvfs64> {
        // SAFETY: all zeroes is a value of this structure of integers, and the kernel fills in one.
        unsafe {
            let mut stat = std::mem::zeroed();
            check(libc::fstatvfs64(fd, &raw mut stat))?;
            Ok(stat)
        }
    }

    pub(super) fn sync_file_system(self, file: &File) -> io::Result<()> {
        // SAFETY: no pointers.
        check(unsafe { libc::syncfs(file.as_raw_fd()) })
    }

    pub(super) fn allocate(self, file: &File, mode: u32, offset: i64, len: i64) -> io::Result<()> {
        // SAFETY: no pointers.
        check(unsafe { libc::fallocate64(file.as_raw_fd(), mode as i32, offset, len) })
    }

    pub(super) fn seek(self, file: &File, offset: i64, whence: i32) -> io::Result<u64> {
        // SAFETY: no pointers.
        let position = unsafe { libc::lseek64(file.as_raw_fd(), offset, whence) };
        u64::try_from(position).map_err(|_| io::Error::last_os_error())
    }

    pub(super) fn set_append(self, file: &File, append: bool) -> io::Result<()> {
        // SAFETY: no pointers.
        unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            check(flags)?;
            let wanted = if append { flags | libc::O_APPEND } else { flags & !libc::O_APPEND };
            check(libc::fcntl(file.as_raw_fd(), libc::F_SETFL, wanted))
        }
    }

    /// Takes, converts or gives up (`None`) an open file's lock on a stretch of bytes (`F_OFD_SETLK`). Does not wait.
    pub(super) fn lock(self, file: &File, range: Range, kind: Option<Kind>) -> io::Result<()> {
        let lock = record(range, kind);
        // SAFETY: the kernel reads one structure.
        check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
    }

    /// Waits until the lock can be had, and takes it, or until a signal comes.
    pub(super) fn wait_for_lock(self, fd: RawFd, range: Range, kind: Kind) -> io::Result<()> {
        let lock = record(range, Some(kind));
        // SAFETY: the kernel reads one structure.
        check(unsafe { libc::fcntl(fd, libc::F_OFD_SETLKW, &raw const lock) })
    }

    /// Somebody's lock that keeps an open file from having one; `None` if nobody's does.
    pub(super) fn find_lock(self, file: &File, range: Range, kind: Kind) -> io::Result<Option<Segment>> {
        let mut lock = record(range, Some(kind));
        // SAFETY: the kernel reads and writes one structure.
        check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
        let kind = match i32::from(lock.l_type) {
            libc::F_RDLCK => Kind::Shared,
            libc::F_WRLCK => Kind::Exclusive,
            _ => return Ok(None),
        };
        let start = lock.l_start as u64;
        let end = match lock.l_len {
            0 => Range::ALL.end(),
            len => start.saturating_add(len as u64 - 1),
        };
        Ok(Some(Segment { range: Range::new(start, end).unwrap_or(Range::ALL), kind }))
    }

    /// Takes, converts or gives up (`None`) an open file's lock on the file as a whole (`flock`).
    pub(super) fn lock_whole(self, fd: RawFd, kind: Option<Kind>, wait: bool) -> io::Result<()> {
        let operation = match kind {
            None => libc::LOCK_UN,
            Some(Kind::Shared) => libc::LOCK_SH,
            Some(Kind::Exclusive) => libc::LOCK_EX,
        };
        // SAFETY: no pointers.
        check(unsafe { libc::flock(fd, operation | if wait { 0 } else { libc::LOCK_NB }) })
    }

    /// Lets the number `fd` stand for nothing that can be locked. Who waits in a call with it goes on to.
    pub(super) fn blunt(self, fd: RawFd) -> io::Result<()> {
        // SAFETY: no pointers. The caller owns `fd`.
        check(unsafe { libc::dup3(self.descriptors, fd, libc::O_CLOEXEC) })
    }

    pub(super) fn copy_range(self, from: (&File, i64), to: (&File, i64), len: usize) -> io::Result<usize> {
        let (mut from_offset, mut to_offset) = (from.1, to.1);
        // SAFETY: the kernel updates two integers.
        length(unsafe {
            libc::copy_file_range(
                from.0.as_raw_fd(),
                &raw mut from_offset,
                to.0.as_raw_fd(),
                &raw mut to_offset,
                len,
                0,
            )
        })
    }

    /// Reads entries of a directory in the kernel's format (`struct linux_dirent64`).
    pub(super) fn read_entries(self, directory: &File, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the kernel writes at most as much as `buffer` holds.
        let len =
            unsafe { libc::syscall(libc::SYS_getdents64, directory.as_raw_fd(), buffer.as_mut_ptr(), buffer.len()) };
        length(len as isize)
    }

    /// The value of an extended attribute, or with `size` 0 only its length.
    pub(super) fn get_xattr(self, fd: RawFd, name: &CStr, size: u32) -> io::Result<(Vec<u8>, usize)> {
        let path = FdName::new(fd);
        let mut value = vec![0; (size as usize).min(XATTR_MAX)];
        // SAFETY: terminated strings, and the kernel writes at most as much as `value` holds. The path is relative to
        // the thread's working directory, `/proc/self/fd`.
        let len =
            length(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) })?;
        value.truncate(len);
        Ok((value, len))
    }

    /// The names of all extended attributes, or with `size` 0 only their length.
    pub(super) fn list_xattrs(self, fd: RawFd, size: u32) -> io::Result<(Vec<u8>, usize)> {
        let path = FdName::new(fd);
        let mut names = vec![0; (size as usize).min(XATTR_MAX)];
        // SAFETY: as in `get_xattr`.
        let len = length(unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) })?;
        names.truncate(len);
        Ok((names, len))
    }

    pub(super) fn set_xattr(self, fd: RawFd, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let path = FdName::new(fd);
        // SAFETY: terminated strings, and the kernel reads as much as `value` holds.
        check(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags as i32) })
    }

    pub(super) fn remove_xattr(self, fd: RawFd, name: &CStr) -> io::Result<()> {
        let path = FdName::new(fd);
        // SAFETY: terminated strings.
        check(unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) })
    }
}

fn record(range: Range, kind: Option<Kind>) -> libc::flock64 {
    // SAFETY: all zeroes is a value of this structure of integers.
    let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
    lock.l_type = match kind {
        None => libc::F_UNLCK,
        Some(Kind::Shared) => libc::F_RDLCK,
        Some(Kind::Exclusive) => libc::F_WRLCK,
    } as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = range.start() as i64;
    // No length goes to the end of all files.
    lock.l_len = if range.end() == Range::ALL.end() { 0 } else { (range.end() - range.start() + 1) as i64 };
    lock
}

fn statx(dir: RawFd, name: &CStr, flags: i32) -> io::Result<Stat> {
    let mask = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;
    // SAFETY: a terminated string; all zeroes is a value of these structures of integers, and the kernel fills in one.
    let (raw, mut attr) = unsafe {
        let mut raw: libc::statx = std::mem::zeroed();
        check(libc::statx(dir, name.as_ptr(), flags, mask, &raw mut raw))?;
        (raw, std::mem::zeroed::<libc::stat64>())
    };
    attr.st_dev = libc::makedev(raw.stx_dev_major, raw.stx_dev_minor);
    attr.st_ino = raw.stx_ino;
    attr.st_mode = u32::from(raw.stx_mode);
    attr.st_nlink = libc::nlink_t::from(raw.stx_nlink);
    attr.st_uid = raw.stx_uid;
    attr.st_gid = raw.stx_gid;
    attr.st_rdev = libc::makedev(raw.stx_rdev_major, raw.stx_rdev_minor);
    attr.st_size = raw.stx_size as i64;
    attr.st_blocks = raw.stx_blocks as i64;
    attr.st_blksize = libc::blksize_t::from(raw.stx_blksize);
    (attr.st_atime, attr.st_atime_nsec) = (raw.stx_atime.tv_sec, i64::from(raw.stx_atime.tv_nsec));
    (attr.st_mtime, attr.st_mtime_nsec) = (raw.stx_mtime.tv_sec, i64::from(raw.stx_mtime.tv_nsec));
    (attr.st_ctime, attr.st_ctime_nsec) = (raw.stx_ctime.tv_sec, i64::from(raw.stx_ctime.tv_nsec));
    let has = |bit: libc::c_uint| raw.stx_mask & bit != 0;
    let birth = if has(libc::STATX_BTIME) {
        raw.stx_btime.tv_sec.wrapping_mul(1_000_000_000).wrapping_add(i64::from(raw.stx_btime.tv_nsec))
    } else {
        0
    };
    Ok(Stat { attr, mount: if has(libc::STATX_MNT_ID) { raw.stx_mnt_id } else { 0 }, birth })
}

/// Raises this process's limit of open descriptors as far as it may, and returns it.
pub(super) fn raise_descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: one structure, which the kernel fills in or reads.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
            if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) == 0 {
                limit = raised;
            }
        }
    }
    limit.rlim_cur
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn length(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    check(fd)?;
    // SAFETY: a descriptor that a system call has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_numbers_become_names() {
        for fd in [0, 7, 10, 1_048_576, i32::MAX] {
            let name = FdName::new(fd);
            assert_eq!(CStr::from_bytes_until_nul(&name.0).unwrap().to_str().unwrap(), fd.to_string());
        }
    }
}
