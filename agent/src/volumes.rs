//! Volumes in the guest's memory that the containers of a sandbox share: a tmpfs or hugetlbfs each, made for the first container that names it
//! and there until the guest ends, as an emptyDir outlives the containers of its pod.
//!
//! What is in them the containers have made, so on the way to a part of one no link is followed: it would lead a container out of
//! its own root and into the guest's.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, move_mount, open_tree, unmount};
use rustix::system::sysinfo;
use tokio::task::spawn_blocking;

use crate::error::{Result, Step};
use crate::files::{self, File};
use crate::storage::Mounted;

/// What a volume leaves of the guest's memory to its programs, unless that is more than half. The kubelet's own limit can be all of
/// the node's memory.
const SPARED_BYTES: u64 = 64 << 20;
/// The kernel's settings of huge pages, by their sizes.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";

/// A container's view of a volume.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) name: String,
    /// 0 leaves it to the kernel: half of the guest's memory.
    pub(crate) size_bytes: u64,
    /// Of huge pages, which the volume is made of; 0 for a tmpfs.
    pub(crate) page_bytes: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Below the root, which is the empty path.
    pub(crate) path: PathBuf,
    /// The way there, outermost first.
    pub(crate) directories: Vec<File>,
    pub(crate) mount_point: PathBuf,
}

/// All of the guest's.
#[derive(Debug)]
pub(crate) struct Volumes {
    /// Where each has a directory, which nobody but root can enter.
    directory: PathBuf,
    made: Mutex<HashSet<String>>,
}

impl Volumes {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory, made: Mutex::default() }
    }

    /// Has a container's part of a volume at its mount point, and makes the volume if it is the first.
    pub(crate) async fn attach(self: &Arc<Self>, volume: Volume) -> Result<Mounted> {
        let volumes = self.clone();
        spawn_blocking(move || volumes.attach_now(volume)).await.step("mount a volume")?
    }

    fn attach_now(&self, volume: Volume) -> Result<Mounted> {
        let root = self.directory.join(&volume.name);
        {
            let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
            if !made.contains(&volume.name) {
                volume.make(&root)?;
                made.insert(volume.name.clone());
            }
        }
        let part = volume.open(&root).step_with(|| format!("open {} in the volume", volume.path.display()))?;
        let target = &volume.mount_point;
        bind(&part, target).step_with(|| format!("mount a volume at {}", target.display()))?;
        Ok(Mounted::at(volume.mount_point))
    }
}

