//! emptyDirs in memory: each becomes a tmpfs, or a hugetlbfs, of the guest's own, with the limit, permissions and owner of the one that the
//! kubelet has mounted on the node. That one stays empty.
//!
//! Only where the node's holds files already when its first container comes, which the kubelet never does, is it shared as any
//! other directory. Directories are no reason: the kubelet makes those that a `subPath` names, and so does the guest.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use hull_protocol::FILES_DIRECTORY;
use hull_protocol::agent::{File, MemoryVolume, file};

/// The kubelet's plugin for emptyDirs, whose name is a directory in their paths.
const PLUGIN: &str = "kubernetes.io~empty-dir";
/// Where, in the pod's directory, the kubelet has bind mounts of parts of volumes: VOLUME/CONTAINER/N.
const PARTS: &str = "volume-subpaths";
// f_type of statfs(2).
const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// What has been decided of a pod's volumes, so that all of its containers see the same ones.
#[derive(Debug, Default)]
pub(crate) struct MemoryVolumes {
    /// Their numbers in the guest, by their paths on the node; none for one that is shared.
    known: Mutex<HashMap<PathBuf, Option<usize>>>,
}

impl MemoryVolumes {
    /// What container `container` is to have in the guest for its mount number `index`; none where the source is no emptyDir in
    /// memory of the pod with this `uid`, or is shared.
    pub(crate) fn take(&self, source: &Path, uid: Option<&str>, container: &str, index: usize) -> Option<MemoryVolume> {
        let taken = self.try_take(source, uid, container, index);
        taken.unwrap_or_else(|error| {
            // Sharing it finds out the same, or does not need what could not be found out.
            tracing::warn!("{} is shared, it cannot be looked into: {error}", source.display());
            None
        })
    }

    fn try_take(
        &self,
        source: &Path,
        uid: Option<&str>,
        container: &str,
        index: usize,
    ) -> io::Result<Option<MemoryVolume>> {
        let source = source.canonicalize()?;
        let Some(volume) = volume_of(&source, uid) else { return Ok(None) };
        let (root, part) = (fs::metadata(&volume)?, fs::metadata(&source)?);
        if root.dev() != part.dev() {
            return Ok(None);
        }
        let Some(page_bytes) = page_bytes_of_mount(&volume, &root)? else { return Ok(None) };
        let mut tree = Tree::default();
        tree.read(&volume, Path::new(""))?;
        let number = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let next = known.len();
            *known.entry(volume.clone()).or_insert_with(|| tree.has_no_files.then_some(next))
        };
        let Some(number) = number else {
            tracing::info!("{} is shared: it was not empty when its first container came", volume.display());
            return Ok(None);
        };
        let Some(path) = tree.find(&root, &part) else { return Ok(None) };
        let on_the_way = tree.directories.iter().filter(|(directory, _)| path.starts_with(directory));
        let statistics = rustix::fs::statvfs(&volume)?;
        Ok(Some(MemoryVolume {
            name: number.to_string(),
            size_bytes: statistics.f_blocks.saturating_mul(statistics.f_frsize),
            page_bytes,
            mode: root.mode() & 0o7777,
            uid: root.uid(),
            gid: root.gid(),
            directories: on_the_way.map(|(path, metadata)| wire(path, metadata)).collect(),
            path: path.display().to_string(),
            mount_point: format!("{FILES_DIRECTORY}/{container}/{index}"),
            ..Default::default()
        }))
    }
}

/// The emptyDir that a source is, or is a part of, by the kubelet's layout of a pod's directory. With a `uid` only that pod's.
fn volume_of(source: &Path, uid: Option<&str>) -> Option<PathBuf> {
    let name_of = |path: &Path| path.file_name().map(OsStr::to_owned);
    let above: Vec<&Path> = source.ancestors().collect();
    let (pod, volume) = match above[..] {
        // POD/volumes/PLUGIN/NAME
        [_, plugin, _, pod, ..] if name_of(plugin)? == PLUGIN => (pod, source.to_owned()),
        // POD/volume-subpaths/NAME/CONTAINER/N
        [_, _, volume, parts, pod, ..] if name_of(parts)? == PARTS => {
            (pod, pod.join("volumes").join(PLUGIN).join(name_of(volume)?))
        }
        _ => return None,
    };
    match uid {
        Some(uid) if name_of(pod)? != uid => None,
        _ => Some(volume),
    }
}

