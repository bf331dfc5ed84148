//! What the guest watches (inotify(7)), and what others do to it.
//!
//! A guest's kernel tells of what its own programs do and knows of nothing else, so it says which files are watched
//! (`FUSE_WATCH`) and has a request on the way (`FUSE_WATCH_EVENTS`) that is answered when others have changed one. Both
//! are Hull's own (guest-kernel-config/patches/0011).
//!
//! ```text
//!   FUSE_WATCH ────────▶ watched ──── fanotify_mark(2) ───▶ host
//!   FUSE_WATCH_EVENTS ─▶ waiting ◀─── translated ◀─ read(2) ──┘
//!                            └─▶ answered, when there is something
//! ```
//!
//! Events are left with the host until the guest takes them. What the host loses by that, or was not seen while the VM was
//! saved, the guest's watchers are told of as they are of too long a queue of their own (`IN_Q_OVERFLOW`).
//!
//! **Bounds.** [`MAX_WATCHED`] files. What cannot be watched on the host, since that has no more watches for this user, or a file
//! system without handles, has the guest's own events only, and the log says so once.
//!
//! **What is not told.** That a directory in a watched one has got other attributes, or was opened: fanotify names it without
//! the one that it is in.

mod fanotify;
pub(super) mod snapshot;

use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, RawFd};

use fuse_backend_rs::abi::fuse_abi::InHeader;
use fuse_backend_rs::transport::Reader;

use self::fanotify::About;
use super::host::Host;
use super::inodes::Slot;
use super::share::Share;
use super::state::{State, errno};
use super::waiting::{Answer, HEADER_BYTES};

/// `FUSE_WATCH`: the body is what a node is watched for (u32, `IN_*`) and padding; nothing of node 0 ends all.
pub(super) const FUSE_WATCH: u32 = 3000;
/// `FUSE_WATCH_EVENTS`: the answer is events, [`Watches::tell`].
pub(super) const FUSE_WATCH_EVENTS: u32 = 3001;

/// Files that a guest watches through one share.
const MAX_WATCHED: usize = 16_384;
/// Room that the answer to `FUSE_WATCH_EVENTS` must have: the longest event has a name of 255 bytes.
const LEAST_ROOM: usize = 1024;
/// Bytes of events taken from the host at once.
const READ_BYTES: usize = 4096;
/// Bytes of an event before its name.
const EVENT_BYTES: usize = 24;
/// Bytes of events in an answer at most.
const MOST_ROOM: usize = 4096;

/// What programs may watch for (`IN_ALL_EVENTS`): fanotify has the same bits.
const ALL_EVENTS: u32 = 0xfff;
const MOVES: u64 = libc::FAN_MOVED_FROM | libc::FAN_MOVED_TO;
/// What happens to entries of directories only.
const OF_ENTRIES: u64 = MOVES | libc::FAN_CREATE | libc::FAN_DELETE;
/// What may be in one event of the host's, in the order in which it comes to one file as a rule. The host puts together
/// what happened to a file while nobody took its events.
const ORDER: [u32; 12] = [
    libc::IN_CREATE,
    libc::IN_MOVED_TO,
    libc::IN_OPEN,
    libc::IN_ACCESS,
    libc::IN_MODIFY,
    libc::IN_ATTRIB,
    libc::IN_CLOSE_WRITE,
    libc::IN_CLOSE_NOWRITE,
    libc::IN_MOVED_FROM,
    libc::IN_DELETE,
    libc::IN_MOVE_SELF,
    libc::IN_DELETE_SELF,
];
const COMES: u32 = libc::IN_CREATE | libc::IN_MOVED_TO;
const GOES: u32 = libc::IN_DELETE | libc::IN_MOVED_FROM;
/// Cookies of this side: the guest's kernel counts up from 0.
const FIRST_COOKIE: u32 = 1 << 31;

/// A file by what fanotify calls it: the number of its file system, and its handle.
pub(super) type FileId = Vec<u8>;

/// One file that is watched.
struct Watched {
    /// `IN_*`.
    mask: u32,
    file: FileId,
}

/// What a share's guest watches.
pub(super) struct Watches {
    host: Host,
    /// Made when it is first needed.
    group: Option<File>,
    watched: HashMap<Slot, Watched>,
    /// A directory that is mounted twice is two nodes.
    by_file: HashMap<FileId, Vec<Slot>>,
    waiting: Option<Answer>,
    /// Answers to give, each an error or a body.
    done: Vec<(Answer, i32, Vec<u8>)>,
    /// Events for the next answers, of one read(2) at most.
    pending: VecDeque<Vec<u8>>,
    /// To be told of nodes themselves without an event of the host's.
    notes: Vec<(Slot, u32)>,
    /// The host may have events.
    ready: bool,
    /// The guest asks no more.
    over: bool,
    /// Whether the host knows `FAN_RENAME` (Linux 5.17), which pairs what is moved.
    has_renames: bool,
    cookie: u32,
    warned: bool,
}

