//! What the VMM's file server asks of its owner, since it has no capability of the host itself ([`hull_vmm_api::broker`]).
//!
//! A guest may have taken over the VMM, so a request is obeyed only where it gives a guest nothing over a container that has the
//! same capabilities on the host:
//!
//! * it concerns files on mounts that let nobody open a device (`MOUNT_ATTR_NODEV`), as are all that Hull puts into the VMM's tree
//!   ([`crate::share`]) and few others: the VMM can have a device node made and cannot open it;
//! * no node is made in a sandbox with a volume in which the host's later mounts turn up, since those come as the host made them
//!   ([`NodesOrMounts`]);
//! * attributes that the host's own kernel judges by stay the host's ([`HOSTS_OWN`]), and are set in file systems of disks alone
//!   ([`ON_DISKS`]): others keep them in the host's memory without a limit, or take some for commands;
//! * the thread has the few capabilities that this takes, and quotas of the host hold for it.
//!
//! Why there is somebody to ask is told in `docs/decisions/0019-an-owner-acts-for-a-jailed-file-server.md`.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use hull_vmm_api::broker::{REQUEST_MAX, Request, TRUSTED, VALUE_MAX, answer_to_bytes};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Mode, StatVfsMountFlags, XattrFlags, fstatfs, fstatvfs, mknodat};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketFlags,
    SocketType, recvmsg, send, socketpair,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities_secure_bits, set_capabilities,
    set_capabilities_secure_bits,
};

/// Attributes in the namespace `security.` that the host's kernel goes by: labels of security modules, signatures, capabilities of programs. The
/// last the VMM sets itself.
const HOSTS_OWN: [&[u8]; 9] = [
    b"security.SMACK64",
    b"security.apparmor",
    b"security.bpf.",
    b"security.capability",
    b"security.evm",
    b"security.ima",
    b"security.restorecon_last",
    b"security.sehash",
    b"security.selinux",
];
/// ext4, xfs, btrfs, f2fs and zfs (linux/magic.h and their own), and an overlay, which has its attributes in one of them unless the host
/// lives in memory.
const ON_DISKS: [u32; 6] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x2fc1_2fc1, 0x794c_7630];
/// What the thread does for others: makes devices and attributes, in anybody's directory and for anybody.
const CAPABILITIES: CapabilitySet = CapabilitySet::MKNOD
    .union(CapabilitySet::SYS_ADMIN)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID);
/// What a thread needs: it allocates its messages.
const STACK_BYTES: usize = 64 * 1024;

/// Whether a sandbox's guest makes device nodes or has a volume in which what the host mounts later turns up: one of them, whichever
/// comes first. Together they would lead its VMM to a device that can be opened.
#[derive(Debug, Default)]
pub(crate) struct NodesOrMounts(AtomicU8);

impl NodesOrMounts {
    const NODES: u8 = 1;
    const MOUNTS: u8 = 2;

    /// Whether device nodes may be made, now and from now on.
    pub(crate) fn allow_nodes(&self) -> bool {
        self.settle(Self::NODES)
    }

    /// Whether the host's later mounts may turn up, now and from now on.
    pub(crate) fn allow_mounts(&self) -> bool {
        self.settle(Self::MOUNTS)
    }

    fn settle(&self, wanted: u8) -> bool {
        match self.0.compare_exchange(0, wanted, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => true,
            Err(settled) => settled == wanted,
        }
    }
}

/// Starts a thread that obeys a VMM until that ends, and returns the VMM's end of the connection.
///
/// # Errors
///
/// Fails where no socket or thread can be made.
pub(crate) fn start(nodes_or_mounts: Arc<NodesOrMounts>) -> io::Result<OwnedFd> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    std::thread::Builder::new()
        .name("broker".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || serve(&ours, &nodes_or_mounts))?;
    Ok(theirs)
}

