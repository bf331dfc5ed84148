//! What fanotify(7) tells: its events taken apart.
//!
//! Other than inotify(7) it says which process has done something, which is how what the guest itself does through this
//! process is told from what others do. A group that reports files by their handles needs no privilege (Linux 5.13); it
//! then hears of other processes as of number 0.

/// Bytes of an event before what it is about (`struct fanotify_event_metadata`).
const METADATA_BYTES: usize = 24;
const VERSION: u8 = 3;
/// Bytes of a piece of information before its file (`struct fanotify_event_info_header`).
const INFO_BYTES: usize = 4;
/// Bytes of a file before its handle's own: the file system's number, the handle's length and type.
const FILE_BYTES: usize = 16;

// `FAN_EVENT_INFO_TYPE_*` of linux/fanotify.h.
const INFO_FID: u8 = 1;
const INFO_DFID_NAME: u8 = 2;
const INFO_DFID: u8 = 3;
const INFO_OLD_DFID_NAME: u8 = 10;
const INFO_NEW_DFID_NAME: u8 = 12;

/// One event.
pub(super) struct Event<'a> {
    /// `FAN_*`.
    pub(super) mask: u64,
    pub(super) process: i32,
    infos: &'a [u8],
}

/// What an event is about. A file is its [`FileId`](super::FileId)'s bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum About<'a> {
    File(&'a [u8]),
    /// An entry of a directory, by that and its name.
    Entry(&'a [u8], &'a [u8]),
    /// What an entry was before it was renamed.
    OldEntry(&'a [u8], &'a [u8]),
    NewEntry(&'a [u8], &'a [u8]),
}

/// The events that one read(2) returned.
pub(super) fn events(mut bytes: &[u8]) -> impl Iterator<Item = Event<'_>> {
    std::iter::from_fn(move || {
        let metadata = bytes.get(..METADATA_BYTES)?;
        let u32_at = |at: usize| Some(u32::from_ne_bytes(metadata.get(at..at + 4)?.try_into().ok()?));
        let (len, start) = (u32_at(0)? as usize, usize::from(u16::from_ne_bytes([metadata[6], metadata[7]])));
        if metadata[4] != VERSION || start < METADATA_BYTES || len < start {
            return None;
        }
        let mask = u64::from_ne_bytes(metadata[8..16].try_into().ok()?);
        let process = u32_at(20)?.cast_signed();
        let infos = bytes.get(start..len)?;
        bytes = &bytes[len..];
        Some(Event { mask, process, infos })
    })
}

impl<'a> Event<'a> {
    /// What it is about; kinds of information that are not known are left out.
    pub(super) fn abouts(&self) -> impl Iterator<Item = About<'a>> + use<'a> {
        let mut rest = self.infos;
        std::iter::from_fn(move || {
            loop {
                let header = rest.get(..INFO_BYTES)?;
                let (kind, len) = (header[0], usize::from(u16::from_ne_bytes([header[2], header[3]])));
                let info = rest.get(INFO_BYTES..len)?;
                rest = &rest[len..];
                if let Some(about) = about(kind, info) {
                    return Some(about);
                }
            }
        })
    }
}

fn about(kind: u8, info: &[u8]) -> Option<About<'_>> {
    let handle_bytes = u32::from_ne_bytes(info.get(8..12)?.try_into().ok()?) as usize;
    let (file, name) = info.split_at_checked(FILE_BYTES.checked_add(handle_bytes)?)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    match kind {
        INFO_FID | INFO_DFID => Some(About::File(file)),
        // What happens to a directory itself.
        INFO_DFID_NAME if name == b"." || name.is_empty() => Some(About::File(file)),
        INFO_DFID_NAME => Some(About::Entry(file, name)),
        INFO_OLD_DFID_NAME => Some(About::OldEntry(file, name)),
        INFO_NEW_DFID_NAME => Some(About::NewEntry(file, name)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(handle: &[u8]) -> Vec<u8> {
        let parts = [&7_u64.to_ne_bytes()[..], &(handle.len() as u32).to_ne_bytes(), &1_u32.to_ne_bytes(), handle];
        parts.concat()
    }

    fn info(kind: u8, file: &[u8], name: &[u8]) -> Vec<u8> {
        let mut body = [file, name].concat();
        body.resize(body.len().next_multiple_of(4), 0);
        [&[kind, 0][..], &((INFO_BYTES + body.len()) as u16).to_ne_bytes(), &body].concat()
    }

    fn event(mask: u64, process: i32, infos: &[Vec<u8>]) -> Vec<u8> {
        let infos = infos.concat();
        let mut bytes = ((METADATA_BYTES + infos.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend([VERSION, 0]);
        bytes.extend((METADATA_BYTES as u16).to_ne_bytes());
        bytes.extend(mask.to_ne_bytes());
        bytes.extend((-1_i32).to_ne_bytes());
        bytes.extend(process.to_ne_bytes());
        bytes.extend(infos);
        bytes
    }

    #[test]
    fn events_are_taken_apart() {
        let (dir, child) = (file(b"directory"), file(b"child"));
        let bytes = [
            event(libc::FAN_MODIFY, 0, &[info(INFO_DFID_NAME, &dir, b"name\0"), info(INFO_FID, &child, b"")]),
            event(libc::FAN_OPEN, 5, &[info(77, &dir, b"x\0"), info(INFO_DFID_NAME, &dir, b".\0")]),
            event(
                libc::FAN_RENAME,
                0,
                &[info(INFO_OLD_DFID_NAME, &dir, b"a\0"), info(INFO_NEW_DFID_NAME, &child, b"bcdefgh\0")],
            ),
            event(libc::FAN_Q_OVERFLOW, 0, &[]),
        ]
        .concat();
        let seen: Vec<_> = events(&bytes).map(|e| (e.mask, e.process, e.abouts().collect::<Vec<_>>())).collect();
        let expected = vec![
            (libc::FAN_MODIFY, 0, vec![About::Entry(&dir, b"name"), About::File(&child)]),
            (libc::FAN_OPEN, 5, vec![About::File(&dir)]),
            (libc::FAN_RENAME, 0, vec![About::OldEntry(&dir, b"a"), About::NewEntry(&child, b"bcdefgh")]),
            (libc::FAN_Q_OVERFLOW, 0, vec![]),
        ];
        assert_eq!(seen, expected);
    }

    proptest! {
        #[test]
        fn no_bytes_are_read_beyond_their_end(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0_usize..100) {
            let good = event(libc::FAN_MODIFY, 0, &[info(INFO_DFID_NAME, &file(b"directory"), b"name\0"), bytes.clone()]);
            for bytes in [&bytes[..], &good, &good[..cut.min(good.len())]] {
                for event in events(bytes) {
                    event.abouts().for_each(drop);
                }
            }
        }
    }
}
