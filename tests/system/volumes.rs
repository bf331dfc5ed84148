//! Files and directories of the host, as the container sees them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use fixture::cri::eventually;
use fixture::{Detached, Said, debian, hull};
use rustix::fs::XattrFlags;

use crate::dialogue::Program;

/// Memory of the guest whose VMM is looked at.
const MEMORY_MIB: u64 = 256;

/// Runs a Python program with a directory of the host at /v.
fn with_volume(options: &str, program: &str) -> (tempfile::TempDir, Said) {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.path().join("from-host"), "from the host").unwrap();
    let volume = format!("{}:/v{options}", dir.path().display());
    let said = hull(["run", "--rm", "--memory", "256", "-v", &volume, &debian(), "python3", "-c", program]).run();
    (dir, said)
}

#[test]
fn both_sides_see_each_others_files() {
    let (dir, said) =
        with_volume("", "print(open('/v/from-host').read()); open('/v/from-guest', 'w').write('from the guest')");
    assert_eq!(said.ok(), "from the host");
    assert_eq!(fs::read_to_string(dir.path().join("from-guest")).unwrap(), "from the guest");
}

#[test]
fn what_never_changes_is_read_ahead_in_large_pieces() {
    const FILE_BYTES: usize = 16 << 20;
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.path().join("file"), vec![7; FILE_BYTES]).unwrap();
    let volume = |place: &str, options: &str| format!("{}:{place}{options}", dir.path().display());
    let (usual, always) = (volume("/usual", ""), volume("/always", ":cache=always"));
    let container = Detached::start(["-v", &usual, "-v", &always, &debian(), "sleep", "1000"]);
    let requests = |share: &str| container.inspect()["vm"]["counters"]["devices"][share].as_u64().unwrap();
    let taken_by = |share: &str, place: &str| {
        let before = requests(share);
        container.exec(["dd", &format!("if={place}/file"), "of=/dev/null", "bs=4k", "status=none"]).run().ok();
        requests(share) - before
    };
    // 1 MiB and 128 KiB at a time, with what else a read takes.
    let (large, usual) = (taken_by("hull-always", "/always"), taken_by("hull", "/usual"));
    assert!((16..40).contains(&large) && usual >= 128, "{large} and {usual} requests");
}

#[test]
fn a_read_only_volume_refuses_every_change() {
    let program = "
import os
for change in (lambda: open('/v/new', 'w'), lambda: os.unlink('/v/from-host'), lambda: os.mkdir('/v/d'),
               lambda: os.chmod('/v/from-host', 0), lambda: os.rename('/v/from-host', '/v/x')):
    try:
        change()
        print('changed')
    except OSError as error:
        print(error.errno)
";
    let (dir, said) = with_volume(":ro", program);
    assert_eq!(said.ok(), "30\n30\n30\n30\n30");
    assert_eq!(fs::read_to_string(dir.path().join("from-host")).unwrap(), "from the host");
}

#[test]
fn a_single_file_can_be_a_volume() {
    let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    fs::write(file.path(), "one").unwrap();
    let volume = format!("{}:/etc/one", file.path().display());
    let said = hull([
        "run",
        "--rm",
        "--memory",
        "256",
        "-v",
        &volume,
        &debian(),
        "sh",
        "-c",
        "cat /etc/one; echo two >/etc/one",
    ]);
    assert_eq!(said.run().ok(), "one");
    assert_eq!(fs::read_to_string(file.path()).unwrap(), "two\n");
}

#[test]
fn ownership_and_modes_are_the_hosts() {
    let program = "
import os
os.mkdir('/v/d', 0o750); os.chown('/v/d', 1000, 2000)
open('/v/f', 'w').close(); os.chmod('/v/f', 0o4751); os.chown('/v/f', 33, 44); os.chmod('/v/f', 0o4751)
os.setegid(77); os.seteuid(66)
os.chdir('/v')
";
    let (dir, said) = with_volume("", program);
    said.ok();
    let d = fs::metadata(dir.path().join("d")).unwrap();
    assert_eq!((d.uid(), d.gid(), d.mode() & 0o7777), (1000, 2000, 0o750));
    let f = fs::metadata(dir.path().join("f")).unwrap();
    assert_eq!((f.uid(), f.gid(), f.mode() & 0o7777), (33, 44, 0o4751));
}

