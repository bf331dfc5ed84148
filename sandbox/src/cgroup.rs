//! The cgroup (version 2) on the host that a pod is accounted to: it holds the owner and the VMM that it starts.
//!
//! No limit is set here. Whoever made the cgroup above has limited the pod as a whole.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Where version 2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// What a pod's use is counted by.
const CONTROLLERS: [&str; 4] = ["+cpu", "+memory", "+pids", "+io"];

/// A cgroup that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A host with cgroups of version 1.
    #[error("this host has no cgroups of version 2 at {ROOT}, which Hull needs")]
    Version,
    /// A path that is none.
    #[error("{0:?} is no path of a cgroup")]
    Path(String),
    /// A directory or file of the cgroup.
    #[error("cannot use the cgroup {path}: {source}")]
    Use {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// A pod's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// The cgroup at `path`, as an OCI specification has it: a path below the root, or systemd's `slice:prefix:name`.
    ///
    /// # Errors
    ///
    /// Fails where the path leads out of the tree.
    pub fn at(path: &str) -> Result<Self, CgroupError> {
        let relative = match path.split(':').collect::<Vec<_>>()[..] {
            [slice, prefix, name] => {
                let slices = expand_slice(slice).ok_or_else(|| CgroupError::Path(path.to_owned()))?;
                let scope = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
                slices.join(scope)
            }
            _ => PathBuf::from(path),
        };
        let mut dir = PathBuf::from(ROOT);
        for component in relative.components() {
            match component {
                Component::Normal(name) => dir.push(name),
                Component::RootDir | Component::CurDir => {}
                Component::ParentDir | Component::Prefix(_) => return Err(CgroupError::Path(path.to_owned())),
            }
        }
        if dir == Path::new(ROOT) { Err(CgroupError::Path(path.to_owned())) } else { Ok(Self(dir)) }
    }

    /// Makes the cgroup and moves the calling process into it; what it starts from then on is in it too.
    ///
    /// # Errors
    ///
    /// Fails without cgroups of version 2, or where the kernel refuses.
    pub fn join(&self) -> Result<(), CgroupError> {
        check_version(Path::new(ROOT))?;
        let failed = |source| CgroupError::Use { path: self.0.clone(), source };
        std::fs::create_dir_all(&self.0).map_err(failed)?;
        let above: Vec<_> = self.0.ancestors().skip(1).take_while(|dir| dir.starts_with(ROOT)).collect();
        for dir in above.into_iter().rev() {
            for controller in CONTROLLERS {
                // One that is not there is not counted by; whoever made the cgroup may not want it.
                let _ = std::fs::write(dir.join("cgroup.subtree_control"), controller);
            }
        }
        std::fs::write(self.0.join("cgroup.procs"), std::process::id().to_string()).map_err(failed)
    }

    /// Moves the calling process out of the cgroup and removes it, as well as what is above and empty.
    pub fn leave(&self) {
        // The root alone takes processes whatever it passes on.
        let _ = std::fs::write(Path::new(ROOT).join("cgroup.procs"), std::process::id().to_string());
        self.remove();
    }

    /// Removes the cgroup, unless something is in it.
    pub fn remove(&self) {
        match std::fs::remove_dir(&self.0) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::debug!("the cgroup {} stays: {error}", self.0.display());
            }
            _ => {}
        }
    }

    /// Removes the cgroup of processes that have been killed, and waits for the last of them for at most `limit`: the kernel takes
    /// its time over the memory of a VMM.
    pub fn remove_killed(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        // Opened before the look at what is in it, so that no change is missed.
        while let Ok(events) = File::open(self.0.join("cgroup.events")) {
            let populated = std::io::read_to_string(&events).is_ok_and(|text| text.contains("populated 1"));
            let left = deadline.saturating_duration_since(Instant::now());
            if !populated || left.is_zero() {
                break;
            }
            let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            if poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&left)).is_err() {
                break;
            }
        }
        self.remove();
    }

    /// Whether the cgroup above, a pod's, has a limit of memory. The kubelet sets one where all containers of the pod have one.
    #[must_use]
    pub fn is_memory_limited_above(&self) -> bool {
        let above = self.0.parent().unwrap_or(Path::new(ROOT));
        std::fs::read_to_string(above.join("memory.max")).is_ok_and(|limit| limit.trim() != "max")
    }

    /// Whether the kernel has killed a process in it for want of memory.
    #[must_use]
    pub fn has_oom_killed(&self) -> bool {
        let events = std::fs::read_to_string(self.0.join("memory.events")).unwrap_or_default();
        events.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count.trim() != "0")
    }
}

/// Whether cgroups of version 2 are what is mounted at `root`: a host with both versions has a directory for each of its controllers there,
/// and one for version 2, which is left without any.
fn check_version(root: &Path) -> Result<(), CgroupError> {
    if root.join("cgroup.controllers").exists() { Ok(()) } else { Err(CgroupError::Version) }
}

/// The directories of a slice: `a-b.slice` lies in `a.slice`.
fn expand_slice(slice: &str) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    if slice.is_empty() || slice == "-.slice" {
        return Some(path);
    }
    let name = slice.strip_suffix(".slice").filter(|name| !name.contains('/'))?;
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place(path: &str) -> Option<String> {
        Cgroup::at(path).ok().map(|cgroup| cgroup.0.display().to_string())
    }

    #[test]
    fn both_spellings_lead_below_the_root() {
        assert_eq!(place("/kubepods/pod1/c"), Some("/sys/fs/cgroup/kubepods/pod1/c".into()));
        assert_eq!(
            place("kubepods-pod1.slice:cri-containerd:c"),
            Some("/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice/cri-containerd-c.scope".into())
        );
        assert_eq!(place(":cri:c"), Some("/sys/fs/cgroup/cri-c.scope".into()));
        for wrong in ["", "/", "/a/../..", "a--b.slice:x:y", "no-slice:x:y", "../x.slice:a:b"] {
            assert_eq!(place(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_host_with_version_1_is_refused_and_told_what_it_lacks() {
        let root = tempfile::tempdir().unwrap();
        for dir in ["cpu,cpuacct", "memory", "pids", "unified"] {
            std::fs::create_dir(root.path().join(dir)).unwrap();
        }
        std::fs::write(root.path().join("unified/cgroup.controllers"), "").unwrap();
        let refused = check_version(root.path()).unwrap_err();
        let told = "this host has no cgroups of version 2 at /sys/fs/cgroup, which Hull needs";
        assert_eq!(refused.to_string(), told);
        std::fs::write(root.path().join("cgroup.controllers"), "cpu memory pids").unwrap();
        check_version(root.path()).unwrap();
    }

    proptest! {
        #[test]
        fn no_path_leads_out_of_the_tree(path in "[a-z./:-]{0,30}") {
            if let Ok(cgroup) = Cgroup::at(&path) {
                prop_assert!(cgroup.0.starts_with(ROOT));
                prop_assert!(!cgroup.0.components().any(|component| component == Component::ParentDir));
            }
        }
    }
}
