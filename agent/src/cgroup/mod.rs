//! A container's cgroup (version 2): its directory, its processes, its events.
//!
//! The agent makes the cgroup and sets its limits before libcontainer moves the first process in, so limits are set
//! and changed by the same code, [`resources`].

pub(crate) mod devices;
pub(crate) mod resources;
pub(crate) mod stats;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, Result, Step};

/// Where the guest mounts the hierarchy.
pub(crate) const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// How long frozen and killed processes may take to get there. Killing takes as long as freeing memory does.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How deep a container may nest cgroups of its own, should it be allowed to make any: no deeper than their paths can
/// be followed again.
const MAX_DEPTH: &str = "64";

/// A cgroup by its directory. Does not remove it when dropped.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    /// The cgroup at a path from the root of the hierarchy.
    pub(crate) fn at(path: &Path) -> Self {
        Self { directory: Path::new(MOUNT_POINT).join(path.strip_prefix("/").unwrap_or(path)) }
    }

    pub(crate) fn child(&self, name: &str) -> Self {
        Self { directory: self.directory.join(name) }
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The path from the root of the hierarchy, as /proc/PID/cgroup and `linux.cgroupsPath` spell it.
    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/").join(self.directory.strip_prefix(MOUNT_POINT).unwrap_or(&self.directory))
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(crate) fn create(&self) -> Result<()> {
        match fs::create_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result.step_with(|| format!("make the cgroup {}", self.directory.display())),
        }
    }

    /// Keeps the processes in it from nesting cgroups without end.
    pub(crate) fn limit_depth(&self) -> Result<()> {
        self.write("cgroup.max.depth", MAX_DEPTH).step("limit the depth of the cgroup")
    }

    /// Gives the children of this cgroup every controller that it has itself.
    pub(crate) fn enable_controllers(&self) -> Result<()> {
        let controllers = self.read("cgroup.controllers").step("read the cgroup's controllers")?;
        let all: Vec<_> = controllers.split_whitespace().map(|controller| format!("+{controller}")).collect();
        if self.write("cgroup.subtree_control", &all.join(" ")).is_ok() {
            return Ok(());
        }
        // One that refuses keeps all others from being enabled by one write.
        for controller in all {
            if let Err(error) = self.write("cgroup.subtree_control", &controller) {
                tracing::warn!("cgroup controller {controller}: {error}");
            }
        }
        Ok(())
    }

    pub(crate) fn add(&self, pid: Pid) -> io::Result<()> {
        self.write("cgroup.procs", &pid.as_raw_nonzero().to_string())
    }

    pub(crate) fn read(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.file(name))
    }

    pub(crate) fn write(&self, name: &str, value: &str) -> io::Result<()> {
        // Without O_CREAT, which on a cgroup file system answers "permission denied" for a file that is not there.
        use io::Write as _;
        fs::File::options().write(true).open(self.file(name))?.write_all(value.as_bytes())
    }

    pub(crate) fn open(&self) -> io::Result<OwnedFd> {
        Ok(rustix::fs::open(&self.directory, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// The processes of this cgroup and of those below it, which the container may have made.
    pub(crate) fn pids(&self) -> Result<Vec<Pid>> {
        let mut pids = Vec::new();
        collect_pids(&self.directory, &mut pids).step("list the cgroup's processes")?;
        Ok(pids)
    }

    /// Kills every process in and below the cgroup, new ones included.
    pub(crate) fn kill(&self) -> Result<()> {
        match self.write("cgroup.kill", "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.step("kill the cgroup's processes"),
        }
    }

    /// Stops or continues every process, and returns when that is done.
    pub(crate) async fn set_frozen(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value).step("freeze the cgroup")?;
        self.wait_for("cgroup.events", "frozen", u64::from(frozen)).await
    }

    /// Waits until no process is left in or below the cgroup.
    pub(crate) async fn wait_empty(&self) -> Result<()> {
        self.wait_for("cgroup.events", "populated", 0).await
    }

    async fn wait_for(&self, name: &'static str, key: &'static str, value: u64) -> Result<()> {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        let file = Watched::open(&self.file(name)).step_with(|| format!("watch {name}"))?;
        loop {
            let content = file.read().step_with(|| format!("read {name}"))?;
            if stats::flat_keyed(&content).any(|(found, number)| found == key && number == value) {
                return Ok(());
            }
            if timeout_at(deadline, file.changed()).await.is_err() {
                return Err(Error::TimedOut(format!("wait for {key} {value} in {name}")));
            }
        }
    }

    /// Removes the cgroup and those below it. No process may be left in them.
    pub(crate) fn remove(&self) -> Result<()> {
        match remove_tree(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.step("remove the cgroup"),
        }
    }
}

/// A cgroup file that tells when it changes (cgroup-v2.rst, "Populated Notification").
pub(crate) struct Watched(AsyncFd<OwnedFd>);

impl Watched {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(crate::sys::watch(fs::File::open(path)?.into(), Interest::PRIORITY)?))
    }

    pub(crate) fn read(&self) -> io::Result<String> {
        let mut content = vec![0; 4096];
        let length = rustix::io::pread(self.0.get_ref(), &mut content, 0)?;
        content.truncate(length);
        String::from_utf8(content).map_err(io::Error::other)
    }

    /// Waits for a change after the last [`Watched::read`].
    pub(crate) async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

fn collect_pids(directory: &Path, pids: &mut Vec<Pid>) -> io::Result<()> {
    let content = match fs::read_to_string(directory.join("cgroup.procs")) {
        // A threaded cgroup, whose processes its parent lists.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
        result => result?,
    };
    pids.extend(content.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)));
    for child in children(directory)? {
        match collect_pids(&child, pids) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
    }
    Ok(())
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for child in children(directory)? {
        remove_tree(&child)?;
    }
    fs::remove_dir(directory)
}

fn children(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut children = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_the_hierarchy() {
        let cgroup = Cgroup::at(Path::new("/containers")).child("web");
        assert_eq!(cgroup.directory(), Path::new("/sys/fs/cgroup/containers/web"));
        assert_eq!(cgroup.path(), Path::new("/containers/web"));
    }

    #[test]
    fn pids_and_removal_cover_nested_cgroups() {
        let directory = tempfile::tempdir().unwrap();
        let cgroup = Cgroup { directory: directory.path().join("c") };
        fs::create_dir_all(cgroup.directory().join("inner")).unwrap();
        fs::write(cgroup.file("cgroup.procs"), "5\n6\n").unwrap();
        fs::write(cgroup.file("inner/cgroup.procs"), "7\n").unwrap();
        let pids: Vec<_> = cgroup.pids().unwrap().iter().map(|pid| pid.as_raw_nonzero().get()).collect();
        assert_eq!(pids, [5, 6, 7]);
        fs::remove_file(cgroup.file("cgroup.procs")).unwrap();
        fs::remove_file(cgroup.file("inner/cgroup.procs")).unwrap();
        cgroup.remove().unwrap();
        assert!(!cgroup.directory().exists());
        cgroup.remove().unwrap();
    }
}