#[test]
fn an_ordinary_user_makes_files_of_their_own() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let volume = format!("{}:/v", dir.path().display());
    hull([
        "run",
        "--rm",
        "--memory",
        "256",
        "-u",
        "66:77",
        "-v",
        &volume,
        &debian(),
        "sh",
        "-c",
        "umask 027; mkdir /v/d; echo x >/v/d/f",
    ])
    .run()
    .ok();
    let f = fs::metadata(dir.path().join("d/f")).unwrap();
    assert_eq!((f.uid(), f.gid(), f.mode() & 0o7777), (66, 77, 0o640));
}

#[test]
fn a_user_of_the_host_stands_for_the_containers_root_where_one_is_named() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    for (name, uid, gid) in [("theirs", 1000, 50), ("roots", 0, 0), ("others", 33, 44)] {
        fs::write(dir.path().join(name), "").unwrap();
        chown(dir.path().join(name), Some(uid), Some(gid)).unwrap();
    }
    chown(dir.path(), Some(1000), Some(50)).unwrap();
    let program = "
import os
for name in '.', 'theirs', 'roots', 'others':
    found = os.stat('/v/' + name); print(found.st_uid, found.st_gid)
os.mkdir('/v/new'); os.mkdir('/v/given'); os.chown('/v/given', 1000, 7)
";
    let volume = format!("{}:/v:uid=1000,gid=50", dir.path().display());
    let said = hull(["run", "--rm", "--memory", "256", "-v", &volume, &debian(), "python3", "-c", program]).run();
    assert_eq!(said.ok(), "0 0\n0 0\n1000 50\n33 44");
    let owner = |name| fs::metadata(dir.path().join(name)).map(|found| (found.uid(), found.gid())).unwrap();
    assert_eq!((owner("new"), owner("given")), ((1000, 50), (0, 7)));
    hull(["run", "--rm", "-v", "/proc:/v:uid=1000", &debian(), "true"])
        .run()
        .failed(&["the owners of /proc cannot be mapped"]);
}

#[test]
fn extended_attributes_links_and_renames_work() {
    let program = "
import os
p = '/v/f'
open(p, 'w').write('x')
os.setxattr(p, 'user.colour', b'blue')
assert os.getxattr(p, 'user.colour') == b'blue' and 'user.colour' in os.listxattr(p)
os.removexattr(p, 'user.colour')
os.symlink('/nowhere/at all', '/v/s'); assert os.readlink('/v/s') == '/nowhere/at all'
os.link(p, '/v/h'); assert os.stat(p).st_nlink == 2 and os.path.samefile(p, '/v/h')
os.mkdir('/v/d'); os.rename('/v/h', '/v/d/h'); os.rename('/v/d', '/v/e'); assert os.listdir('/v/e') == ['h']
os.mkfifo('/v/p')
name = 'n' * 255
open('/v/' + name, 'w').close(); os.unlink('/v/' + name)
print('done')
";
    assert_eq!(with_volume("", program).1.ok(), "done");
}

#[test]
fn locks_mappings_and_sparse_files_work() {
    let program = "
import fcntl, mmap, os
f = open('/v/m', 'w+b'); f.truncate(1 << 20)
m = mmap.mmap(f.fileno(), 1 << 20); m[4096:4101] = b'hello'; m.flush(); m.close()
f.seek(4096); assert f.read(5) == b'hello'
a, b = open('/v/l', 'w'), open('/v/l', 'w')
fcntl.flock(a, fcntl.LOCK_EX)
try: fcntl.flock(b, fcntl.LOCK_EX | fcntl.LOCK_NB); print('two locks')
except BlockingIOError: pass
pid = os.fork()
fcntl.lockf(a, fcntl.LOCK_EX) if pid else None
os.waitpid(pid, 0) if pid else os._exit(0)
fd = os.open('/v/sparse', os.O_RDWR | os.O_CREAT)
os.pwrite(fd, b'x', 1 << 30)
assert os.stat('/v/sparse').st_blocks < 1000
os.posix_fallocate(fd, 0, 65536); assert os.stat('/v/sparse').st_blocks >= 128
print('done')
";
    assert_eq!(with_volume("", program).1.ok(), "done");
}

