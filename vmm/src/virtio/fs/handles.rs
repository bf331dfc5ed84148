//! Files and directories that the guest has open.

use std::fs::File;
use std::io;

use super::inodes::Slot;

/// An open file or directory.
pub(super) struct Handle {
    pub(super) file: File,
    pub(super) node: Slot,
    /// The guest's `open` flags, as far as they were honoured.
    pub(super) flags: i32,
    /// Where a directory's descriptor stands, which saves seeking in a scan.
    pub(super) position: u64,
}

#[derive(Default)]
struct Entry {
    generation: u32,
    handle: Option<Handle>,
}

/// The table.
pub(super) struct Handles {
    entries: Vec<Entry>,
    free: Vec<u32>,
    max: usize,
}

impl Handles {
    /// A table for at most `max` handles.
    pub(super) fn new(max: usize) -> Self {
        Self { entries: Vec::new(), free: Vec::new(), max }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::new(self.max);
    }

    /// Adds a handle; returns the guest's number for it.
    pub(super) fn add(&mut self, handle: Handle) -> io::Result<u64> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.entries.len() < self.max => {
                self.entries.push(Entry::default());
                self.entries.len() as u32 - 1
            }
            None => return Err(io::Error::from_raw_os_error(libc::ENFILE)),
        };
        let entry = &mut self.entries[index as usize];
        entry.handle = Some(handle);
        Ok(number(index, entry.generation))
    }

    /// The handle of a guest's number, if it is open on `node`.
    pub(super) fn get(&mut self, number: u64, node: Slot) -> io::Result<&mut Handle> {
        (number as u32)
            .checked_sub(1)
            .and_then(|index| self.entries.get_mut(index as usize))
            .filter(|entry| u64::from(entry.generation) == number >> 32)
            .and_then(|entry| entry.handle.as_mut())
            .filter(|handle| handle.node == node)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Closes a handle.
    pub(super) fn remove(&mut self, number: u64, node: Slot) -> io::Result<()> {
        self.get(number, node)?;
        let index = number as u32 - 1;
        let entry = &mut self.entries[index as usize];
        entry.handle = None;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(index);
        Ok(())
    }

    /// All open handles with their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Handle)> {
        (0_u32..)
            .zip(&self.entries)
            .filter_map(|(index, entry)| entry.handle.as_ref().map(|handle| (number(index, entry.generation), handle)))
    }

    /// Puts back a handle under the number that it had, before any other is added.
    pub(super) fn insert_saved(&mut self, number: u64, handle: Handle) -> bool {
        let Some(index) = (number as u32).checked_sub(1) else { return false };
        if index as usize >= self.max {
            return false;
        }
        while self.entries.len() <= index as usize {
            self.free.push(self.entries.len() as u32);
            self.entries.push(Entry::default());
        }
        let entry = &mut self.entries[index as usize];
        if entry.handle.is_some() {
            return false;
        }
        *entry = Entry { generation: (number >> 32) as u32, handle: Some(handle) };
        self.free.retain(|free| *free != index);
        true
    }
}

fn number(index: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(node: u32) -> Handle {
        Handle { file: File::open("/dev/null").unwrap(), node: Slot(node), flags: 0, position: 0 }
    }

    #[test]
    fn a_number_is_good_for_its_node_until_it_is_closed() {
        let mut handles = Handles::new(2);
        let first = handles.add(handle(5)).unwrap();
        assert!(handles.get(first, Slot(5)).is_ok());
        assert!(handles.get(first, Slot(6)).is_err());
        assert!(handles.get(0, Slot(5)).is_err());
        assert!(handles.remove(first, Slot(6)).is_err());
        handles.remove(first, Slot(5)).unwrap();
        let second = handles.add(handle(5)).unwrap();
        assert_ne!(first, second);
        assert!(handles.get(first, Slot(5)).is_err());
        handles.add(handle(5)).unwrap();
        assert!(handles.add(handle(5)).is_err());
    }

    #[test]
    fn saved_handles_keep_their_numbers() {
        let mut handles = Handles::new(10);
        assert!(handles.insert_saved(3 << 32 | 4, handle(1)));
        assert!(!handles.insert_saved(4 << 32 | 4, handle(1)));
        assert!(!handles.insert_saved(0, handle(1)));
        assert!(!handles.insert_saved(11, handle(1)));
        assert!(handles.get(3 << 32 | 4, Slot(1)).is_ok());
        for _ in 0..9 {
            handles.add(handle(2)).unwrap();
        }
        assert!(handles.add(handle(2)).is_err());
    }
}
