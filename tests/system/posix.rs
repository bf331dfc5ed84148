//! A share of the host's directory is to programs what the host's own file system is: `posix/cases.py` prints what a program can observe,
//! on the host and in a guest for each way of caching, and the lines must be the same.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use fixture::{Said, debian, hull};

/// The program's files: what it is written with, the cases by theme, and what runs them.
const PROGRAM: [(&str, &str); 11] = [
    ("observe.py", include_str!("posix/observe.py")),
    ("opening.py", include_str!("posix/opening.py")),
    ("owners.py", include_str!("posix/owners.py")),
    ("attributes.py", include_str!("posix/attributes.py")),
    ("naming.py", include_str!("posix/naming.py")),
    ("content.py", include_str!("posix/content.py")),
    ("together.py", include_str!("posix/together.py")),
    ("special.py", include_str!("posix/special.py")),
    ("directories.py", include_str!("posix/directories.py")),
    ("other.py", include_str!("posix/other.py")),
    ("cases.py", include_str!("posix/cases.py")),
];

const EVERY: &[&str] = &["never", "auto", "always"];

/// What is known to differ from ext4, whatever the caching: the case, and why. docs/compatibility.md tells users.
const KNOWN: &[(&str, &str)] = &[
    ("epoll_of_files", "FUSE in the guest's kernel lets files be polled, ext4 does not"),
    ("inode_flags", "requests of ioctl(2) are not passed on: what they mean is the host's affair"),
    ("open_direct_unaligned", "the file bypasses the guest's cache, not the host's, so nothing needs alignment"),
    ("reading_without_waiting", "FUSE in the guest's kernel has no RWF_NOWAIT"),
    ("set_id_bits_that_root_keeps", "only root of the host may write to a file and leave them, and the VMM is nobody"),
];

/// What each case printed, by section and name.
type Lines = BTreeMap<String, BTreeMap<String, String>>;

fn lines(said: Said) -> Lines {
    let mut lines = Lines::new();
    let mut section = String::new();
    for line in said.ok().lines() {
        match line.strip_prefix("# ") {
            Some(name) => section = name.to_owned(),
            None => {
                let (case, steps) = line.split_once(' ').unwrap_or((line, ""));
                lines.entry(section.clone()).or_default().insert(case.to_owned(), steps.to_owned());
            }
        }
    }
    lines
}

/// The steps in which two lines differ.
fn difference(host: &str, guest: &str) -> String {
    let mut said = String::new();
    for (ours, theirs) in host.split(' ').zip(guest.split(' ')).filter(|(ours, theirs)| ours != theirs) {
        write!(said, " {ours} but {theirs};").unwrap();
    }
    let (ours, theirs) = (host.split(' ').count(), guest.split(' ').count());
    if ours != theirs {
        write!(said, " {ours} steps but {theirs}: {guest}").unwrap();
    }
    said
}

/// A directory as a mount of its own that keeps times of access, whatever the file system around it does.
struct Timed(PathBuf);