fn serve(socket: &OwnedFd, nodes_or_mounts: &NodesOrMounts) {
    // Many VMMs never ask, and then nothing is set up. Signals are the process's, and may come to this thread.
    if retry_on_intr(|| poll(&mut [PollFd::new(socket, PollFlags::IN)], None)).is_err() {
        return;
    }
    let ready = become_broker();
    let mut buffer = vec![0; REQUEST_MAX];
    while let Some((len, file)) = receive(socket, &mut buffer) {
        let outcome = match (Request::parse(&buffer[..len]), &file) {
            (Some(request), Some(file)) => ready.and_then(|()| obey(file.as_fd(), &request, nodes_or_mounts)),
            _ => Err(Errno::INVAL),
        };
        let answer = answer_to_bytes(outcome.as_deref().map_err(|errno| errno.raw_os_error()));
        if retry_on_intr(|| send(socket, &answer, SendFlags::NOSIGNAL)).is_err() {
            return;
        }
    }
}

/// Leaves the calling thread what it needs and no more: a umask of its own, and capabilities that a change of user leaves alone.
fn become_broker() -> Result<(), Errno> {
    let own_umask = nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS);
    own_umask.map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
    set_capabilities_secure_bits(capabilities_secure_bits()? | CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: CAPABILITIES, permitted: CAPABILITIES, inheritable: none })
}

/// The length of the next request, and the descriptor beside it; `None` at the end, or for one that is too long.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Option<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let receive = || recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let message = retry_on_intr(receive).ok()?;
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    let whole = message.bytes > 0 && !message.flags.contains(ReturnFlags::TRUNC);
    whole.then_some((message.bytes, file))
}

fn obey(file: BorrowedFd<'_>, request: &Request<'_>, nodes_or_mounts: &NodesOrMounts) -> Result<Vec<u8>, Errno> {
    if !fstatvfs(file)?.f_flag.contains(StatVfsMountFlags::NODEV) {
        return Err(Errno::PERM);
    }
    match *request {
        Request::MakeNode { name, mode, device, owner, umask } => {
            check_node(name, mode)?;
            if !nodes_or_mounts.allow_nodes() {
                return Err(Errno::PERM);
            }
            make_node(file, name, (mode, device), owner, umask)
        }
        Request::GetAttribute { name } if !name.starts_with(TRUSTED) => Err(Errno::PERM),
        Request::GetAttribute { name } => get_attribute(file, name),
        Request::ListTrusted => list_trusted(file),
        Request::SetAttribute { name, .. } | Request::RemoveAttribute { name } if !is_the_guests(name) => {
            Err(Errno::PERM)
        }
        // The kernel's numbers have 32 bits, whatever holds them here.
        Request::SetAttribute { .. } | Request::RemoveAttribute { .. }
            if !ON_DISKS.contains(&(fstatfs(file)?.f_type as u32)) =>
        {
            Err(Errno::OPNOTSUPP)
        }
        Request::SetAttribute { name, value, flags } => {
            let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
            rustix::fs::setxattr(path_of(file), name, value, flags).map(|()| Vec::new())
        }
        Request::RemoveAttribute { name } => rustix::fs::removexattr(path_of(file), name).map(|()| Vec::new()),
    }
}

/// Whether a guest may set the attribute.
fn is_the_guests(name: &[u8]) -> bool {
    name.starts_with(TRUSTED) || name.starts_with(b"security.") && !HOSTS_OWN.iter().any(|own| name.starts_with(own))
}

/// Lets device nodes pass, in the directory itself.
fn check_node(name: &[u8], mode: u32) -> Result<(), Errno> {
    let is_device = matches!(FileType::from_raw_mode(mode), FileType::CharacterDevice | FileType::BlockDevice);
    let is_inside = !matches!(name, b"." | b"..") && !name.contains(&b'/');
    if is_device && is_inside { Ok(()) } else { Err(Errno::INVAL) }
}

fn make_node(
    directory: BorrowedFd<'_>,
    name: &[u8],
    (mode, device): (u32, u32),
    (user, group): (u32, u32),
    umask: u32,
) -> Result<Vec<u8>, Errno> {
    let kind = FileType::from_raw_mode(mode);
    let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
    rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
    // The group comes first, and the answer of each is who it was before: asking twice tells whether it is so.
    let home = (setfsgid(group), setfsuid(user));
    let taken = (setfsgid(group), setfsuid(user)) == (group, user);
    let made = if taken {
        mknodat(directory, name, kind, Mode::from_raw_mode(mode & 0o7777), u64::from(device))
    } else {
        Err(Errno::PERM)
    };
    setfsgid(home.0);
    setfsuid(home.1);
    made.map(|()| Vec::new())
}

