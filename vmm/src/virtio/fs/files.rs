//! Files once found: opened, read, written, described.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use fuse_backend_rs::abi::fuse_abi::WRITE_KILL_PRIV;
use fuse_backend_rs::api::filesystem::{
    Context, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid, ZeroCopyReader,
};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use hull_vmm_api::broker::Request;

use super::broker::Broker;
use super::handles::Handle;
use super::host::{Stat, XATTR_MAX};
use super::inodes::Slot;
use super::policy::LOCAL_LOCKS;
use super::state::{State, errno};

/// What of a guest's `open` flags reaches the host. Not `O_DIRECT`, for which guest memory is not aligned: such a file
/// bypasses the guest's cache, not the host's. Not `O_NONBLOCK`, `O_NOFOLLOW` and the like, which the guest's kernel has acted on.
pub(super) const PASSED_FLAGS: i32 =
    libc::O_ACCMODE | libc::O_APPEND | libc::O_TRUNC | libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME;

/// Most bytes that one request copies from file to file; a guest goes on where it ended.
const MAX_COPY: usize = 32 << 20;

/// The answer to an `open`: the handle and what the guest may cache.
pub(super) type Opened = (u64, OpenOptions);

/// Where and how much to copy.
pub(super) struct CopyRange {
    pub(super) from: (u64, u64, u64),
    pub(super) to: (u64, u64, u64),
    pub(super) len: u64,
    pub(super) flags: u64,
}

impl State {
    pub(super) fn open(&mut self, context: &Context, node: u64, flags: u32, kill_set_id: bool) -> io::Result<Opened> {
        let slot = self.inodes.resolve(node)?;
        self.change_as(context, !kill_set_id)?;
        self.open_node(slot, flags as i32)
    }

    pub(super) fn open_node(&mut self, slot: Slot, flags: i32) -> io::Result<Opened> {
        // Whatever else it is, opening it could block, or act on a device of the host.
        if self.inodes.node(slot)?.file_type() != libc::S_IFREG {
            return Err(errno(libc::ENXIO));
        }
        if self.read_only && flags & (libc::O_ACCMODE | libc::O_TRUNC) != libc::O_RDONLY {
            return Err(errno(libc::EROFS));
        }
        let fd = self.inodes.anchor(slot)?;
        let file = match self.host.reopen(fd, flags & PASSED_FLAGS) {
            Err(error) if error.raw_os_error() == Some(libc::EROFS) => {
                // The same file may be on two mounts, and the newer name on one that can be written.
                let place = self.inodes.node(slot)?.place().map(|(parent, name)| (parent, name.to_owned()));
                let (parent, name) = place.ok_or(error)?;
                let directory = self.inodes.anchor(parent)?;
                let other = self.host.open_path(directory, &name)?;
                let stat = self.host.stat(other.as_raw_fd())?;
                if self.inodes.find(&stat) != Some(slot) {
                    return Err(errno(libc::ESTALE));
                }
                self.host.reopen(other.as_raw_fd(), flags & PASSED_FLAGS)
            }
            result => result,
        }?;
        self.add_handle(Handle { file, node: slot, flags, position: 0 })
    }

    pub(super) fn add_handle(&mut self, handle: Handle) -> io::Result<Opened> {
        let slot = handle.node;
        let number = self.handles.add(handle)?;
        self.inodes.hold(slot);
        let private = self.private.as_ref().is_some_and(|name| self.inodes.is_below(slot, name));
        Ok((number, if private { self.policy.file.union(LOCAL_LOCKS) } else { self.policy.file }))
    }

    pub(super) fn close(&mut self, node: u64, handle: u64) -> io::Result<()> {
        let slot = self.inodes.resolve(node)?;
        self.handles.get(handle, slot)?;
        self.release_locks(slot, handle);
        self.handles.remove(handle, slot)?;
        self.inodes.release(slot);
        Ok(())
    }

    pub(super) fn handle(&mut self, node: u64, handle: u64) -> io::Result<&mut Handle> {
        let slot = self.inodes.resolve(node)?;
        self.handles.get(handle, slot)
    }