/// Files in one tree. In the lab each takes some milliseconds; HULL_TEST_FILES asks for more.
fn many_files() -> usize {
    std::env::var("HULL_TEST_FILES").map_or(5_000, |text| text.parse().expect("a number of files"))
}

/// What a share has of the files that its guest knows: so many descriptors at most, and so much memory for each.
const MOST_ANCHORS: usize = 4096;
const BYTES_PER_FILE: u64 = 256;
/// What a VMM's memory changes by whatever its guest does.
const NOISE_BYTES: u64 = 256 << 10;

/// What a VMM has of its own, apart from the guest's memory.
#[derive(Clone, Copy, Debug)]
struct Own {
    descriptors: usize,
    /// Memory that is no file's, in bytes.
    memory: u64,
}

impl Own {
    fn of(vmm: i64) -> Self {
        let descriptors = fs::read_dir(format!("/proc/{vmm}/fd")).unwrap().count();
        let smaps = fs::read_to_string(format!("/proc/{vmm}/smaps")).unwrap();
        // Where each mapping begins and ends, and what is resident of it and no file's.
        let mut mappings: Vec<(u64, u64, u64)> = Vec::new();
        for line in smaps.lines() {
            let address = |text| u64::from_str_radix(text, 16).ok();
            let bounds = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            if let Some((start, end)) = bounds.and_then(|(start, end)| Some((address(start)?, address(end)?))) {
                mappings.push((start, end, 0));
            } else if let Some(kib) = line.strip_prefix("Anonymous:") {
                let kib: u64 = kib.trim().trim_end_matches(" kB").parse().unwrap();
                mappings.last_mut().unwrap().2 = kib << 10;
            }
        }
        let total: u64 = mappings.iter().map(|(_, _, bytes)| bytes).sum();
        Self { descriptors, memory: total - guest_memory(&mappings) }
    }
}

/// How much of these is guest memory: mappings one behind the other that come to its size. The C library reserves ranges of such a size
/// too, of which little is resident.
fn guest_memory(mappings: &[(u64, u64, u64)]) -> u64 {
    let from = |first: usize| {
        let (start, mut end, mut bytes) = (mappings[first].0, mappings[first].0, 0);
        for (lower, upper, resident) in &mappings[first..] {
            if *lower != end || end - start >= MEMORY_MIB << 20 {
                break;
            }
            (end, bytes) = (*upper, bytes + resident);
        }
        (end - start == MEMORY_MIB << 20).then_some(bytes)
    };
    (0..mappings.len()).filter_map(from).max().expect("guest memory among the mappings")
}

