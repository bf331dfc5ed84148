//! inotify(7) in a container on a volume that others change: the host, and containers in other guests.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use fixture::{Detached, debian};

use crate::dialogue::Program;

/// `watch` adds a path, `next` returns the next event as a line: what it is about, what it is, and for moves `=` and which.
const PRELUDE: &str = "
import collections, ctypes, os, struct, sys
def say(what): print(what, flush=True)
def hear(): return sys.stdin.readline().strip()
BITS = {1: 'ACCESS', 2: 'MODIFY', 4: 'ATTRIB', 8: 'CLOSE_WRITE', 16: 'CLOSE_NOWRITE', 32: 'OPEN', 64: 'MOVED_FROM',
    128: 'MOVED_TO', 256: 'CREATE', 512: 'DELETE', 1024: 'DELETE_SELF', 2048: 'MOVE_SELF', 0x4000: 'Q_OVERFLOW',
    0x8000: 'IGNORED', 0x40000000: 'ISDIR'}
CHANGES = 2 | 4 | 8 | 64 | 128 | 256 | 512 | 1024 | 2048
libc = ctypes.CDLL(None, use_errno=True)
group = libc.inotify_init1(0)
paths, cookies, queue = {}, [], collections.deque()
def watch(path, mask=CHANGES):
    wd = libc.inotify_add_watch(group, path.encode(), mask)
    assert wd > 0, os.strerror(ctypes.get_errno())
    paths[wd] = path
    return wd
def next():
    if not queue:
        data = os.read(group, 65536)
        while data:
            wd, mask, cookie, length = struct.unpack_from('iIII', data)
            name = data[16:16 + length].rstrip(bytes(1)).decode()
            data = data[16 + length:]
            what = ' '.join(word for bit, word in BITS.items() if mask & bit)
            if cookie and cookie not in cookies: cookies.append(cookie)
            pair = f' ={cookies.index(cookie)}' if cookie else ''
            queue.append(f'{paths.get(wd)} {name} {what}{pair}')
    return queue.popleft()
";

fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
    dir
}

/// A container that has the directory at /v.
fn container(dir: &Path, options: &str) -> Detached {
    let volume = format!("{}:/v{options}", dir.display());
    Detached::start(["--memory", "256", "-v", &volume, &debian(), "sleep", "1000"])
}

fn start(container: &Detached, program: &str) -> Program {
    Program::start(container, &format!("{PRELUDE}{program}"))
}

#[test]
fn what_the_host_changes_is_told_as_on_the_host() {
    let dir = directory();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("d")).unwrap();
    fs::write(path("d/f"), "f").unwrap();
    let guest = container(dir.path(), "");
    let mut program = start(
        &guest,
        "watch('/v'); watch('/v/d'); watch('/v/d/f', 4 | 1024 | 2048); say('ready')\nwhile True: say(next())",
    );
    program.expect("ready");
    let mut expect = |lines: &[&str]| lines.iter().for_each(|line| program.expect(line));

    fs::write(path("a"), "x").unwrap();
    expect(&["/v a CREATE", "/v a MODIFY", "/v a CLOSE_WRITE"]);
    fs::set_permissions(path("a"), Permissions::from_mode(0o600)).unwrap();
    expect(&["/v a ATTRIB"]);
    fs::rename(path("a"), path("b")).unwrap();
    expect(&["/v a MOVED_FROM =0", "/v b MOVED_TO =0"]);
    fs::rename(path("b"), path("d/b")).unwrap();
    expect(&["/v b MOVED_FROM =1", "/v/d b MOVED_TO =1"]);
    // From elsewhere and to there.
    let elsewhere = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::rename(path("d/b"), elsewhere.path().join("b")).unwrap();
    expect(&["/v/d b MOVED_FROM =2"]);
    fs::rename(elsewhere.path().join("b"), path("c")).unwrap();
    expect(&["/v c MOVED_TO =3"]);
    fs::remove_file(path("c")).unwrap();
    expect(&["/v c DELETE"]);
    fs::create_dir(path("e")).unwrap();
    expect(&["/v e CREATE ISDIR"]);
    fs::remove_dir(path("e")).unwrap();
    expect(&["/v e DELETE ISDIR"]);
    // As editors save.
    fs::write(path("d/new"), "new").unwrap();
    expect(&["/v/d new CREATE", "/v/d new MODIFY", "/v/d new CLOSE_WRITE"]);
    fs::rename(path("d/new"), path("d/f")).unwrap();
    let mut saved: Vec<_> = (0..5).map(|_| program.hear()).collect();
    saved.sort();
    let same =
        ["/v/d f MOVED_TO =4", "/v/d new MOVED_FROM =4", "/v/d/f  ATTRIB", "/v/d/f  DELETE_SELF", "/v/d/f  IGNORED"];
    assert_eq!(saved, same);
    fs::remove_dir_all(path("d")).unwrap();
    let mut gone: Vec<_> = (0..4).map(|_| program.hear()).collect();
    gone.sort();
    assert_eq!(gone, ["/v d DELETE ISDIR", "/v/d  DELETE_SELF", "/v/d  IGNORED", "/v/d f DELETE"]);
}

