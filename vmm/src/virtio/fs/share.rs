//! A share as the FUSE server of fuse-backend-rs calls it: one short method for each request, the work in [`State`].
//!
//! That crate's own `PassthroughFs` (0.14) is not used. It
//!
//! - opens its root, and the root of each mount that it meets, by an absolute path, and reads `/proc/self/mountinfo`;
//! - keeps a descriptor for each file that the guest knows, or else opens by file handle, which takes
//!   `CAP_DAC_READ_SEARCH` over the host and a file system that has handles, which an overlay has not;
//! - becomes the user who asks with all that it loses: supplementary groups do not count, devices cannot be made;
//! - applies the umask itself, so that default ACLs do not replace it, and offers no ACLs;
//! - looks up `..`, passes `open` flags on unseen (`O_TRUNC` on a file opened for reading, `O_TMPFILE`), hides `.` and `..`;
//! - gives each mount of one file system a node of its own for one file, so that two containers that share a volume
//!   do not meet on its sockets or in its page cache;
//! - bounds neither handles nor files.

use std::ffi::CStr;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid, ZeroCopyReader,
};

use super::names::Make;
use super::state::{State, errno};

/// A shared directory.
pub(super) struct Share(Mutex<State>);

impl Share {
    pub(super) fn new(state: State) -> Self {
        Self(Mutex::new(state))
    }

    /// The share's state; its tables are consistent between any two requests.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    fn destroy(&self) {
        self.state().clear();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.state().lookup(parent, name)
    }

    fn forget(&self, _: &Context, node: u64, count: u64) {
        let mut state = self.state();
        if let Ok(slot) = state.inodes.resolve(node) {
            state.inodes.forget(slot, count);
        }
    }

    fn batch_forget(&self, context: &Context, requests: Vec<(u64, u64)>) {
        for (node, count) in requests {
            self.forget(context, node, count);
        }
    }

    fn getattr(&self, _: &Context, node: u64, handle: Option<u64>) -> io::Result<(libc::stat64, Duration)> {
        let mut state = self.state();
        Ok((state.get_attributes(node, handle)?, state.policy.timeout))
    }

    fn setattr(
        &self,
        context: &Context,
        node: u64,
        attr: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        let mut state = self.state();
        Ok((state.set_attributes(context, node, handle, &attr, valid)?, state.policy.timeout))
    }

    fn readlink(&self, _: &Context, node: u64) -> io::Result<Vec<u8>> {
        self.state().read_link(node)
    }

    fn symlink(&self, context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.state().make(context, parent, name, 0, &Make::Symlink { target })
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.state().make(context, parent, name, umask, &Make::Node { mode, device })
    }

    fn mkdir(&self, context: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        self.state().make(context, parent, name, umask, &Make::Directory { mode })
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.state().remove(parent, name, 0)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.state().remove(parent, name, libc::AT_REMOVEDIR)
    }

    fn rename(
        &self,
        _: &Context,
        parent: u64,
        name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.state().rename((parent, name), (new_parent, new_name), flags)
    }

    fn link(&self, _: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.state().link(node, parent, name)
    }

    fn open(
        &self,
        context: &Context,
        node: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let (handle, options) = self.state().open(context, node, flags, fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        how: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let (entry, (handle, options)) = self.state().create(context, parent, name, &how)?;
        Ok((entry, Some(handle), options, None))
    }

    fn write(
        &self,
        context: &Context,
        node: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        len: u32,
        offset: u64,
        _: Option<u64>,
        _: bool,
        flags: u32,
        write_flags: u32,
    ) -> io::Result<usize> {
        self.state().write(context, (node, handle), from, (len, offset), (flags, write_flags))
    }

    fn flush(&self, _: &Context, node: u64, _: u64, owner: u64) -> io::Result<()> {
        // There is nothing to write back. This answer spares the guest to ask again, but for files that processes have locked.
        if self.state().flush_locks(node, owner) { Ok(()) } else { Err(errno(libc::ENOSYS)) }
    }

    fn fsync(&self, _: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.state().sync(node, handle, data_only)
    }

    fn fallocate(&self, context: &Context, node: u64, handle: u64, mode: u32, offset: u64, len: u64) -> io::Result<()> {
        self.state().allocate(context, node, handle, mode, (offset, len))
    }

    fn release(&self, _: &Context, node: u64, _: u32, handle: u64, _: bool, _: bool, _: Option<u64>) -> io::Result<()> {
        self.state().close(node, handle)
    }

    fn statfs(&self, _: &Context, node: u64) -> io::Result<libc::statvfs64> {
        self.state().stat_file_system(node)
    }

    fn setxattr(&self, context: &Context, node: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        self.state().set_xattr(context, node, name, value, (flags, false))
    }

    fn getxattr(&self, _: &Context, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.state().get_xattr(node, name, size)
    }

    fn listxattr(&self, _: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        self.state().list_xattrs(node, size)
    }

    fn removexattr(&self, _: &Context, node: u64, name: &CStr) -> io::Result<()> {
        self.state().remove_xattr(node, name)
    }

    fn opendir(&self, _: &Context, node: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, options) = self.state().open_directory(node)?;
        Ok((Some(handle), options))
    }

    fn readdir(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.state().read_directory(node, handle, (offset, size), false, &mut |entry, _| add(entry))
    }

    fn readdirplus(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut add = |entry: DirEntry<'_>, found: Option<Entry>| add(entry, found.unwrap_or_default());
        self.state().read_directory(node, handle, (offset, size), true, &mut add)
    }

    fn fsyncdir(&self, _: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.state().sync(node, handle, data_only)
    }

    fn releasedir(&self, _: &Context, node: u64, _: u32, handle: u64) -> io::Result<()> {
        self.state().close(node, handle)
    }

    fn lseek(&self, _: &Context, node: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.state().seek(node, handle, offset, whence)
    }
}
