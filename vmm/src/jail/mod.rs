//! The jail: what the process gives up before it meets its guest.
//!
//! ```text
//! start ──open /dev/kvm──▶ enter ──read configuration, build, run──▶ end
//!   one thread, root          one thread, nobody
//! ```
//!
//! After [`enter`] the process has
//!
//! * a root directory that holds what the guest may see of the host, or nothing; mounts that the host makes there later
//!   arrive, and nothing that the process mounts leaves;
//! * a `/proc` of its own, without a name and without `/proc/sys`, for opening files anew by their descriptor;
//! * network, IPC and user namespaces of its own. The caller puts it into a PID namespace, since that begins with a child;
//! * an unprivileged user and group, and no capability on the host. In its user namespace, where every user of the host has
//!   its own number, it keeps the few with which a file server acts for other users on the files below its root.
//!
//! What it may still ask of the kernel is limited afterwards, thread by thread: [`filter`]. Why the file server keeps
//! capabilities is told in `docs/decisions/0004-a-jail-with-a-file-server-in-it.md`.

pub mod filter;
mod identity;
mod sys;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use self::identity::IdentityWriter;

/// What the process sees of the host's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// The directory, which must be a mount point.
    Directory(PathBuf),
    /// Nothing at all.
    Empty,
}

/// A step into the jail that failed. The process must end: it is half inside.
#[derive(Debug, thiserror::Error)]
#[error("cannot enter the jail: {step}: {source}; {REMEDY}")]
pub struct JailError {
    step: &'static str,
    source: io::Error,
}

const REMEDY: &str = "it takes root, Linux 5.8, and user namespaces (sysctl user.max_user_namespaces)";

pub(crate) fn step(step: &'static str) -> impl Fn(io::Error) -> JailError {
    move |source| JailError { step, source }
}

/// Enters the jail, and returns the directory with the process's descriptors in its `/proc`. The process must have one
/// thread, and be the first of its PID namespace.
///
/// # Errors
///
/// When the kernel refuses a step; see [`JailError`].
pub fn enter(root: &Root) -> Result<OwnedFd, JailError> {
    sys::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC).map_err(step("leave the namespaces"))?;
    let proc = sys::mount_private_proc().map_err(step("mount a /proc of its own"))?;
    change_root(root)?;
    let identity = IdentityWriter::start(&proc)?;
    sys::unshare(libc::CLONE_NEWUSER).map_err(step("make a user namespace"))?;
    identity.write()?;
    identity::become_nobody()?;
    sys::forbid_new_privileges().map_err(step("forbid new privileges"))?;
    sys::open_at(&proc, c"self/fd", libc::O_PATH | libc::O_DIRECTORY).map_err(step("open its own descriptors"))
}

/// Makes `root` the root of the process's mount namespace and lets go of everything else.
fn change_root(root: &Root) -> Result<(), JailError> {
    // What the host mounts still arrives; what is mounted here does not go out.
    sys::receive_mounts_only().map_err(step("stop mounts from going out"))?;
    let directory = match root {
        Root::Directory(directory) => directory,
        // Any directory will do to mount nothing on.
        Root::Empty => {
            sys::mount_nothing(c"/proc").map_err(step("mount an empty root"))?;
            Path::new("/proc")
        }
    };
    std::env::set_current_dir(directory).map_err(step("go to the new root"))?;
    // The old root is put below the new one, and is the first to be found there: so it is taken off again.
    sys::pivot_here().map_err(step("change the root"))?;
    std::env::set_current_dir("/").map_err(step("go to the new root"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Runs `body` in a process of its own, which may enter the jail; `body` returns 0 for success.
    ///
    /// The process is a copy of this test binary that runs only the named test, with a variable that tells it so.
    fn in_a_process_of_its_own(test: &str, body: impl FnOnce() -> Result<(), String>) {
        const CHILD: &str = "HULL_TEST_JAILED";
        if std::env::var_os(CHILD).is_some_and(|name| name == test) {
            std::process::exit(match body() {
                Ok(()) => 0,
                Err(why) => {
                    eprintln!("{why}");
                    1
                }
            });
        }
        if !sys::is_root() {
            eprintln!("skipped: entering the jail takes root");
            return;
        }
        let output = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", &format!("jail::tests::{test}"), "--nocapture", "--test-threads=1"])
            .env(CHILD, test)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The test harness runs a test in a thread, and a process that enters the jail must have one: so `body` runs in a fork.
    fn forked(body: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        sys::in_a_fork(move || body().map_err(io::Error::other)).map_err(|error| error.to_string())
    }

    fn expect(what: &str, holds: bool) -> Result<(), String> {
        if holds { Ok(()) } else { Err(format!("{what} does not hold")) }
    }

    #[test]
    fn nothing_of_the_host_is_left() {
        in_a_process_of_its_own("nothing_of_the_host_is_left", || {
            forked(|| {
                enter(&Root::Empty).map_err(|error| error.to_string())?;
                let entries = std::fs::read_dir("/").map_err(|error| error.to_string())?.count();
                expect("an empty root", entries == 0)?;
                expect("no way up", std::fs::metadata("/../etc").is_err())?;
                expect("another user", !sys::is_root())?;
                expect("a read-only root", std::fs::write("/file", "x").is_err())
            })
        });
    }

    #[test]
    fn files_below_the_root_can_be_given_to_any_user() {
        in_a_process_of_its_own("files_below_the_root_can_be_given_to_any_user", || {
            let dir = tempfile::tempdir_in("/var/tmp").map_err(|error| error.to_string())?;
            let path = dir.path().to_owned();
            let result = forked(move || {
                sys::unshare(libc::CLONE_NEWNS).map_err(|error| error.to_string())?;
                sys::receive_mounts_only().map_err(|error| error.to_string())?;
                sys::mount_tmpfs(&path).map_err(|error| error.to_string())?;
                std::fs::write(path.join("file"), "x").map_err(|error| error.to_string())?;
                let descriptors = enter(&Root::Directory(path)).map_err(|error| error.to_string())?;
                std::os::unix::fs::chown("/file", Some(4_000_000_000), Some(7)).map_err(|error| error.to_string())?;
                expect("its content can be read", std::fs::read("/file").is_ok())?;
                expect("no devices", sys::make_device(c"/disk").is_err())?;
                let up = sys::open_at(&descriptors, c"../../sys", libc::O_PATH);
                expect("no /proc/sys", up.is_err())
            });
            drop(dir);
            result
        });
    }
}