/// The size of the huge pages of the hugetlbfs that is mounted at `path`, or 0 for a tmpfs; none for all else.
fn page_bytes_of_mount(path: &Path, metadata: &Metadata) -> io::Result<Option<u64>> {
    let above = path.parent().map(fs::metadata).transpose()?;
    if above.is_some_and(|above| above.dev() == metadata.dev()) {
        return Ok(None);
    }
    let statistics = rustix::fs::statfs(path)?;
    Ok(match u64::try_from(statistics.f_type) {
        Ok(TMPFS_MAGIC) => Some(0),
        // Its blocks are its pages.
        Ok(HUGETLBFS_MAGIC) => u64::try_from(statistics.f_bsize).ok(),
        _ => None,
    })
}

/// What the node's volume holds.
#[derive(Debug)]
struct Tree {
    /// By their paths below the root; each after the one that it is in.
    directories: Vec<(PathBuf, Metadata)>,
    has_no_files: bool,
}

impl Default for Tree {
    fn default() -> Self {
        Self { directories: Vec::new(), has_no_files: true }
    }
}

impl Tree {
    fn read(&mut self, root: &Path, path: &Path) -> io::Result<()> {
        let mut ahead = vec![path.to_owned()];
        while let Some(path) = ahead.pop() {
            for entry in fs::read_dir(root.join(&path))? {
                let entry = entry?;
                let metadata = entry.metadata()?;
                if metadata.is_dir() {
                    let path = path.join(entry.file_name());
                    ahead.push(path.clone());
                    self.directories.push((path, metadata));
                } else {
                    self.has_no_files = false;
                }
            }
        }
        Ok(())
    }

    /// The path of the root itself or of a directory below it, whichever `part` is.
    fn find(&self, root: &Metadata, part: &Metadata) -> Option<PathBuf> {
        if part.ino() == root.ino() {
            return Some(PathBuf::new());
        }
        let found = self.directories.iter().find(|(_, metadata)| metadata.ino() == part.ino());
        found.map(|(path, _)| path.clone())
    }
}

fn wire(path: &Path, metadata: &Metadata) -> File {
    File {
        path: path.display().to_string(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        what: Some(file::What::Directory(true)),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_known_by_the_kubelets_layout() {
        let whole = Path::new("/k/pods/u1/volumes/kubernetes.io~empty-dir/cache");
        assert_eq!(volume_of(whole, None).unwrap(), whole);
        assert_eq!(volume_of(whole, Some("u1")).unwrap(), whole);
        assert_eq!(volume_of(whole, Some("u2")), None);
        let part = Path::new("/k/pods/u1/volume-subpaths/cache/main/0");
        assert_eq!(volume_of(part, Some("u1")).unwrap(), whole);
        assert_eq!(volume_of(part, Some("u2")), None);
        for other in ["/", "/srv", "/k/pods/u1/volumes/kubernetes.io~configmap/cache", "/k/pods/u1/volume-subpaths/c"] {
            assert_eq!(volume_of(Path::new(other), None), None, "{other}");
        }
    }

    #[test]
    fn an_empty_dir_on_disk_is_not_taken() {
        // No mount point, whatever the file system.
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("u/volumes").join(PLUGIN).join("cache");
        fs::create_dir_all(&volume).unwrap();
        assert_eq!(MemoryVolumes::default().take(&volume, Some("u"), "c", 0), None);
        assert_eq!(MemoryVolumes::default().take(&volume.join("gone"), Some("u"), "c", 0), None);
    }

    #[test]
    fn a_part_is_found_by_its_inode_and_the_way_there_is_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a b/c")).unwrap();
        fs::create_dir_all(dir.path().join("d")).unwrap();
        let mut tree = Tree::default();
        tree.read(dir.path(), Path::new("")).unwrap();
        let root = fs::metadata(dir.path()).unwrap();
        assert_eq!(tree.find(&root, &root).unwrap(), Path::new(""));
        let part = fs::metadata(dir.path().join("a b/c")).unwrap();
        assert_eq!(tree.find(&root, &part).unwrap(), Path::new("a b/c"));
        let place = |wanted: &str| tree.directories.iter().position(|(path, _)| path == Path::new(wanted)).unwrap();
        assert!(place("a b") < place("a b/c"));
        assert!(tree.has_no_files);
        fs::write(dir.path().join("d/file"), "x").unwrap();
        let mut tree = Tree::default();
        tree.read(dir.path(), Path::new("")).unwrap();
        assert!(!tree.has_no_files);
    }
}