fn get_attribute(file: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; VALUE_MAX];
    let len = rustix::fs::getxattr(path_of(file), name, &mut value)?;
    value.truncate(len);
    Ok(value)
}

fn list_trusted(file: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    // As almost all files.
    if rustix::fs::listxattr_query(path_of(file))? == 0 {
        return Ok(Vec::new());
    }
    let mut names = vec![0; VALUE_MAX];
    let len = rustix::fs::listxattr(path_of(file), &mut names)?;
    let trusted = names[..len].split_inclusive(|byte| *byte == 0).filter(|name| name.starts_with(TRUSTED));
    Ok(trusted.flatten().copied().collect())
}

/// A path that leads to the very file, were it a symbolic link: calls on attributes take no descriptor that only stands for a file.
fn path_of(file: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
    use std::path::Path;

    use hull_sandbox_sys::mounts;
    use hull_vmm_api::broker::parse_answer;
    use rustix::fs::{CWD, OFlags, makedev};
    use rustix::mount::{OpenTreeFlags, open_tree};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, recv, sendmsg};

    use super::*;

    /// A VMM: asks, as [`start`] lets it.
    struct Vmm(OwnedFd, Arc<NodesOrMounts>);

    impl Vmm {
        /// Of root; `None` where the test is run by somebody else.
        fn new() -> Option<Self> {
            if !rustix::process::geteuid().is_root() {
                eprintln!("skipped: only root can give what takes capabilities");
                return None;
            }
            let nodes_or_mounts = Arc::<NodesOrMounts>::default();
            Some(Self(start(nodes_or_mounts.clone()).unwrap(), nodes_or_mounts))
        }

        fn ask(&self, file: impl AsFd, request: &Request<'_>) -> Result<Vec<u8>, i32> {
            self.send(&request.to_bytes(), &[file.as_fd()])
        }

        fn send(&self, message: &[u8], files: &[BorrowedFd<'_>]) -> Result<Vec<u8>, i32> {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(files)));
            sendmsg(&self.0, &[io::IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL).unwrap();
            let mut answer = vec![0; 2 * VALUE_MAX];
            let (len, _) = recv(&self.0, &mut answer[..], RecvFlags::empty()).unwrap();
            parse_answer(&answer[..len]).expect("an answer").map(<[u8]>::to_vec)
        }
    }

    fn errno(errno: Errno) -> Result<Vec<u8>, i32> {
        Err(errno.raw_os_error())
    }

    const NULL: u32 = 0x103;
    const DISK: u32 = 0o060_000;
    const CHARACTERS: u32 = 0o020_000;

    fn node(name: &[u8], mode: u32) -> Request<'_> {
        Request::MakeNode { name, mode, device: NULL, owner: (1001, 1002), umask: 0o027 }
    }

    /// The file as the VMM has it: a descriptor that only stands for it, on a mount that lets nobody open a device.
    fn in_share(path: &Path) -> OwnedFd {
        let directory = without_devices(path.parent().unwrap());
        rustix::fs::openat(&directory, path.file_name().unwrap(), OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())
            .unwrap()
    }

    /// The directory as a mount of its own without a place, which lets nobody open a device.
    fn without_devices(directory: &Path) -> OwnedFd {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, directory, flags).unwrap();
        mounts::set_no_devices(tree.as_fd()).unwrap();
        tree
    }

    #[test]
    fn a_device_is_made_only_where_nobody_can_open_it() {
        let Some(vmm) = Vmm::new() else { return };
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let before = umask_of_process();
        let open = File::open(dir.path()).unwrap();
        assert_eq!(vmm.ask(&open, &node(b"null", CHARACTERS | 0o666)), errno(Errno::PERM));
        let closed = without_devices(dir.path());
        assert_eq!(vmm.ask(&closed, &node(b"null", CHARACTERS | 0o666)), Ok(Vec::new()));
        let made = fs::symlink_metadata(dir.path().join("null")).unwrap();
        assert!(made.file_type().is_char_device());
        assert_eq!((made.rdev(), made.mode() & 0o7777), (makedev(1, 3), 0o640));
        assert_eq!((made.uid(), made.gid()), (1001, 1002));
        let opened = rustix::fs::openat(&closed, "null", OFlags::RDONLY, Mode::empty());
        assert_eq!(opened.unwrap_err(), Errno::ACCESS);
        assert_eq!(vmm.ask(&closed, &node(b"null", CHARACTERS)), errno(Errno::EXIST));
        // In a directory that passes on its group.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o2755)).unwrap();
        std::os::unix::fs::chown(dir.path(), None, Some(77)).unwrap();
        assert_eq!(vmm.ask(&closed, &node(b"disk", DISK | 0o600)), Ok(Vec::new()));
        let made = fs::symlink_metadata(dir.path().join("disk")).unwrap();
        assert_eq!((made.uid(), made.gid(), made.file_type().is_block_device()), (1001, 77, true));
        // For nobody at all, after which the thread is itself again.
        let nobodys = Request::MakeNode { name: b"x", mode: DISK, device: NULL, owner: (u32::MAX, 0), umask: 0 };
        assert_eq!(vmm.ask(&closed, &nobodys), errno(Errno::PERM));
        let roots = Request::MakeNode { name: b"x", mode: DISK | 0o666, device: NULL, owner: (0, 0), umask: 0 };
        assert_eq!(vmm.ask(&closed, &roots), Ok(Vec::new()));
        let made = fs::symlink_metadata(dir.path().join("x")).unwrap();
        assert_eq!((made.uid(), made.mode() & 0o7777), (0, 0o666));
        assert_eq!(umask_of_process(), before, "the process has its own");
        assert!(!vmm.1.allow_mounts(), "devices that can be opened might turn up");
    }

    #[test]
    fn no_device_is_made_where_mounts_turn_up() {
        let Some(vmm) = Vmm::new() else { return };
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let closed = without_devices(dir.path());
        // What is refused settles nothing.
        assert_eq!(vmm.ask(&closed, &node(b"..", CHARACTERS)), errno(Errno::INVAL));
        assert!(vmm.1.allow_mounts() && vmm.1.allow_mounts());
        assert_eq!(vmm.ask(&closed, &node(b"null", CHARACTERS)), errno(Errno::PERM));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    fn umask_of_process() -> String {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        status.lines().find(|line| line.starts_with("Umask:")).unwrap().to_owned()
    }

    #[test]
    fn nothing_but_devices_is_made_and_nothing_elsewhere() {
        let Some(vmm) = Vmm::new() else { return };
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        let closed = without_devices(dir.path());
        for kind in [0, 0o010_000, 0o040_000, 0o100_000, 0o120_000, 0o140_000] {
            assert_eq!(vmm.ask(&closed, &node(b"x", kind | 0o600)), errno(Errno::INVAL), "{kind:o}");
        }
        for name in [&b"."[..], b"..", b"a/b", b"/tmp/b"] {
            assert_eq!(vmm.ask(&closed, &node(name, CHARACTERS)), errno(Errno::INVAL), "{name:?}");
        }
        File::create(dir.path().join("file")).unwrap();
        let file = rustix::fs::openat(&closed, "file", OFlags::RDONLY, Mode::empty()).unwrap();
        assert_eq!(vmm.ask(&file, &node(b"x", CHARACTERS)), errno(Errno::NOTDIR));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn attributes_for_administrators_are_kept() {
        let Some(vmm) = Vmm::new() else { return };
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = dir.path().join("file");
        File::create(&path).unwrap();
        // As the VMM holds files: such a descriptor only stands for one.
        let file = in_share(&path);
        let set = |name, value| vmm.ask(&file, &Request::SetAttribute { name, value, flags: 0 });
        let get = |name| vmm.ask(&file, &Request::GetAttribute { name });
        assert_eq!(get(b"trusted.a"), errno(Errno::NODATA));
        assert_eq!(set(b"trusted.a", b"1\x002"), Ok(Vec::new()));
        assert_eq!(set(b"trusted.b", b""), Ok(Vec::new()));
        assert_eq!(set(b"security.hull", b"3"), Ok(Vec::new()));
        rustix::fs::setxattr(&path, "user.c", b"4", XattrFlags::empty()).unwrap();
        assert_eq!(get(b"trusted.a"), Ok(b"1\x002".to_vec()));
        let mut listed = vmm.ask(&file, &Request::ListTrusted).unwrap();
        listed.sort_unstable();
        let mut expected = b"trusted.a\0trusted.b\0".to_vec();
        expected.sort_unstable();
        assert_eq!(listed, expected);
        let create = Request::SetAttribute { name: b"trusted.a", value: b"", flags: 1 };
        assert_eq!(vmm.ask(&file, &create), errno(Errno::EXIST));
        let strange = Request::SetAttribute { name: b"trusted.a", value: b"", flags: 8 };
        assert_eq!(vmm.ask(&file, &strange), errno(Errno::INVAL));
        for name in [&b"trusted.a"[..], b"trusted.b", b"security.hull"] {
            assert_eq!(vmm.ask(&file, &Request::RemoveAttribute { name }), Ok(Vec::new()));
            assert_eq!(vmm.ask(&file, &Request::RemoveAttribute { name }), errno(Errno::NODATA));
        }
    }

    #[test]
    fn a_link_has_attributes_of_its_own() {
        let Some(vmm) = Vmm::new() else { return };
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        File::create(&target).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let link = in_share(&link);
        let request = Request::SetAttribute { name: b"trusted.a", value: b"1", flags: 0 };
        assert_eq!(vmm.ask(&link, &request), Ok(Vec::new()));
        assert_eq!(rustix::fs::getxattr(&target, "trusted.a", &mut [0; 8][..]), Err(Errno::NODATA));
        assert_eq!(vmm.ask(&link, &Request::GetAttribute { name: b"trusted.a" }), Ok(b"1".to_vec()));
    }

    #[test]
    fn what_the_host_judges_by_is_not_the_guests() {
        let Some(vmm) = Vmm::new() else { return };
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        File::create(dir.path().join("file")).unwrap();
        let file = in_share(&dir.path().join("file"));
        let others: [&[u8]; 5] =
            [b"user.a", b"system.posix_acl_access", b"security", b"security.SMACK64EXEC", b"security.bpf.policy"];
        for name in HOSTS_OWN.iter().chain(&others) {
            let set = Request::SetAttribute { name, value: b"1", flags: 0 };
            assert_eq!(vmm.ask(&file, &set), errno(Errno::PERM));
            assert_eq!(vmm.ask(&file, &Request::RemoveAttribute { name }), errno(Errno::PERM));
            assert_eq!(vmm.ask(&file, &Request::GetAttribute { name }), errno(Errno::PERM));
        }
        let in_memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let set = Request::SetAttribute { name: b"trusted.a", value: b"1", flags: 0 };
        assert_eq!(vmm.ask(in_share(in_memory.path()), &set), errno(Errno::OPNOTSUPP));
        // What the VMM has of the host, but in no share: disks, its own program.
        let elsewhere = File::open(dir.path().join("file")).unwrap();
        for request in [set, Request::RemoveAttribute { name: b"trusted.a" }, Request::ListTrusted] {
            assert_eq!(vmm.ask(&elsewhere, &request), errno(Errno::PERM));
        }
    }

    #[test]
    fn a_message_that_is_no_request_is_answered_and_harms_nobody() {
        let Some(vmm) = Vmm::new() else { return };
        let path = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        let file = in_share(path.path());
        let list = Request::ListTrusted.to_bytes();
        for message in [&b"x"[..], &[0xff; 100], &[0; 28], &list[..27]] {
            assert_eq!(vmm.send(message, &[file.as_fd()]), errno(Errno::INVAL));
        }
        assert_eq!(vmm.send(&list, &[]), errno(Errno::INVAL), "no file");
        assert_eq!(vmm.send(&list, &[file.as_fd(); 4]), Ok(Vec::new()), "the first file counts");
        let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let set = Request::SetAttribute { name: b"trusted.a", value: b"1", flags: 0 };
        assert!(vmm.ask(&socket, &set).is_err(), "no file at all");
        assert_eq!(vmm.ask(&file, &Request::ListTrusted), Ok(Vec::new()));
    }

    #[test]
    fn one_that_is_too_long_ends_the_conversation() {
        let Some(vmm) = Vmm::new() else { return };
        rustix::net::send(&vmm.0, &vec![0; REQUEST_MAX + 1], SendFlags::NOSIGNAL).unwrap();
        assert_eq!(recv(&vmm.0, &mut [0; 8][..], RecvFlags::empty()).unwrap().0, 0);
    }
}