#[test]
fn guests_see_each_others_changes_once_and_their_own_once() {
    let dir = directory();
    let [one, other] = [(); 2].map(|()| container(dir.path(), ""));
    let watching = "watch('/v', 256 | 512); say('ready')\nwhile True: say(next())";
    let mut watchers = [&one, &other].map(|guest| {
        let mut program = start(guest, watching);
        program.expect("ready");
        program
    });
    for (container, name) in [(&one, "a"), (&other, "b"), (&one, "c")] {
        container.exec(["touch", &format!("/v/{name}")]).run().ok();
        container.exec(["rm", &format!("/v/{name}")]).run().ok();
        for watcher in &mut watchers {
            watcher.expect(&format!("/v {name} CREATE"));
            watcher.expect(&format!("/v {name} DELETE"));
        }
    }
}

#[test]
fn who_is_told_of_a_change_reads_it_whatever_is_cached() {
    let dir = directory();
    let guest = container(dir.path(), ":cache=always");
    fs::write(dir.path().join("f"), "old").unwrap();
    let mut program = start(
        &guest,
        "
def read(): return open('/v/f').read()
def names(): return sorted(os.listdir('/v'))
watch('/v', 8 | 256); say(read()); say(names())
while True:
    event = next()
    say(f'{event} {read()} {names()}')
",
    );
    program.expect("old");
    program.expect("['f']");
    fs::write(dir.path().join("f"), "changed").unwrap();
    program.expect("/v f CLOSE_WRITE changed ['f']");
    std::os::unix::fs::symlink("f", dir.path().join("g")).unwrap();
    program.expect("/v g CREATE changed ['f', 'g']");
}

#[test]
fn ten_thousand_files_of_the_hosts_are_seen() {
    let dir = directory();
    let guest = container(dir.path(), "");
    let mut program = start(
        &guest,
        "
watch('/v', 256); say('ready')
seen = set()
while len(seen) < 10000:
    _, name, what = next().split(' ')
    assert what == 'CREATE', what
    seen.add(name)
say('all')
",
    );
    program.expect("ready");
    for number in 0..10_000 {
        fs::write(dir.path().join(number.to_string()), "").unwrap();
    }
    program.expect("all");
}

#[test]
fn what_is_no_longer_watched_costs_the_host_nothing() {
    let dir = directory();
    fs::write(dir.path().join("f"), "").unwrap();
    let guest = container(dir.path(), "");
    let marks = || {
        let fds = format!("/proc/{}/fdinfo", guest.inspect()["vmm_pid"]);
        let infos = fs::read_dir(fds).unwrap().filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
        infos
            .flat_map(|info| info.lines().map(str::to_owned).collect::<Vec<_>>())
            .filter(|line| line.starts_with("fanotify ino:"))
            .count()
    };
    assert_eq!(marks(), 0);
    let mut program = start(
        &guest,
        "
dir, file = watch('/v'), watch('/v/f')
say('two'); hear()
libc.inotify_rm_watch(group, file)
say('one'); hear()
os.close(group)
say('none'); hear()
",
    );
    for (word, count) in [("two", 2), ("one", 1), ("none", 0)] {
        program.expect(word);
        assert_eq!(marks(), count);
        program.say("");
    }
    program.end();
}
