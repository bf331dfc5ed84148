//! Directories read.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsRawFd;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};

use super::files::Opened;
use super::handles::Handle;
use super::inodes::Slot;
use super::state::{State, errno};

/// `struct linux_dirent64` up to the name: inode number, offset of the next entry, length of this one, type.
const HEADER_BYTES: usize = 19;
/// Room for the longest entry.
const LEAST_BUFFER: usize = 512;
/// Enough for several hundred entries at once.
const MOST_BUFFER: usize = 32 << 10;

/// Takes an entry into the answer; 0 when there is no room for it.
pub(super) type Add<'a> = dyn FnMut(DirEntry<'_>, Option<Entry>) -> io::Result<usize> + 'a;

impl State {
    pub(super) fn open_directory(&mut self, node: u64) -> io::Result<Opened> {
        let slot = self.inodes.resolve(node)?;
        if self.inodes.node(slot)?.file_type() != libc::S_IFDIR {
            return Err(errno(libc::ENOTDIR));
        }
        let fd = self.inodes.anchor(slot)?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let file = self.host.reopen(fd, flags)?;
        let (handle, _) = self.add_handle(Handle { file, node: slot, flags, position: 0 })?;
        Ok((handle, self.policy.directory))
    }

    /// Hands the entries from `offset` on to `add` until it has no room; with `look_up`, each with its attributes,
    /// counted as a lookup.
    pub(super) fn read_directory(
        &mut self,
        node: u64,
        handle: u64,
        (offset, size): (u64, u32),
        look_up: bool,
        add: &mut Add<'_>,
    ) -> io::Result<()> {
        let slot = self.inodes.resolve(node)?;
        // As much as the answer has room for, which takes more than the host's entries do: with attributes, four times as
        // much for a usual name, and never less than a third more.
        let wanted = if look_up { size as usize / 5 } else { size as usize / 4 * 3 };
        let wanted = wanted.clamp(LEAST_BUFFER, MOST_BUFFER);
        let mut buffer = std::mem::take(&mut self.buffer);
        if buffer.len() < wanted {
            buffer.resize(wanted, 0);
        }
        let result = self.read_into(slot, handle, offset, &mut buffer[..wanted], look_up, add);
        self.buffer = buffer;
        result
    }

    fn read_into(
        &mut self,
        slot: Slot,
        handle: u64,
        offset: u64,
        buffer: &mut [u8],
        look_up: bool,
        add: &mut Add<'_>,
    ) -> io::Result<()> {
        let host = self.host;
        let directory = self.handles.get(handle, slot)?;
        if directory.flags & libc::O_DIRECTORY == 0 {
            return Err(errno(libc::ENOTDIR));
        }
        if directory.position != offset {
            host.seek(&directory.file, i64::try_from(offset).map_err(|_| errno(libc::EINVAL))?, libc::SEEK_SET)?;
        }
        // Not where the guest goes on, unless all that is read below finds room.
        directory.position = u64::MAX;
        let len = host.read_entries(&directory.file, buffer)?;
        let device = host.stat(directory.file.as_raw_fd())?.attr.st_dev;
        let mut position = offset;
        let mut rest = &buffer[..len];
        while let Some((entry, next)) = split_entry(rest) {
            let result = if look_up && !matches!(entry.name, b"." | b"..") {
                self.add_looked_up(slot, entry, add)
            } else {
                let ino = self.inode_number(device, entry.ino);
                add(DirEntry { ino, ..entry }, look_up.then(Entry::default))
            };
            match result {
                Ok(0) => return Ok(()),
                Ok(_) => (position, rest) = (entry.offset, next),
                // What is in the answer has been counted, so it must be given.
                Err(_) if position != offset => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.handles.get(handle, slot)?.position = position;
        Ok(())
    }

    /// Adds an entry with its attributes, unless it is gone by now.
    fn add_looked_up(&mut self, directory: Slot, entry: DirEntry<'_>, add: &mut Add<'_>) -> io::Result<usize> {
        let Some(name) = terminated(entry.name) else { return Ok(1) };
        match self.enter_at(directory, &name) {
            Ok(found) => {
                let result = add(DirEntry { ino: found.attr.st_ino, ..entry }, Some(found));
                if !matches!(result, Ok(1..)) {
                    let slot = self.inodes.resolve(found.inode)?;
                    self.inodes.forget(slot, 1);
                }
                result
            }
            // Node 0: the guest is told the name only.
            Err(_) => add(entry, Some(Entry::default())),
        }
    }
}

fn terminated(name: &[u8]) -> Option<std::ffi::CString> {
    std::ffi::CString::new(name).ok()
}

/// The first entry of what the kernel wrote, and the rest.
fn split_entry(bytes: &[u8]) -> Option<(DirEntry<'_>, &[u8])> {
    let header = bytes.get(..HEADER_BYTES)?;
    let number = |at: usize| header[at..at + 8].try_into().map_or(0, u64::from_ne_bytes);
    let len = usize::from(u16::from_ne_bytes([header[16], header[17]]));
    let name = CStr::from_bytes_until_nul(bytes.get(HEADER_BYTES..len)?).ok()?;
    let entry = DirEntry { ino: number(0), offset: number(8), type_: u32::from(header[18]), name: name.to_bytes() };
    Some((entry, &bytes[len..]))
}