impl Timed {
    fn new(path: &Path) -> Self {
        let mount = |arguments: &[&str]| Command::new("mount").args(arguments).arg(path).status().unwrap();
        assert!(mount(&["--bind", path.to_str().unwrap()]).success());
        let timed = Self(path.to_owned());
        assert!(mount(&["-o", "remount,bind,relatime"]).success());
        timed
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        // Lazily: where the test failed, a guest may still have it.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

fn on_the_host(base: &Path, script: &str) -> Said {
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-ec", script])
        .current_dir(base)
        .output()
        .expect("util-linux and python3 are there");
    Said::new(output)
}

/// A directory with the program, and others of these names and for each way of caching.
fn base(names: &[&str]) -> tempfile::TempDir {
    let base = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for name in names.iter().chain(&["program"]).chain(EVERY) {
        fs::create_dir(base.path().join(name)).unwrap();
    }
    for (name, content) in PROGRAM {
        fs::write(base.path().join("program").join(name), content).unwrap();
    }
    base
}

#[test]
fn programs_observe_of_a_share_what_they_observe_of_the_file_system() {
    let base = base(&["tree", "host"]);
    let base = base.path();
    let _timed = Timed::new(base);
    let host = lines(on_the_host(
        base,
        "python3 program/cases.py tree:tree
        mount --bind tree tree
        mount -o remount,bind,ro tree
        python3 program/cases.py $PWD/host ro:$PWD/tree",
    ));
    let volume = |name: &str, options: &str| format!("{}:/{name}{options}", base.join(name).display());
    let guest = lines(
        hull([
            "run",
            "--rm",
            "--memory",
            "256",
            "-v",
            &volume("never", ":cache=never"),
            "-v",
            &volume("auto", ":cache=auto"),
            "-v",
            &volume("always", ":cache=always"),
            "-v",
            &volume("tree", ":ro"),
            "-v",
            &volume("program", ":ro"),
            &debian(),
            "python3",
            "/program/cases.py",
            "/never",
            "/auto",
            "/always",
            "ro:/tree",
        ])
        .run(),
    );
    let sections: Vec<_> = EVERY.iter().map(|section| (*section, "host")).chain([("tree", "tree")]).collect();
    compare(&guest, &host, &sections);
}

/// Compares sections of the guest's lines with those of the host's.
fn compare(guest: &Lines, host: &Lines, sections: &[(&str, &str)]) {
    let mut wrong = String::new();
    for (section, on_host) in sections {
        let (found, expected) = (&guest[*section], &host[*on_host]);
        assert!(found.len() > 1, "{section} has {} cases", found.len());
        assert!(found.keys().eq(expected.keys()), "{section} has the cases {:?}", found.keys());
        for (case, steps) in expected {
            assert!(!steps.contains("raised:"), "a case that breaks off compares nothing: {case} {steps}");
            let known = KNOWN.iter().any(|(name, _)| name == case);
            match (known, found[case] == *steps) {
                (false, false) => {
                    writeln!(wrong, "{section} {case}:{}", difference(steps, &found[case])).unwrap();
                }
                (true, true) => writeln!(wrong, "{section} {case}: differs no longer").unwrap(),
                _ => {}
            }
        }
    }
    assert!(wrong.is_empty(), "on the host, but in the guest:\n{wrong}");
}

/// What takes capabilities of the host is done by the VMM's owner: device nodes, and attributes for administrators.
#[test]
fn administrators_make_devices_and_set_attributes_as_on_the_file_system() {
    let base = base(&["host"]);
    let base = base.path();
    let (administrator, cases) = ("ADMINISTRATOR=1", "CASE=device,trusted,security");
    let host = lines(on_the_host(base, &format!("env {administrator} {cases} python3 program/cases.py host")));
    let volume = |name: &str, options: &str| format!("{}:/{name}{options}", base.join(name).display());
    let guest = lines(
        hull([
            "run",
            "--rm",
            "--memory",
            "256",
            "--cap-add",
            "MKNOD,SYS_ADMIN",
            "-e",
            administrator,
            "-e",
            cases,
            "-v",
            &volume("never", ":cache=never"),
            "-v",
            &volume("auto", ":cache=auto"),
            "-v",
            &volume("always", ":cache=always"),
            "-v",
            &volume("program", ":ro"),
            &debian(),
            "python3",
            "/program/cases.py",
            "/never",
            "/auto",
            "/always",
            // The container's root, which is an overlay on the host.
            "/tmp",
        ])
        .run(),
    );
    assert!(!host["host"]["device_nodes"].contains("null=EPERM"), "the host lets nobody make devices");
    let sections: Vec<_> = EVERY.iter().chain(&["tmp"]).map(|section| (*section, "host")).collect();
    compare(&guest, &host, &sections);
    // What a guest has made its host can see.
    let seen = fs::symlink_metadata(base.join("auto/device_nodes/null")).unwrap();
    assert!(seen.file_type().is_char_device());
    assert_eq!(seen.rdev(), rustix::fs::makedev(1, 3));
}
