//! What takes capabilities of the host, with an owner that gives it.

use std::os::fd::{FromRawFd as _, OwnedFd};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use hull_vmm_api::broker::{Request, answer_to_bytes};
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

use super::super::broker::Broker;
use super::*;

const CAP_SYS_ADMIN: u32 = 21;
const CAP_MKNOD: u32 = 27;

/// Takes both capabilities from the calling thread, as a jailed VMM is without.
fn be_no_administrator() {
    let header = [0x2008_0522_u32, 0];
    let mut sets = [0_u32; 6];
    // SAFETY: a header and two sets of three for this version, which live here; concerns this thread alone.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()), 0);
        for set in &mut sets[..3] {
            *set &= !(1 << CAP_SYS_ADMIN | 1 << CAP_MKNOD);
        }
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()), 0);
    }
}

/// The file of a request, and its message.
type Asked = (std::path::PathBuf, Vec<u8>);

/// An owner that answers with what it is told to, and tells what it was asked: where, and for what.
fn owner(answers: Vec<Result<Vec<u8>, i32>>) -> (Broker, Receiver<Asked>) {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors, which nobody else has.
    let [ours, theirs] = unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, ends.as_mut_ptr()), 0);
        ends.map(|end| OwnedFd::from_raw_fd(end))
    };
    let (asked, receiver) = channel();
    let socket = std::os::unix::net::UnixDatagram::from(ours);
    thread::spawn(move || {
        for answer in answers {
            let mut message = vec![0; 1 << 17];
            let Ok((len @ 1.., Some(file))) = socket.recv_with_fd(&mut message) else { return };
            message.truncate(len);
            let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
            // The node itself, since the device looks for it afterwards.
            if let (Some(Request::MakeNode { name, .. }), Ok(_)) = (Request::parse(&message), &answer) {
                fs::write(path.join(std::str::from_utf8(name).unwrap()), "made").unwrap();
            }
            asked.send((path, message)).unwrap();
            socket.send(&answer_to_bytes(answer.as_deref().map_err(|errno| *errno))).unwrap();
        }
    });
    (Broker::new(theirs), receiver)
}

/// A share whose thread is no administrator, with an owner that gives these answers.
fn bench_with_owner(answers: Vec<Result<Vec<u8>, i32>>) -> Option<(Bench, Receiver<Asked>)> {
    if !is_root() {
        return None;
    }
    let root = tempfile::tempdir_in("/var/tmp").unwrap();
    let (broker, asked) = owner(answers);
    let fs = share(root.path(), false, CachePolicy::Auto);
    fs.share.state().broker = Some(Arc::new(broker));
    // In a thread of its own, which the share's comes from.
    let bench = Mutex::new(None);
    thread::scope(|scope| {
        scope.spawn(|| {
            be_no_administrator();
            *bench.lock().unwrap() = bench_of(fs, root);
        });
    });
    bench.into_inner().unwrap().map(|bench| (bench, asked))
}

fn mknod(b: &mut Bench, name: &str, mode: u32, device: u32) -> Result<Vec<u8>, i32> {
    b.ask(MKNOD, ROOT, &named(words(&[mode, device, 0o27, 0]), &[name]))
}