impl Drop for Volumes {
    /// Only a test's volumes have an end before the machine's.
    fn drop(&mut self) {
        for name in self.made.get_mut().unwrap_or_else(PoisonError::into_inner).drain() {
            let _ = unmount(self.directory.join(name), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }
}

impl Volume {
    fn make(&self, root: &Path) -> Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(root).step("make a volume's directory")?;
        let total_bytes = total_memory_bytes();
        let options = self.options(total_bytes);
        let kind = if self.page_bytes == 0 {
            "tmpfs"
        } else {
            allow_huge_pages(self.page_bytes, total_bytes)?;
            "hugetlbfs"
        };
        // What programs may do with it is what they may do with the kubelet's.
        mount(kind, root, kind, MountFlags::empty(), options.as_c_str())
            .step_with(|| format!("mount a volume's {kind}"))
    }

    fn options(&self, total_bytes: u64) -> std::ffi::CString {
        let mut options = format!("mode={:o},uid={},gid={}", self.mode, self.uid, self.gid);
        if self.size_bytes != 0 {
            let most = total_bytes.saturating_sub(SPARED_BYTES).max(total_bytes / 2);
            options.push_str(&format!(",size={}", self.size_bytes.min(most)));
        }
        if self.page_bytes != 0 {
            options.push_str(&format!(",pagesize={}", self.page_bytes));
        }
        // Numbers have no zero byte.
        std::ffi::CString::new(options).unwrap_or_default()
    }

    /// Opens the container's part, whose directories are made where nothing is there.
    fn open(&self, root: &Path) -> io::Result<OwnedFd> {
        let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for directory in &self.directories {
            files::make_missing_directory(&root, directory)?;
        }
        if self.path.as_os_str().is_empty() {
            return Ok(root);
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        Ok(openat2(&root, &self.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }
}

/// Makes what is open visible at `target`, which is made of its kind.
fn bind(source: impl AsFd, target: &Path) -> io::Result<()> {
    if FileType::from_raw_mode(fstat(&source)?.st_mode) == FileType::Directory {
        fs::create_dir_all(target)?;
    } else {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::File::options().create(true).truncate(false).write(true).open(target)?;
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(source, "", flags)?;
    Ok(move_mount(tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Lets programs have huge pages of this size, made of what memory is free when they map them: a guest sets none aside, so that
/// volumes that are not used cost nothing. How many each container may have is its cgroup's to say.
fn allow_huge_pages(page_bytes: u64, total_bytes: u64) -> Result<()> {
    let most = format!("{HUGE_PAGES}/hugepages-{}kB/nr_overcommit_hugepages", page_bytes >> 10);
    fs::write(&most, (total_bytes / page_bytes).to_string())
        .step_with(|| format!("allow huge pages of {page_bytes} bytes by {most} (2 MiB is the size that guests have)"))
}

fn total_memory_bytes() -> u64 {
    let system = sysinfo();
    system.totalram.saturating_mul(system.mem_unit.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::files::What;

    fn volume(path: &str, directories: &[&str]) -> Volume {
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let directory = |path: &&str| File { path: path.into(), mode: 0o750, uid, gid, what: What::Directory };
        Volume {
            name: "0".into(),
            size_bytes: 0,
            page_bytes: 0,
            mode: 0o2770,
            uid: 5,
            gid: 7,
            path: path.into(),
            directories: directories.iter().map(directory).collect(),
            mount_point: "/nowhere".into(),
        }
    }

    #[test]
    fn the_limit_is_the_requests_as_far_as_the_guest_can_hold_it() {
        let limited =
            |size_bytes, total| Volume { size_bytes, ..volume("", &[]) }.options(total).into_string().unwrap();
        assert_eq!(limited(4096, 1 << 30), "mode=2770,uid=5,gid=7,size=4096");
        assert_eq!(limited(1 << 40, 512 << 20), format!("mode=2770,uid=5,gid=7,size={}", 448 << 20));
        assert_eq!(limited(1 << 40, 100 << 20), format!("mode=2770,uid=5,gid=7,size={}", 50 << 20));
        assert_eq!(limited(0, 1 << 30), "mode=2770,uid=5,gid=7");
        let huge = Volume { page_bytes: 2 << 20, ..volume("", &[]) };
        assert_eq!(huge.options(1 << 30).to_str(), Ok("mode=2770,uid=5,gid=7,pagesize=2097152"));
    }

    #[test]
    fn missing_directories_are_made_and_others_left_as_they_are() {
        use std::os::unix::fs::PermissionsExt as _;
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("a")).unwrap();
        let before = fs::metadata(root.path().join("a")).unwrap().permissions();
        volume("a/b", &["a", "a/b"]).open(root.path()).unwrap();
        assert_eq!(fs::metadata(root.path().join("a")).unwrap().permissions(), before);
        assert_eq!(fs::metadata(root.path().join("a/b")).unwrap().permissions().mode() & 0o7777, 0o750);
        // What a container has put there since is what it gets.
        fs::write(root.path().join("file"), "x").unwrap();
        volume("file", &["file"]).open(root.path()).unwrap();
    }

    #[test]
    fn a_link_on_the_way_is_not_followed() {
        let (root, victim) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(victim.path(), root.path().join("a")).unwrap();
        volume("a", &["a"]).open(root.path()).unwrap_err();
        volume("a/b", &["a", "a/b"]).open(root.path()).unwrap_err();
        assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 0);
    }
}