impl Watches {
    pub(super) fn new(host: Host) -> Self {
        Self {
            host,
            group: None,
            watched: HashMap::new(),
            by_file: HashMap::new(),
            waiting: None,
            done: Vec::new(),
            pending: VecDeque::new(),
            notes: Vec::new(),
            ready: false,
            over: false,
            has_renames: true,
            cookie: FIRST_COOKIE,
            warned: false,
        }
    }

    /// The guest watches nothing any more. The group stays: whoever waits on it has its descriptor.
    pub(super) fn clear(&mut self) {
        if let Some(group) = &self.group {
            self.host.unwatch_all(group.as_raw_fd());
        }
        let (group, has_renames, warned) = (self.group.take(), self.has_renames, self.warned);
        *self = Self { group, has_renames, warned, ..Self::new(self.host) };
    }

    /// What becomes readable with events, once there is something watched.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        self.group.as_ref().map(File::as_raw_fd)
    }

    /// Files that are watched on the host.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.watched.len()
    }

    /// Notes that the descriptor has become readable.
    pub(super) fn set_ready(&mut self) {
        self.ready = true;
    }

    /// Takes the answers that are due.
    pub(super) fn take_answers(&mut self) -> Vec<(Answer, i32, Vec<u8>)> {
        std::mem::take(&mut self.done)
    }

    /// Says once that the host's changes are not seen, and why.
    fn warn(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.warned, true) {
            crate::log::warn(format_args!(
                "inotify in the guest does not see what others change in a share: {error}; \
                 fs.fanotify.max_user_groups and max_user_marks are the host's limits"
            ));
        }
    }

    fn group(&mut self) -> io::Result<RawFd> {
        let group = match self.group.take() {
            Some(group) => group,
            None => self.host.new_watch_group()?,
        };
        Ok(self.group.insert(group).as_raw_fd())
    }

    /// What of a file all nodes that stand for it are watched for.
    fn wanted(&self, file: &FileId) -> u32 {
        let slots = self.by_file.get(file).into_iter().flatten();
        slots.filter_map(|slot| self.watched.get(slot)).fold(0, |all, watched| all | watched.mask)
    }

    /// That, as fanotify has it.
    fn marks(&self, mask: u32, is_directory: bool) -> u64 {
        let mut marks = u64::from(mask);
        // Who holds a file open, as this process may, keeps it from being gone; that it has no name any more is told by this.
        if marks & libc::FAN_DELETE_SELF != 0 {
            marks |= libc::FAN_ATTRIB;
        }
        if !is_directory {
            return marks & !OF_ENTRIES;
        }
        if marks & MOVES != 0 && self.has_renames {
            marks = marks & !MOVES | libc::FAN_RENAME;
        }
        marks | libc::FAN_ONDIR | libc::FAN_EVENT_ON_CHILD
    }

    /// Has the host tell of `file`, which `fd` stands for, what is wanted of it now, where it told what `before` says.
    fn mark(&mut self, fd: RawFd, file: &FileId, before: u32, is_directory: bool) -> io::Result<()> {
        let group = self.group()?;
        let now = self.wanted(file);
        loop {
            let (wanted, had) = (self.marks(now, is_directory), self.marks(before, is_directory));
            let added = if now == 0 { Ok(()) } else { self.host.watch(group, fd, libc::FAN_MARK_ADD, wanted) };
            match added {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) && wanted & libc::FAN_RENAME != 0 => {
                    self.has_renames = false;
                }
                Err(error) => return Err(error),
                Ok(()) => {
                    let over = if now == 0 { had } else { had & !wanted };
                    // What is not there to be removed is as good.
                    if before != 0 && over != 0 {
                        let _ = self.host.watch(group, fd, libc::FAN_MARK_REMOVE, over);
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Has an event told (all integers little-endian: node (u64), mask, cookie, length of the name, padding (u32),
    /// the name, filled up to eight bytes).
    fn tell(&mut self, node: u64, mask: u32, cookie: u32, name: &[u8]) {
        let mut event = Vec::with_capacity((EVENT_BYTES + name.len()).next_multiple_of(8));
        event.extend(node.to_le_bytes());
        for value in [mask, cookie, name.len() as u32, 0] {
            event.extend(value.to_le_bytes());
        }
        event.extend(name);
        event.resize(event.len().next_multiple_of(8), 0);
        self.pending.push_back(event);
    }
}

/// Serves the request whose header was read from `body`; returns the answer's body, or `None` if the request waits and is answered at
/// `answer`.
pub(super) fn serve(
    share: &Share,
    header: &InHeader,
    mut body: Reader<'_>,
    answer: impl FnOnce(u32) -> Answer,
) -> Option<io::Result<Vec<u8>>> {
    let mut state = share.state();
    if header.opcode == FUSE_WATCH {
        let Ok([mask, _padding]) = body.read_obj::<[u32; 2]>() else { return Some(Err(errno(libc::EINVAL))) };
        return Some(state.watch(header.nodeid, mask).map(|()| Vec::new()));
    }
    let answer = answer(HEADER_BYTES + MOST_ROOM as u32);
    let watches = &mut state.watches;
    let refused = if watches.over {
        libc::ECANCELED
    } else if watches.waiting.is_some() {
        libc::EBUSY
    } else if (answer.room() as usize) < HEADER_BYTES as usize + LEAST_ROOM {
        libc::EINVAL
    } else {
        watches.waiting = Some(answer);
        return None;
    };
    Some(Err(errno(refused)))
}

impl State {
    /// Watches a node for `mask` (`IN_*`) and nothing else.
    fn watch(&mut self, node: u64, mask: u32) -> io::Result<()> {
        if node == 0 {
            self.watches.over = true;
            if let Some(answer) = self.watches.waiting.take() {
                self.watches.done.push((answer, libc::ECANCELED, Vec::new()));
            }
            return Ok(());
        }
        let (slot, mask) = (self.inodes.resolve(node)?, mask & ALL_EVENTS);
        if mask == 0 {
            self.stop_watching(slot);
            return Ok(());
        }
        // Nobody else changes what is there.
        if self.private.as_ref().is_some_and(|private| self.inodes.is_below(slot, private)) {
            return Ok(());
        }
        let result = self.start_watching(slot, mask);
        // Else the host would not be done with a directory that it removes.
        self.inodes.evict(slot);
        // The guest has its own events still.
        if let Err(error) = result {
            self.watches.warn(&error);
        }
        Ok(())
    }

    fn start_watching(&mut self, slot: Slot, mask: u32) -> io::Result<()> {
        let is_new = !self.watches.watched.contains_key(&slot);
        if is_new && self.watches.watched.len() >= MAX_WATCHED {
            return Err(errno(libc::ENOSPC));
        }
        let is_directory = self.inodes.node(slot)?.file_type() == libc::S_IFDIR;
        let fd = self.inodes.anchor(slot)?;
        let file = self.host.file_id(fd)?;
        let before = self.watches.wanted(&file);
        if is_new {
            self.watches.by_file.entry(file.clone()).or_default().push(slot);
            self.inodes.hold(slot);
        }
        self.watches.watched.insert(slot, Watched { mask, file: file.clone() });
        let result = self.watches.mark(fd, &file, before, is_directory);
        if result.is_err() {
            self.stop_watching(slot);
        }
        result
    }

    fn stop_watching(&mut self, slot: Slot) {
        let Some(Watched { file, .. }) = self.watches.watched.get(&slot) else { return };
        let file = file.clone();
        let before = self.watches.wanted(&file);
        self.watches.watched.remove(&slot);
        if let Some(slots) = self.watches.by_file.get_mut(&file) {
            slots.retain(|other| *other != slot);
            if slots.is_empty() {
                self.watches.by_file.remove(&file);
            }
        }
        let is_directory = self.inodes.node(slot).is_ok_and(|node| node.file_type() == libc::S_IFDIR);
        // A file that is no longer there has no watches either.
        if let Ok(fd) = self.inodes.anchor(slot) {
            let _ = self.watches.mark(fd, &file, before, is_directory);
            self.inodes.evict(slot);
        }
        self.inodes.release(slot);
    }

    /// Answers the guest's request for events if there are any.
    pub(super) fn look_at_watches(&mut self) {
        let Some(room) = self.watches.waiting.as_ref().map(Answer::room) else { return };
        while self.watches.pending.is_empty() && (self.watches.ready || !self.watches.notes.is_empty()) {
            self.take_notes();
            self.take_events();
        }
        let watches = &mut self.watches;
        let (mut body, mut left) = (Vec::new(), room.saturating_sub(HEADER_BYTES) as usize);
        while let Some(event) = watches.pending.pop_front_if(|event| event.len() <= left) {
            left -= event.len();
            body.extend(event);
        }
        if !body.is_empty()
            && let Some(answer) = watches.waiting.take()
        {
            watches.done.push((answer, 0, body));
        }
    }

    fn take_notes(&mut self) {
        for (slot, mask) in std::mem::take(&mut self.watches.notes) {
            if self.watches.watched.contains_key(&slot) {
                let node = self.inodes.number(slot);
                self.watches.tell(node, mask, 0, b"");
            }
        }
    }

    /// Takes some of what the host has.
    fn take_events(&mut self) {
        let mut buffer = [0; READ_BYTES];
        let read = self.watches.group.as_mut().map_or(Ok(0), |group| group.read(&mut buffer));
        match read {
            Ok(len) if len > 0 => {
                for event in fanotify::events(&buffer[..len]) {
                    self.translate(&event);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Nothing, or nothing more.
            _ => self.watches.ready = false,
        }
    }

    fn translate(&mut self, event: &fanotify::Event<'_>) {
        if event.mask & libc::FAN_Q_OVERFLOW != 0 {
            self.lose_events();
            return;
        }
        let mut mask = event.mask;
        if event.process.cast_unsigned() == std::process::id() {
            // The guest did it through this process and knows. A file may be gone later, when this process lets go of it.
            mask &= libc::FAN_DELETE_SELF | libc::FAN_ONDIR;
        }
        let directory = if mask & libc::FAN_ONDIR == 0 { 0 } else { libc::IN_ISDIR };
        let is_rename = mask & libc::FAN_RENAME != 0;
        if is_rename {
            self.watches.cookie = self.watches.cookie.checked_add(1).unwrap_or(FIRST_COOKIE);
        }
        for about in event.abouts() {
            let (file, name, told) = match about {
                About::File(file) => (file, &b""[..], mask as u32 & ALL_EVENTS),
                About::Entry(file, name) => (file, name, mask as u32 & ALL_EVENTS),
                About::OldEntry(file, name) if is_rename => (file, name, libc::IN_MOVED_FROM),
                About::NewEntry(file, name) if is_rename => (file, name, libc::IN_MOVED_TO),
                About::OldEntry(..) | About::NewEntry(..) => continue,
            };
            let cookie = if told & MOVES as u32 == 0 { 0 } else { self.watches.cookie };
            for index in 0..self.watches.by_file.get(file).map_or(0, Vec::len) {
                let slot = self.watches.by_file[file][index];
                let Some(watched) = self.watches.watched.get(&slot).map(|watched| watched.mask) else { continue };
                let told = told & watched;
                // What came and went is told such that it ends as it is.
                let is_back = told & COMES != 0 && told & GOES != 0 && self.has_entry(slot, name);
                let (first, then) = if is_back { (told & GOES, told & !GOES) } else { (told, 0) };
                let node = self.inodes.number(slot);
                for (part, bit) in [first, then].into_iter().flat_map(|part| ORDER.map(|bit| (part, bit))) {
                    if part & bit != 0 {
                        self.watches.tell(node, bit | directory, cookie, name);
                    }
                }
                if name.is_empty() && mask & libc::FAN_ATTRIB != 0 && watched & libc::IN_DELETE_SELF != 0 {
                    self.look_whether_gone(slot);
                }
            }
        }
    }

    fn has_entry(&mut self, directory: Slot, name: &[u8]) -> bool {
        let Ok(name) = CString::new(name) else { return false };
        self.inodes.anchor(directory).is_ok_and(|fd| self.host.stat_at(fd, &name).is_ok())
    }

    /// Tells all watchers that they may have missed something.
    fn lose_events(&mut self) {
        self.watches.notes = self.watches.watched.keys().map(|slot| (*slot, libc::IN_Q_OVERFLOW)).collect();
    }

    /// Tells that a watched file is gone once it has no name any more.
    fn look_whether_gone(&mut self, slot: Slot) {
        let is_gone = match self.inodes.stat(slot) {
            Ok(stat) => stat.attr.st_nlink == 0,
            Err(error) => error.raw_os_error() == Some(libc::ESTALE),
        };
        let note = (slot, libc::IN_DELETE_SELF);
        if is_gone && !self.watches.notes.contains(&note) {
            self.watches.notes.push(note);
        }
    }

    /// Looks for watched directories that are gone and that this process has kept the host from saying so of.
    pub(super) fn sweep_watches(&mut self) {
        let wanting = self.watches.watched.iter().filter(|(_, watched)| watched.mask & libc::IN_DELETE_SELF != 0);
        let held: Vec<Slot> = wanting.map(|(slot, _)| *slot).filter(|slot| self.inodes.is_anchored(*slot)).collect();
        for slot in held {
            self.look_whether_gone(slot);
        }
    }
}
