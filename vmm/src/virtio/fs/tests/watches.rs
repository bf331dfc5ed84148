//! Watches: what others do to watched files, by processes of the host.

use std::process::Command;

use super::super::watches::{FUSE_WATCH, FUSE_WATCH_EVENTS};
use super::*;

const ALL: u32 = libc::IN_ALL_EVENTS;
const CHANGES: u32 = ALL & !(libc::IN_OPEN | libc::IN_ACCESS | libc::IN_CLOSE_NOWRITE);
/// Where requests for events lie, and what is there for their answers.
const POSTED: u64 = 0x50_0000;
const ROOM: u32 = 4096 + 16;

/// Node, what, cookie and name.
type Told = (u64, u32, u32, String);

impl Bench {
    fn watch(&mut self, node: u64, mask: u32) -> Result<(), i32> {
        self.ask(FUSE_WATCH, node, &words(&[mask, 0])).map(drop)
    }

    /// Asks for events; returns the request's head.
    fn post_events(&mut self) -> u16 {
        let bytes = self.message(FUSE_WATCH_EVENTS, ROOT, &[]);
        self.memory.write_slice(&bytes, GuestAddress(POSTED)).unwrap();
        let at = POSTED + 0x1000;
        // In two pieces, the first of which ends in the header.
        let head = self.driver.add(&[(POSTED, bytes.len() as u32, false), (at, 7, true), (at + 7, ROOM - 7, true)]);
        self.driver.kick.write(1).unwrap();
        head
    }

    fn has_events(&mut self, head: u16) -> bool {
        while let Some((used, len)) = self.driver.take_used() {
            self.others.insert(used, len);
        }
        self.others.contains_key(&head)
    }

    /// The answer to a request for events.
    fn events_of(&mut self, head: u16) -> Result<Vec<Told>, i32> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.has_events(head) {
            assert!(Instant::now() < deadline, "no events");
            std::thread::sleep(Duration::from_millis(1));
        }
        let len = self.others.remove(&head).unwrap() as usize;
        let mut answer = vec![0; len];
        self.memory.read_slice(&mut answer, GuestAddress(POSTED + 0x1000)).unwrap();
        assert_eq!(u32_at(&answer, 0) as usize, len);
        if u32_at(&answer, 4) != 0 {
            return Err(-(u32_at(&answer, 4) as i32));
        }
        let (mut told, mut at) = (Vec::new(), 16);
        while at < len {
            let size = u32_at(&answer, at + 16) as usize;
            let name = String::from_utf8(answer[at + 24..at + 24 + size].to_vec()).unwrap();
            told.push((u64_at(&answer, at), u32_at(&answer, at + 8), u32_at(&answer, at + 12), name));
            at += (24 + size).next_multiple_of(8);
        }
        Ok(told)
    }

    /// The next so many events.
    fn events(&mut self, count: usize) -> Vec<Told> {
        let mut told = Vec::new();
        while told.len() < count {
            let head = self.post_events();
            told.extend(self.events_of(head).unwrap());
        }
        told
    }

    /// Has another process do something in the share's directory.
    fn outside(&self, script: &str) {
        assert!(Command::new("sh").args(["-ec", script]).current_dir(self.root.path()).status().unwrap().success());
    }

    fn watched(&self) -> usize {
        self.fs.share.state().watches.count()
    }
}

/// A bench whose host can be watched.
fn watching() -> Option<Bench> {
    let mut b = bench()?;
    b.watch(ROOT, CHANGES).unwrap();
    if b.watched() == 0 {
        eprintln!("skipped: the host has no fanotify for this directory");
        return None;
    }
    Some(b)
}

fn told(node: u64, mask: u32, name: &str) -> Told {
    (node, mask, 0, name.to_owned())
}

#[test]
fn what_others_do_is_told_and_what_the_guest_does_is_not() {
    let mut b = require!(watching());
    let file = b.create(ROOT, "own", 0o644).unwrap();
    b.write(file, 0, b"own").unwrap();
    b.watch(file.0, CHANGES).unwrap();
    b.outside("echo x >a");
    let expected = [libc::IN_CREATE, libc::IN_MODIFY, libc::IN_CLOSE_WRITE].map(|what| told(ROOT, what, "a"));
    assert_eq!(b.events(3), expected);
    b.ask(UNLINK, ROOT, &named(vec![], &["a"])).unwrap();
    b.outside("echo y >>own");
    let both = |what| [told(ROOT, what, "own"), told(file.0, what, "")];
    assert_eq!(b.events(4), [both(libc::IN_MODIFY), both(libc::IN_CLOSE_WRITE)].concat().iter().fold(vec![], sorted));
    b.outside("mkdir d");
    assert_eq!(b.events(1), [told(ROOT, libc::IN_CREATE | libc::IN_ISDIR, "d")]);
}

/// Names and nodes are told of one after the other, as many as the host put together.
fn sorted(mut all: Vec<Told>, next: &Told) -> Vec<Told> {
    let at = all.iter().rposition(|before| before.0 == next.0).map_or(all.len(), |at| at + 1);
    all.insert(at, next.clone());
    all
}