    pub(super) fn read(
        &mut self,
        node: u64,
        handle: u64,
        to: &[FileVolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<usize> {
        self.handle(node, handle)?.file.read_vectored_at_volatile(to, offset)
    }

    pub(super) fn write(
        &mut self,
        context: &Context,
        (node, handle): (u64, u64),
        from: &mut dyn ZeroCopyReader,
        (len, offset): (u32, u64),
        (open_flags, write_flags): (u32, u32),
    ) -> io::Result<usize> {
        self.change_as(context, write_flags & WRITE_KILL_PRIV == 0)?;
        let host = self.host;
        let handle = self.handle(node, handle)?;
        let append = open_flags as i32 & libc::O_APPEND;
        if handle.flags & libc::O_APPEND != append {
            host.set_append(&handle.file, append != 0)?;
            handle.flags = handle.flags & !libc::O_APPEND | append;
        }
        from.read_to(&mut handle.file, len as usize, offset)
    }

    pub(super) fn sync(&mut self, node: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let file = &self.handle(node, handle)?.file;
        if data_only { file.sync_data() } else { file.sync_all() }
    }

    /// Syncs the file systems of the root and of all files open for writing.
    pub(super) fn sync_all(&mut self) -> io::Result<()> {
        let root = self.inodes.anchor(super::inodes::ROOT)?;
        self.host.sync_file_system(&self.host.reopen(root, libc::O_RDONLY | libc::O_DIRECTORY)?)?;
        let mut synced = vec![self.host.stat(root)?.attr.st_dev];
        for (_, handle) in self.handles.iter().filter(|(_, handle)| handle.flags & libc::O_ACCMODE != 0) {
            let device = self.host.stat(handle.file.as_raw_fd())?.attr.st_dev;
            if !synced.contains(&device) {
                self.host.sync_file_system(&handle.file)?;
                synced.push(device);
            }
        }
        Ok(())
    }

    pub(super) fn allocate(
        &mut self,
        context: &Context,
        node: u64,
        handle: u64,
        mode: u32,
        range: (u64, u64),
    ) -> io::Result<()> {
        let (offset, len) = (signed(range.0)?, signed(range.1)?);
        self.change_as(context, may_keep_set_id(context))?;
        let host = self.host;
        host.allocate(&self.handle(node, handle)?.file, mode, offset, len)
    }

    pub(super) fn seek(&mut self, node: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let whence = whence as i32;
        // All other seeking is the guest's own affair.
        if !matches!(whence, libc::SEEK_DATA | libc::SEEK_HOLE) {
            return Err(errno(libc::EINVAL));
        }
        let host = self.host;
        // The host knows which error a position before the beginning is.
        host.seek(&self.handle(node, handle)?.file, offset as i64, whence)
    }

    pub(super) fn copy(&mut self, context: &Context, range: &CopyRange) -> io::Result<usize> {
        if range.flags != 0 {
            return Err(errno(libc::EINVAL));
        }
        let (from_offset, to_offset) = (signed(range.from.2)?, signed(range.to.2)?);
        let len = usize::try_from(range.len).unwrap_or(usize::MAX).min(MAX_COPY);
        self.change_as(context, may_keep_set_id(context))?;
        let host = self.host;
        let from = self.handle(range.from.0, range.from.1)?.file.try_clone()?;
        let to = &self.handle(range.to.0, range.to.1)?.file;
        host.copy_range((&from, from_offset), (to, to_offset), len)
    }

    pub(super) fn get_attributes(&mut self, node: u64, handle: Option<u64>) -> io::Result<libc::stat64> {
        self.describe(node, handle).map(|stat| stat.attr)
    }

    /// What the guest is to see of a file, with the time of birth.
    pub(super) fn describe(&mut self, node: u64, handle: Option<u64>) -> io::Result<Stat> {
        let slot = self.inodes.resolve(node)?;
        let stat = match handle {
            Some(handle) => self.host.stat(self.handles.get(handle, slot)?.file.as_raw_fd())?,
            None => self.inodes.stat(slot)?,
        };
        Ok(Stat { attr: self.attributes(&stat), ..stat })
    }

    pub(super) fn set_attributes(
        &mut self,
        context: &Context,
        node: u64,
        handle: Option<u64>,
        attr: &libc::stat64,
        valid: SetattrValid,
    ) -> io::Result<libc::stat64> {
        let slot = self.inodes.resolve(node)?;
        let fd = match handle {
            Some(handle) => self.handles.get(handle, slot)?.file.as_raw_fd(),
            None => self.inodes.anchor(slot)?,
        };
        self.keep_set_id(true);
        if valid.contains(SetattrValid::MODE) {
            self.host.change_mode(fd, attr.st_mode & 0o7777)?;
        }
        let uid = if valid.contains(SetattrValid::UID) { attr.st_uid } else { u32::MAX };
        let gid = if valid.contains(SetattrValid::GID) { attr.st_gid } else { u32::MAX };
        // Without anything to set it is chown(2) to no owner and no group, which clears set-user-ID bits all the same.
        if (uid, gid) != (u32::MAX, u32::MAX) || valid.is_empty() {
            // The flag for clearing set-group-ID bits comes with each change of owner, whoever makes it. Of the groups of a user who
            // may change the group, one is known here.
            let keep = may_keep_set_id(context) || self.host.stat(fd)?.attr.st_gid == context.gid;
            self.change_as(context, keep)?;
            self.host.change_owner(fd, uid, gid)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            self.change_as(context, !valid.contains(SetattrValid::KILL_SUIDGID))?;
            self.set_size(slot, fd, handle, attr.st_size)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |set, now, seconds, nanoseconds| {
                let tv_nsec = match (valid.contains(set), valid.contains(now)) {
                    (true, true) => libc::UTIME_NOW,
                    (true, false) => nanoseconds,
                    _ => libc::UTIME_OMIT,
                };
                libc::timespec { tv_sec: seconds, tv_nsec }
            };
            let times = [
                time(SetattrValid::ATIME, SetattrValid::ATIME_NOW, attr.st_atime, attr.st_atime_nsec),
                time(SetattrValid::MTIME, SetattrValid::MTIME_NOW, attr.st_mtime, attr.st_mtime_nsec),
            ];
            self.host.change_times(fd, &times)?;
        }
        let stat = self.host.stat(fd)?;
        Ok(self.attributes(&stat))
    }

    fn set_size(&mut self, slot: Slot, fd: RawFd, handle: Option<u64>, size: i64) -> io::Result<()> {
        let size = u64::try_from(size).map_err(|_| errno(libc::EFBIG))?;
        if self.inodes.node(slot)?.file_type() != libc::S_IFREG {
            return Err(errno(libc::EINVAL));
        }
        match handle {
            Some(handle) => self.handles.get(handle, slot)?.file.set_len(size),
            None => self.host.reopen(fd, libc::O_WRONLY)?.set_len(size),
        }
    }

    pub(super) fn read_link(&mut self, node: u64) -> io::Result<Vec<u8>> {
        let slot = self.inodes.resolve(node)?;
        if self.inodes.node(slot)?.file_type() != libc::S_IFLNK {
            return Err(errno(libc::EINVAL));
        }
        let fd = self.inodes.anchor(slot)?;
        self.host.read_link(fd)
    }

    pub(super) fn stat_file_system(&mut self, node: u64) -> io::Result<libc::statvfs64> {
        let slot = self.inodes.resolve(node)?;
        let fd = self.inodes.anchor(slot)?;
        self.host.stat_file_system(fd)
    }

    pub(super) fn get_xattr(&mut self, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let slot = self.inodes.resolve(node)?;
        let fd = self.inodes.anchor(slot)?;
        let (value, len) = match &self.broker {
            Some(broker) if Broker::is_trusted(name) => {
                let value = broker.ask(fd, &Request::GetAttribute { name: name.to_bytes() })?;
                let len = value.len();
                (value, len)
            }
            _ => self.host.get_xattr(fd, name, size)?,
        };
        within(size, len)?;
        Ok(if size == 0 { GetxattrReply::Count(len as u32) } else { GetxattrReply::Value(value) })
    }

    pub(super) fn list_xattrs(&mut self, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let slot = self.inodes.resolve(node)?;
        let fd = self.inodes.anchor(slot)?;
        let (names, len) = match &self.broker {
            Some(broker) => {
                let mut names = match self.host.list_xattrs(fd, 0)? {
                    (none, 0) => none,
                    _ => self.host.list_xattrs(fd, XATTR_MAX as u32)?.0,
                };
                // What the file has besides is listed in any case.
                names.extend(broker.ask(fd, &Request::ListTrusted).unwrap_or_default());
                let len = names.len();
                (names, len)
            }
            None => self.host.list_xattrs(fd, size)?,
        };
        within(size, len)?;
        Ok(if size == 0 { ListxattrReply::Count(len as u32) } else { ListxattrReply::Names(names) })
    }

    /// Sets an extended attribute; with `kill_set_gid`, an access ACL also clears the set-group-ID bit, since the user who
    /// sets it is not in the file's group.
    pub(super) fn set_xattr(
        &mut self,
        context: &Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: (u32, bool),
    ) -> io::Result<()> {
        let slot = self.inodes.resolve(node)?;
        let fd = self.inodes.anchor(slot)?;
        let (flags, kill_set_gid) = flags;
        if kill_set_gid {
            self.create_as(context, 0)?;
        }
        self.keep_set_id(!kill_set_gid);
        match (self.host.set_xattr(fd, name, value, flags), &self.broker) {
            (Err(error), Some(broker)) if Broker::may_help(&error, name) => {
                broker.ask(fd, &Request::SetAttribute { name: name.to_bytes(), value, flags }).map(drop)
            }
            (result, _) => result,
        }
    }

    pub(super) fn remove_xattr(&mut self, node: u64, name: &CStr) -> io::Result<()> {
        let slot = self.inodes.resolve(node)?;
        let fd = self.inodes.anchor(slot)?;
        match (self.host.remove_xattr(fd, name), &self.broker) {
            (Err(error), Some(broker)) if Broker::may_help(&error, name) => {
                broker.ask(fd, &Request::RemoveAttribute { name: name.to_bytes() }).map(drop)
            }
            (result, _) => result,
        }
    }
}

/// Refuses an answer of `len` bytes for which there is not enough room; none at all asks for its length only.
fn within(size: u32, len: usize) -> io::Result<()> {
    if size != 0 && len > size as usize { Err(errno(libc::ERANGE)) } else { Ok(()) }
}

/// Whether a user's change leaves set-user-ID bits alone, where the request has no flag that says so. Who has the capability
/// for it in the guest is not told, and but for rare cases it is root.
fn may_keep_set_id(context: &Context) -> bool {
    context.uid == 0
}

/// An offset or length as the host takes it.
fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| errno(libc::EINVAL))
}