#[test]
fn the_owner_makes_devices_and_nothing_else() {
    let (mut b, asked) = require!(bench_with_owner(vec![Ok(Vec::new()), Err(libc::EPERM)]));
    b.user = (1001, 1002);
    mknod(&mut b, "fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    mknod(&mut b, "whiteout", libc::S_IFCHR | 0o600, 0).unwrap();
    assert_eq!(mknod(&mut b, "fifo", libc::S_IFBLK | 0o600, 0x810), Err(libc::EEXIST));
    assert!(asked.try_recv().is_err(), "nothing so far takes a capability");
    mknod(&mut b, "disk", libc::S_IFBLK | 0o666, 0x810).unwrap();
    let (path, message) = asked.recv().unwrap();
    assert_eq!(path, b.root.path());
    let expected = Request::MakeNode {
        name: b"disk",
        mode: libc::S_IFBLK | 0o666,
        device: 0x810,
        owner: (1001, 1002),
        umask: 0o27,
    };
    assert_eq!(Request::parse(&message), Some(expected));
    assert_eq!(mknod(&mut b, "other", libc::S_IFCHR | 0o600, 0x103), Err(libc::EPERM));
    asked.recv().unwrap();
    // From here on there is nobody to ask.
    assert_eq!(mknod(&mut b, "third", libc::S_IFCHR | 0o600, 0x103), Err(libc::EPERM));
}

#[test]
fn attributes_for_administrators_are_the_owners() {
    let value = vec![7; 100];
    let answers = [Ok(value.clone()), Ok(value.clone()), Ok(value.clone()), Err(libc::ENODATA)];
    let (mut b, asked) = require!(bench_with_owner(answers.into()));
    let file = b.create(ROOT, "file", 0o644).unwrap().0;
    let mut get = |name, size| b.ask(GETXATTR, file, &named(words(&[size, 0]), &[name]));
    assert_eq!(get("user.a", 10), Err(libc::ENODATA));
    assert!(asked.try_recv().is_err());
    assert_eq!(get("trusted.a", 200), Ok(value.clone()));
    assert_eq!(get("trusted.a", 0).map(|answer| u32_at(&answer, 0)), Ok(100));
    assert_eq!(get("trusted.a", 99), Err(libc::ERANGE));
    assert_eq!(get("trusted.a", 200), Err(libc::ENODATA));
    for _ in 0..4 {
        let (path, message) = asked.recv().unwrap();
        assert_eq!(path, b.root.path().join("file"));
        assert_eq!(Request::parse(&message), Some(Request::GetAttribute { name: b"trusted.a" }));
    }
}

#[test]
fn what_the_owner_lists_comes_to_the_rest() {
    let names = b"trusted.a\0trusted.b\0".to_vec();
    let (mut b, _asked) =
        require!(bench_with_owner(vec![Ok(names.clone()), Ok(names.clone()), Ok(names), Err(libc::EIO)]));
    let file = b.create(ROOT, "file", 0o644).unwrap().0;
    set_attribute(&mut b, file, "user.c", b"").unwrap();
    let mut list = |size| b.ask(LISTXATTR, file, &words(&[size, 0]));
    assert_eq!(list(100), Ok(b"user.c\0trusted.a\0trusted.b\0".to_vec()));
    assert_eq!(list(0).map(|answer| u32_at(&answer, 0)), Ok(27));
    assert_eq!(list(26), Err(libc::ERANGE));
    // An owner that cannot tell, and then one that is gone.
    for _ in 0..2 {
        assert_eq!(list(100), Ok(b"user.c\0".to_vec()));
    }
}

fn set_attribute(b: &mut Bench, file: u64, name: &str, value: &[u8]) -> Result<Vec<u8>, i32> {
    let mut body = named(words(&[value.len() as u32, 1, 0, 0]), &[name]);
    body.extend(value);
    b.ask(SETXATTR, file, &body)
}

#[test]
fn only_what_is_refused_is_asked_for() {
    let (mut b, asked) = require!(bench_with_owner(vec![Ok(Vec::new()); 4]));
    let file = b.create(ROOT, "file", 0o644).unwrap().0;
    set_attribute(&mut b, file, "user.a", b"1").unwrap();
    b.ask(REMOVEXATTR, file, &named(Vec::new(), &["user.a"])).unwrap();
    assert_eq!(b.ask(REMOVEXATTR, file, &named(Vec::new(), &["user.a"])), Err(libc::ENODATA));
    assert!(asked.try_recv().is_err());
    for name in ["trusted.a", "security.hull"] {
        set_attribute(&mut b, file, name, b"1").unwrap();
        let set = Request::SetAttribute { name: name.as_bytes(), value: b"1", flags: 1 };
        assert_eq!(Request::parse(&asked.recv().unwrap().1), Some(set));
        b.ask(REMOVEXATTR, file, &named(Vec::new(), &[name])).unwrap();
        let remove = Request::RemoveAttribute { name: name.as_bytes() };
        assert_eq!(Request::parse(&asked.recv().unwrap().1), Some(remove));
    }
}