#[test]
fn the_sides_of_a_rename_have_one_cookie() {
    let mut b = require!(watching());
    let directory = b.ask(MKDIR, ROOT, &named(words(&[0o755, 0]), &["d"])).map(|entry| u64_at(&entry, 0)).unwrap();
    b.watch(directory, CHANGES).unwrap();
    fs::write(b.path("a"), "").unwrap();
    // The guest's own are not told.
    b.create(ROOT, "own", 0o644).unwrap();
    b.ask(RENAME, ROOT, &named(longs(&[directory]), &["own", "moved"])).unwrap();
    b.outside("mv a d/b; mv d/b c");
    let events = b.events(4);
    let expected = [
        (ROOT, libc::IN_MOVED_FROM, "a"),
        (directory, libc::IN_MOVED_TO, "b"),
        (directory, libc::IN_MOVED_FROM, "b"),
        (ROOT, libc::IN_MOVED_TO, "c"),
    ];
    let seen: Vec<_> = events.iter().map(|event| (event.0, event.1, event.3.as_str())).collect();
    assert_eq!(seen, expected);
    assert_eq!((events[0].2, events[2].2), (events[1].2, events[3].2));
    assert!(events[0].2 != events[2].2 && events[0].2 != 0);
}

#[test]
fn what_came_and_went_ends_as_it_is() {
    let mut b = require!(watching());
    b.outside("mkdir x; rmdir x; mkdir y; rmdir y; mkdir y");
    let directory = |what, name| told(ROOT, what | libc::IN_ISDIR, name);
    let (comes, goes) = (libc::IN_CREATE, libc::IN_DELETE);
    let events = b.events(4);
    let of = |name: &str| events.iter().filter(|event| event.3 == name).cloned().collect::<Vec<_>>();
    assert_eq!(of("x"), [directory(comes, "x"), directory(goes, "x")]);
    assert_eq!(of("y").last(), Some(&directory(comes, "y")));
}

#[test]
fn a_watched_file_that_the_host_removes_is_gone_though_it_is_open() {
    let mut b = require!(watching());
    let (node, _) = b.create(ROOT, "f", 0o644).unwrap();
    b.watch(ROOT, 0).unwrap();
    b.watch(node, libc::IN_DELETE_SELF).unwrap();
    b.outside("rm f");
    assert_eq!(b.events(1), [told(node, libc::IN_DELETE_SELF, "")]);
}

#[test]
fn what_is_watched_ends_with_the_last_who_watches() {
    let mut b = require!(watching());
    b.watch(ROOT, libc::IN_DELETE).unwrap();
    b.outside("touch a; rm a");
    assert_eq!(b.events(1), [told(ROOT, libc::IN_DELETE, "a")]);
    b.watch(ROOT, 0).unwrap();
    assert_eq!(b.watched(), 0);
    let head = b.post_events();
    b.outside("touch a; rm a");
    b.watch(ROOT, libc::IN_CREATE).unwrap();
    b.outside("touch b");
    assert_eq!(b.events_of(head), Ok(vec![told(ROOT, libc::IN_CREATE, "b")]));
    // A guest that starts anew watches nothing.
    b.init();
    assert_eq!(b.watched(), 0);
}

#[test]
fn requests_for_events_wait_one_at_a_time_until_the_guest_wants_no_more() {
    let mut b = require!(watching());
    assert_eq!(b.ask(FUSE_WATCH, ROOT, &words(&[ALL])), Err(libc::EINVAL));
    assert_eq!(b.watch(0xffff, ALL), Err(libc::ESTALE));
    let small = b.message(FUSE_WATCH_EVENTS, ROOT, &[]);
    assert_eq!(b.send_raw(&small, 500), 16, "refused: too little room");
    let head = b.post_events();
    assert_eq!(b.ask(FUSE_WATCH_EVENTS, ROOT, &[]), Err(libc::EBUSY));
    assert!(!b.has_events(head));
    b.watch(0, 0).unwrap();
    assert_eq!(b.events_of(head), Err(libc::ECANCELED));
    assert_eq!(b.ask(FUSE_WATCH_EVENTS, ROOT, &[]), Err(libc::ECANCELED));
}

#[test]
fn private_files_are_not_watched_on_the_host() {
    let mut b = require!(bench());
    b.fs.share.state().private = Some(b"rootfs".to_vec());
    fs::create_dir_all(b.path("id/rootfs/etc")).unwrap();
    let id = b.lookup(ROOT, "id").unwrap();
    let files = b.lookup(id, "rootfs").unwrap();
    for node in [files, b.lookup(files, "etc").unwrap()] {
        b.watch(node, ALL).unwrap();
    }
    assert_eq!(b.watched(), 0);
}

#[test]
fn watches_go_on_in_a_copy_which_says_that_something_may_be_missing() {
    let mut b = require!(watching());
    let head = b.post_events();
    b.watch(ROOT, CHANGES).unwrap();
    b.fs.pause();
    let state = b.fs.save();
    for len in (0..state.private.len()).step_by(3) {
        let state = DeviceState { queues: vec![], private: state.private[..len].to_vec() };
        assert!(share(b.root.path(), false, CachePolicy::Auto).restore(&state).is_err());
    }
    b.fs.deactivate();
    b.outside("touch unseen");
    b.go_on_in_copy(&state);
    assert_eq!(b.events_of(head), Ok(vec![told(ROOT, libc::IN_Q_OVERFLOW, "")]));
    b.outside("mkdir seen");
    assert_eq!(b.events(1), [told(ROOT, libc::IN_CREATE | libc::IN_ISDIR, "seen")]);
}

#[test]
fn more_events_than_an_answer_holds_come_in_the_next() {
    let mut b = require!(watching());
    b.outside("i=0; while [ $i -lt 300 ]; do mkdir a-name-of-some-length-$i; i=$((i + 1)); done");
    let names: std::collections::HashSet<_> = b.events(300).into_iter().map(|event| event.3).collect();
    assert_eq!(names.len(), 300);
}