#[test]
fn many_files_are_made_listed_and_removed() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.path().join("from-host"), "").unwrap();
    let volume = format!("{}:/v", dir.path().display());
    let container =
        Detached::start(["--memory", &MEMORY_MIB.to_string(), "-v", &volume, &debian(), "sleep", "1000000"]);
    let files = many_files() / 10 * 10;
    let mut program = Program::start(
        &container,
        &format!(
            "
import os, shutil
def say(what):
    print(what, flush=True); input()
per_directory = {files} // 10
say('ready')
for i in range(10):
    os.mkdir(f'/v/{{i}}')
    for j in range(per_directory):
        os.close(os.open(f'/v/{{i}}/{{j}}', os.O_CREAT | os.O_WRONLY))
say('made')
assert sum(len(files) for _, _, files in os.walk('/v')) == 10 * per_directory + 1
assert len(os.listdir('/v/9')) == per_directory
say('listed')
for i in range(10):
    shutil.rmtree(f'/v/{{i}}')
say(os.listdir('/v'))
"
        ),
    );
    let vmm = container.inspect()["vmm_pid"].as_i64().unwrap();
    program.expect("ready");
    let before = Own::of(vmm);
    for step in ["made", "listed"] {
        program.say("");
        program.expect(step);
        let now = Own::of(vmm);
        assert!(now.descriptors < before.descriptors + MOST_ANCHORS, "{step}: {before:?}, {now:?}");
        assert!(
            now.memory < before.memory + BYTES_PER_FILE * files as u64 + NOISE_BYTES,
            "{step}: {before:?}, {now:?}"
        );
    }
    program.say("");
    program.expect("['from-host']");
    // The guest has forgotten them, and every ten seconds the VMM looks for what it no longer needs.
    eventually("the VMM gives back what it had for the files", || match Own::of(vmm) {
        now if now.memory < before.memory + NOISE_BYTES => Ok(()),
        now => Err(format!("{before:?}, {now:?}")),
    });
    program.say("");
    program.end();
}

/// What a program in each container has of the file: what it says, an attribute, and whom its access control list names.
const TELL_AND_CHANGE: &str = "
import os, struct, sys
file = os.open('/v/file', os.O_RDWR)
ALL = 2 ** 32 - 1
for turn in sys.stdin:
    turn = int(turn)
    named = struct.unpack_from('<I', os.getxattr('/v/file', 'system.posix_acl_access'), 16)[0]
    print(int(os.pread(file, 9, 0)), int(os.getxattr('/v/file', 'user.turn')), named, flush=True)
    os.pwrite(file, b'%09d' % turn, 0)
    os.setxattr('/v/file', 'user.turn', b'%d' % turn)
    entries = [(1, 6, ALL), (2, 6, turn), (4, 4, ALL), (16, 6, ALL), (32, 4, ALL)]
    os.setxattr('/v/file', 'system.posix_acl_access', struct.pack('<I', 2) + b''.join(struct.pack('<HHI', *entry) for entry in entries))
    print('done', flush=True)
";

#[test]
fn what_is_not_cached_is_seen_at_once_by_other_guests_and_the_host() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = dir.path().join("file");
    let change = |turn: u8| {
        fs::write(&path, format!("{turn:09}")).unwrap();
        rustix::fs::setxattr(&path, "user.turn", turn.to_string().as_bytes(), XattrFlags::empty()).unwrap();
        fixture::netns::host(&format!("setfacl -b -m u:{turn}:rw {}", path.display()));
    };
    let see = || {
        let mut attribute = [0; 8];
        let len = rustix::fs::getxattr(&path, "user.turn", &mut attribute).unwrap();
        let acl = fixture::netns::host(&format!("getfacl -n --omit-header {}", path.display()));
        let users = acl.lines().filter_map(|line| line.strip_prefix("user:")?.strip_suffix(":rw-"));
        // The owner is without a name there.
        let named = users.filter(|user| !user.is_empty()).collect::<String>();
        let text: u8 = fs::read_to_string(&path).unwrap().parse().unwrap();
        format!("{text} {} {named}", String::from_utf8_lossy(&attribute[..len]))
    };
    change(1);
    let volume = format!("{}:/v:cache=never", dir.path().display());
    let containers = [(); 2].map(|()| Detached::start(["--memory", "256", "-v", &volume, &debian(), "sleep", "1000"]));
    let mut programs = containers.each_ref().map(|container| Program::start(container, TELL_AND_CHANGE));
    for turn in [2, 4, 6] {
        for (program, turn) in programs.iter_mut().zip([turn, turn + 1]) {
            let before = turn - 1;
            program.say(&turn.to_string());
            program.expect(&format!("{before} {before} {before}"));
            program.expect("done");
            assert_eq!(see(), format!("{turn} {turn} {turn}"));
        }
        // The same again by the host, so that the next to see it has seen another.
        change(turn + 1);
    }
    for program in programs {
        program.end();
    }
}
