//! The tree of directories that a sandbox's guest sees through virtio-fs.
//!
//! The tree is a small tmpfs at `shared` in the sandbox's directory, with a directory per container in it:
//!
//! ```text
//! shared/CONTAINER/rootfs       the container's root: an overlay, or somebody's directory
//! shared/CONTAINER/volumes/N    a bind mount of a file or directory of the host; `layerN` is one of the root's
//! shared/CONTAINER/files/NAME   a file made for the container: hosts, hostname, resolv.conf
//! ```
//!
//! Because all mounts lie below one mount, letting go of that one detaches them all, and what then is left to remove is
//! empty: no removal ever walks into a directory of the host.
//!
//! The mounts are made in a mount namespace of the owner's ([`enter_mount_namespace`]), so they end with it.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hull_protocol::{SHARE_MOUNT_POINT, SHARE_TAG};
use hull_sandbox_sys::mounts;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
};

use crate::broker::NodesOrMounts;
use crate::ext4;
use crate::mount::FileSystem;
use crate::root::RootError;

/// A mount or directory of a share that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The owner may not have a mount namespace.
    #[error("cannot make a mount namespace: {0}; Hull needs to run as root")]
    Namespace(#[source] std::io::Error),
    /// A directory or file in the tree.
    #[error("cannot make {path}: {source}")]
    Make {
        /// What was to be made.
        path: PathBuf,
        /// Why it was not.
        source: std::io::Error,
    },
    /// The source of a volume or root.
    #[error("the volume source {path} cannot be used: {source}; it must exist")]
    Source {
        /// The directory or file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A volume that follows the host's mounts, beside device nodes.
    #[error(
        "the volume source {path} cannot be used such that it follows the host's mounts: a container of this sandbox has made device nodes; \
         give it without mount propagation, or take CAP_MKNOD from the containers"
    )]
    Nodes {
        /// The directory or file.
        path: PathBuf,
    },
    /// The owners of a volume's files.
    #[error(
        "the owners of {path} cannot be mapped: {source}; it takes a file system such as ext4, xfs, btrfs or tmpfs, and Linux 5.12"
    )]
    Owners {
        /// The directory or file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A mount.
    #[error("cannot mount {what} at {path}: {source}")]
    Mount {
        /// What was to be mounted.
        what: String,
        /// Where.
        path: PathBuf,
        /// Why it was not.
        source: std::io::Error,
    },
}

/// Puts the calling thread, and threads and processes that it starts from then on, into a mount namespace of its own, which
/// sees mounts that the host makes later but not the reverse. To be called before any other thread exists.
///
/// # Errors
///
/// Fails without `CAP_SYS_ADMIN`.
pub fn enter_mount_namespace() -> Result<(), ShareError> {
    let namespace = |errno: Errno| ShareError::Namespace(errno.into());
    unshare_mounts().map_err(namespace)?;
    rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).map_err(namespace)
}

fn unshare_mounts() -> rustix::io::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(|errno| Errno::from_raw_os_error(errno as i32))
}

/// Where a container's root comes from, of what is mounted on the host; [`crate::root`] has the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootSource {
    /// A directory of the host, used as it is: the container's writes go there.
    Directory(PathBuf),
    /// Directories that nobody changes, bottom first, below a writable layer of the container's own.
    Layers(Vec<PathBuf>),
}

/// A directory or file of the host that a container sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Volume {
    /// On the host.
    pub source: PathBuf,
    /// Whether the guest can change it, or anything mounted below it: enforced on the host.
    pub read_only: bool,
    /// Whether what the host mounts below it later stays away.
    pub private: bool,
    /// Who owns the files.
    pub owners: Owners,
}

impl Volume {
    /// One that nobody can change through it.
    fn unchanging(source: &Path) -> Self {
        Self { source: source.to_owned(), read_only: true, private: true, ..Self::default() }
    }
}

/// Who stands on the host for the container's root: the two change places, so that what either makes is the other's on the other side, and
/// everybody else stays who they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owners {
    /// A user of the host; none, or root, changes nothing.
    pub uid: Option<u32>,
    /// A group of the host.
    pub gid: Option<u32>,
}

impl Owners {
    fn are_the_hosts(self) -> bool {
        self.uid.unwrap_or(0) == 0 && self.gid.unwrap_or(0) == 0
    }
}

/// A mapping in which `id` and 0 change places, for user_namespaces(7).
fn swapped(id: Option<u32>) -> String {
    // The highest number stands for no user at all.
    const END: u32 = u32::MAX;
    let Some(id) = id.filter(|id| *id != 0 && *id != END) else { return format!("0 0 {END}\n") };
    let mut map = format!("0 {id} 1\n{id} 0 1\n");
    for (first, count) in [(1, id - 1), (id + 1, END - id - 1)] {
        if count > 0 {
            map += &format!("{first} {first} {count}\n");
        }
    }
    map
}

/// What the guest may cache of a volume.
///
/// Each policy but the usual one is a share of its own, of a directory of the tree that is named after it and that holds nothing but
/// volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Caching {
    /// Nothing: what the host changes is seen at once.
    Never,
    /// Names and attributes for about a second, contents until the file is opened anew.
    #[default]
    Auto,
    /// Everything, for as long as there is memory: for what nobody changes on the host.
    Always,
}

impl Caching {
    /// The share's tag and its directory in the tree, which no container can be called; none for the share of the whole tree.
    pub(crate) fn share(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Never => Some(("hull-never", ".never")),
            Self::Auto => None,
            Self::Always => Some(("hull-always", ".always")),
        }
    }

    /// The share's tag.
    pub(crate) fn tag(self) -> &'static str {
        self.share().map_or(SHARE_TAG, |(tag, _)| tag)
    }

    /// How far the guest reads ahead, in KiB; 0 is as far as its kernel does (128). What stays in its memory for good may as well come
    /// in the largest pieces that a request has.
    pub(crate) fn read_ahead_kib(self) -> u32 {
        match self {
            Self::Always => 1024,
            Self::Never | Self::Auto => 0,
        }
    }

    /// Where the guest mounts the share.
    pub(crate) fn mount_point(self) -> String {
        let suffix = self.share().map_or("", |(_, directory)| directory);
        format!("{SHARE_MOUNT_POINT}{suffix}")
    }
}

/// The tree of one sandbox.
#[derive(Debug)]
pub struct Share {
    root: PathBuf,
    /// Holds the writable layers, outside the tree.
    layers: PathBuf,
    nodes_or_mounts: Arc<NodesOrMounts>,
}

/// The tree's place in a sandbox's directory.
pub(crate) const DIR: &str = "shared";

/// What a container's root is called in the tree, in the container's directory.
pub(crate) const ROOT: &str = "rootfs";

/// Where a container's root is in the tree.
pub(crate) fn root_in(tree: &Path, container: &str) -> PathBuf {
    tree.join(container).join(ROOT)
}

impl Share {
    /// Makes the empty tree at `root`; writable layers go to `layers`.
    ///
    /// # Errors
    ///
    /// Fails where the tmpfs cannot be mounted.
    pub fn create(root: PathBuf, layers: PathBuf) -> Result<Self, ShareError> {
        make_dir(&root)?;
        rustix::mount::mount("hull", &root, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755,size=16m")
            .map_err(|errno| mount_error("a tmpfs", &root, errno))?;
        // What is mounted below it from now on is to reach the VMM, which has a mount namespace of its own.
        rustix::mount::mount_change(&root, MountPropagationFlags::SHARED)
            .map_err(|errno| mount_error("a tmpfs", &root, errno))?;
        Ok(Self { root, layers, nodes_or_mounts: Arc::default() })
    }

    /// What the guest makes, or what turns up in the tree.
    pub(crate) fn nodes_or_mounts(&self) -> Arc<NodesOrMounts> {
        self.nodes_or_mounts.clone()
    }

    /// The tree on the host.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Puts a container's root into the tree and says where the guest finds it.
    ///
    /// # Errors
    ///
    /// Fails where a source is missing or a mount fails.
    pub fn add_root(&self, container: &str, source: &RootSource) -> Result<String, ShareError> {
        let dir = self.root.join(container);
        let target = root_in(&self.root, container);
        make_dir(&dir)?;
        make_dir(&target)?;
        match source {
            RootSource::Directory(directory) => {
                bind(&Volume { source: directory.clone(), private: true, ..Default::default() }, &target)?
            }
            RootSource::Layers(layers) => self.mount_overlay(container, layers, &target)?,
        }
        Ok(format!("{SHARE_MOUNT_POINT}/{container}/rootfs"))
    }

    /// Puts what lies below a container's root into the tree, so that nothing can be written to it, and says where the guest finds it.
    ///
    /// # Errors
    ///
    /// Fails where a source is missing or a mount fails.
    pub fn add_lower_root(&self, container: &str, source: &RootSource) -> Result<String, ShareError> {
        let target = root_in(&self.root, container);
        make_dir_all(&target)?;
        match source {
            RootSource::Directory(directory) => bind(&Volume::unchanging(directory), &target)?,
            RootSource::Layers(layers) => mount_read_only(layers, &target)?,
        }
        Ok(format!("{SHARE_MOUNT_POINT}/{container}/rootfs"))
    }

    /// Makes a disk for what a container writes and says where it is on the host. It goes with the container's part of the tree.
    ///
    /// # Errors
    ///
    /// Fails where it cannot be made.
    pub(crate) fn add_disk(&self, container: &str, bytes: u64) -> Result<PathBuf, RootError> {
        let path = self.make_layers(container)?.join("disk.ext4");
        ext4::make(&path, bytes)?;
        Ok(path)
    }

    /// Puts a container's root into the tree that others have prepared as file systems, mounted one over the other in this
    /// order, and says where the guest finds it.
    ///
    /// # Errors
    ///
    /// Fails where a mount fails.
    pub fn add_mounted_root(&self, container: &str, file_systems: &[FileSystem]) -> Result<String, ShareError> {
        let dir = self.root.join(container);
        let target = root_in(&self.root, container);
        make_dir(&dir)?;
        make_dir(&target)?;
        for file_system in file_systems {
            if file_system.is_bind() {
                let (source, read_only) = (file_system.source.clone().into(), file_system.is_read_only());
                bind(&Volume { source, read_only, private: true, ..Default::default() }, &target)?;
            } else {
                file_system.mount(&target).map_err(|errno| mount_error(&file_system.fstype, &target, errno))?;
            }
        }
        Ok(format!("{SHARE_MOUNT_POINT}/{container}/rootfs"))
    }

    /// Puts a volume into the tree and says where the guest finds it.
    ///
    /// # Errors
    ///
    /// Fails where the source is missing or the mount fails.
    pub fn add_volume(&self, container: &str, index: usize, volume: &Volume) -> Result<String, ShareError> {
        self.add_cached_volume(container, index, volume, Caching::Auto)
    }

    /// The same, with a policy that the sandbox was started with
    /// ([`Configured::with`](crate::sandbox::Configured::with)).
    ///
    /// # Errors
    ///
    /// Fails where the source is missing or the mount fails.
    pub fn add_cached_volume(
        &self,
        container: &str,
        index: usize,
        volume: &Volume,
        caching: Caching,
    ) -> Result<String, ShareError> {
        self.place_volume(container, &index.to_string(), volume, caching)
    }

    /// Puts a layer of a container's root, a file, into the tree as a volume that nobody can change.
    pub(crate) fn add_layer(&self, container: &str, index: usize, file: &Path) -> Result<String, ShareError> {
        let volume = Volume::unchanging(file);
        self.place_volume(container, &format!("layer{index}"), &volume, Caching::Auto)
    }

    fn place_volume(
        &self,
        container: &str,
        name: &str,
        volume: &Volume,
        caching: Caching,
    ) -> Result<String, ShareError> {
        let tree = caching.share().map_or_else(|| self.root.clone(), |(_, directory)| self.root.join(directory));
        let dir = tree.join(container).join("volumes");
        make_dir_all(&dir)?;
        let target = dir.join(name);
        let metadata = std::fs::metadata(&volume.source)
            .map_err(|source| ShareError::Source { path: volume.source.clone(), source })?;
        if metadata.is_dir() {
            make_dir(&target)?;
        } else {
            make_file(&target, b"")?;
        }
        if !volume.private && !self.nodes_or_mounts.allow_mounts() {
            return Err(ShareError::Nodes { path: volume.source.clone() });
        }
        bind(volume, &target)?;
        Ok(format!("{}/{container}/volumes/{name}", caching.mount_point()))
    }

    /// Puts an image's files into the tree, as a volume that nobody can change, and says where the guest finds it. `layers` are as in
    /// [`RootSource::Layers`].
    ///
    /// # Errors
    ///
    /// Fails where a layer is missing or the mount fails.
    pub fn add_image(&self, container: &str, index: usize, layers: &[PathBuf]) -> Result<String, ShareError> {
        let dir = self.root.join(container).join("volumes");
        let target = dir.join(index.to_string());
        make_dir_all(&target)?;
        mount_read_only(layers, &target)?;
        Ok(format!("{SHARE_MOUNT_POINT}/{container}/volumes/{index}"))
    }

    /// Makes the directory that is the root of a share of its own.
    pub(crate) fn add_tree(&self, caching: Caching) -> Result<(), ShareError> {
        caching.share().map_or(Ok(()), |(_, directory)| make_dir(&self.root.join(directory)))
    }

    /// Makes a small file for a container and says where the guest finds it.
    ///
    /// # Errors
    ///
    /// Fails where the file cannot be written.
    pub fn add_file(&self, container: &str, name: &str, contents: &[u8]) -> Result<String, ShareError> {
        let dir = self.root.join(container).join("files");
        make_dir_all(&dir)?;
        make_file(&dir.join(name), contents)?;
        Ok(format!("{SHARE_MOUNT_POINT}/{container}/files/{name}"))
    }

    /// Takes a container's part of the tree away, with all mounts; what is not there is no error.
    ///
    /// # Errors
    ///
    /// Fails where a mount or directory will not go.
    pub fn remove_container(&self, container: &str) -> Result<(), ShareError> {
        let dir = self.root.join(container);
        let make = |path: &Path, source| ShareError::Make { path: path.to_owned(), source };
        let mut mount_points = vec![root_in(&self.root, container)];
        match std::fs::read_dir(dir.join("volumes")) {
            Ok(volumes) => mount_points.extend(volumes.flatten().map(|volume| volume.path())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(make(&dir, error)),
        }
        for mount_point in mount_points {
            // More than one where file systems lie one over the other.
            while rustix::mount::unmount(&mount_point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
            // Not recursive: if a mount were left, this fails instead of emptying somebody's directory.
            let removed = match std::fs::symlink_metadata(&mount_point) {
                Ok(metadata) if metadata.is_dir() => std::fs::remove_dir(&mount_point),
                Ok(_) => std::fs::remove_file(&mount_point),
                Err(error) => Err(error),
            };
            match removed {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(make(&mount_point, source)),
                _ => {}
            }
        }
        for dir in [dir, self.layers.join(container)] {
            match std::fs::remove_dir_all(&dir) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(make(&dir, source)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes the whole tree away, with all mounts and writable layers.
    ///
    /// # Errors
    ///
    /// Fails where a mount or directory will not go.
    pub fn remove(self) -> Result<(), ShareError> {
        rustix::mount::unmount(&self.root, UnmountFlags::DETACH)
            .map_err(|errno| mount_error("nothing", &self.root, errno))?;
        let make = |path: &Path, source| ShareError::Make { path: path.to_owned(), source };
        // Not recursive: if a mount were left below, this fails instead of emptying somebody's directory.
        std::fs::remove_dir(&self.root).map_err(|source| make(&self.root, source))?;
        match std::fs::remove_dir_all(&self.layers) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(make(&self.layers, source)),
            _ => Ok(()),
        }
    }

    /// Makes the directory for what a container writes, which nobody else on the host may enter: there can be devices and programs with
    /// set-user-ID bits in it.
    fn make_layers(&self, container: &str) -> Result<PathBuf, ShareError> {
        let dir = self.layers.join(container);
        if let Some(data_dir) = self.layers.ancestors().nth(2) {
            make_dir_all(data_dir)?;
        }
        let make = |source| ShareError::Make { path: dir.clone(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(make)?;
        Ok(dir)
    }

    fn mount_overlay(&self, container: &str, layers: &[PathBuf], target: &Path) -> Result<(), ShareError> {
        let dir = self.make_layers(container)?;
        let (upper, work) = (dir.join("upper"), dir.join("work"));
        make_dir_all(&upper)?;
        make_dir_all(&work)?;
        overlay(layers, Some((&upper, &work)), target)
            .map_err(|errno| mount_error("the container's layers", target, errno))
    }
}

/// Mounts an image's layers so that nothing can be written to them.
fn mount_read_only(layers: &[PathBuf], target: &Path) -> Result<(), ShareError> {
    match layers {
        [] => Ok(()),
        // Overlayfs wants two layers unless one can be written to.
        [layer] => bind(&Volume::unchanging(layer), target),
        layers => overlay(layers, None, target).map_err(|errno| mount_error("the image's layers", target, errno)),
    }
}

/// Mounts an overlay through the mount API of file descriptors, which takes any number of layers one by one; a page of
/// options, all that mount(2) takes, holds about 40. `writable` are the directories for what is written and for the kernel's own use;
/// without them nothing can be.
fn overlay(layers: &[PathBuf], writable: Option<(&Path, &Path)>, target: &Path) -> Result<(), Errno> {
    use rustix::mount::{fsconfig_create, fsconfig_set_string, fsmount, fsopen, move_mount};
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "overlay")?;
    // The option wants the top layer first. Kernels before 6.7 know no "lowerdir+".
    let mut one_by_one = layers.iter().rev().map(|layer| fsconfig_set_string(&context, "lowerdir+", layer));
    match one_by_one.next().transpose() {
        Ok(_) => one_by_one.collect::<Result<(), Errno>>()?,
        Err(Errno::INVAL) => fsconfig_set_string(&context, "lowerdir", joined(layers)?)?,
        Err(errno) => return Err(errno),
    }
    let attributes = match writable {
        Some((upper, work)) => {
            fsconfig_set_string(&context, "upperdir", upper)?;
            fsconfig_set_string(&context, "workdir", work)?;
            // Layers are changed by nobody but this container, so names of directories may be redirected freely, and a crash of the
            // host loses the container anyway.
            let _ = fsconfig_set_string(&context, "redirect_dir", "on");
            match rustix::mount::fsconfig_set_flag(&context, "volatile") {
                Ok(()) | Err(Errno::INVAL) => {}
                Err(errno) => return Err(errno),
            }
            MountAttrFlags::MOUNT_ATTR_NODEV
        }
        None => MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV,
    };
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(&mount, "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// All layers in one option, top first, colons in their names escaped.
fn joined(layers: &[PathBuf]) -> Result<CString, Errno> {
    let mut option = Vec::new();
    for layer in layers.iter().rev() {
        if !option.is_empty() {
            option.push(b':');
        }
        for &byte in layer.as_os_str().as_bytes() {
            if matches!(byte, b':' | b'\\' | b',') {
                option.push(b'\\');
            }
            option.push(byte);
        }
    }
    CString::new(option).map_err(|_| Errno::INVAL)
}

/// Makes a volume visible at `target` with everything mounted below it. What it may not be used for is settled before it is there: the VMM,
/// in a mount namespace of its own, gets a copy of each mount as it is when it comes.
fn bind(volume: &Volume, target: &Path) -> Result<(), ShareError> {
    let Volume { source, read_only, private, owners } = volume;
    let failed = |source_error| ShareError::Source { path: source.clone(), source: source_error };
    let tree = rustix::mount::open_tree(
        rustix::fs::CWD,
        source,
        rustix::mount::OpenTreeFlags::OPEN_TREE_CLONE
            | rustix::mount::OpenTreeFlags::OPEN_TREE_CLOEXEC
            | rustix::mount::OpenTreeFlags::AT_RECURSIVE,
    )
    .map_err(|errno| failed(errno.into()))?;
    let is_guarded = without_devices(tree.as_fd()).map_err(failed)?;
    if *read_only {
        mounts::set_read_only(tree.as_fd()).map_err(failed)?;
    }
    if *private {
        match mounts::set_private(tree.as_fd()) {
            // As before Linux 5.12: where devices could be opened, none are made.
            Err(error) if !is_guarded && is_unknown(&error) => {}
            result => result.map_err(failed)?,
        }
    }
    if !owners.are_the_hosts() {
        let mapped = mounts::user_namespace(&swapped(owners.uid), &swapped(owners.gid))
            .and_then(|namespace| mounts::map_owners(tree.as_fd(), &namespace));
        mapped.map_err(|source_error| ShareError::Owners { path: source.clone(), source: source_error })?;
    }
    rustix::mount::move_mount(&tree, "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|errno| mount_error(&source.display().to_string(), target, errno))
}

/// Lets nobody open a device through a tree of mounts: what a guest makes there must be of no use to its VMM. Returns false where that cannot be;
/// then the owner makes no devices ([`crate::broker`]).
fn without_devices(tree: BorrowedFd<'_>) -> std::io::Result<bool> {
    match mounts::set_no_devices(tree) {
        Err(error) if is_unknown(&error) => Ok(false),
        result => result.map(|()| true),
    }
}

/// What a kernel says of a system call that it, or a filter of system calls, does not know of.
pub(crate) fn is_unknown(error: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOSYS | Errno::PERM))
}

fn mount_error(what: &str, path: &Path, errno: Errno) -> ShareError {
    ShareError::Mount { what: what.to_owned(), path: path.to_owned(), source: errno.into() }
}

fn make_dir(path: &Path) -> Result<(), ShareError> {
    std::fs::create_dir(path).map_err(|source| ShareError::Make { path: path.to_owned(), source })
}

fn make_dir_all(path: &Path) -> Result<(), ShareError> {
    std::fs::create_dir_all(path).map_err(|source| ShareError::Make { path: path.to_owned(), source })
}

fn make_file(path: &Path, contents: &[u8]) -> Result<(), ShareError> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let make = |source| ShareError::Make { path: path.to_owned(), source };
    let fd = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).map_err(|errno| make(errno.into()))?;
    std::io::Write::write_all(&mut std::fs::File::from(fd), contents).map_err(make)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_layers_top_first_and_escapes_what_separates_them() {
        let layers = [PathBuf::from("/a:b"), PathBuf::from("/c,d"), PathBuf::from("/e")];
        assert_eq!(joined(&layers).unwrap().as_bytes(), br"/e:/c\,d:/a\:b");
    }

    #[test]
    fn one_user_and_root_change_places_and_nobody_else() {
        assert_eq!(swapped(None), "0 0 4294967295\n");
        assert_eq!(swapped(Some(0)), swapped(None));
        assert_eq!(swapped(Some(1)), "0 1 1\n1 0 1\n2 2 4294967293\n");
        assert_eq!(swapped(Some(1000)), "0 1000 1\n1000 0 1\n1 1 999\n1001 1001 4294966294\n");
        assert_eq!(swapped(Some(u32::MAX - 1)), "0 4294967294 1\n4294967294 0 1\n1 1 4294967293\n");
        for id in [None, Some(1), Some(1000), Some(u32::MAX - 1)] {
            let counts =
                swapped(id).lines().map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum::<u64>();
            assert_eq!(counts, u64::from(u32::MAX), "{id:?}");
        }
    }

    #[test]
    fn what_containers_write_is_for_nobody_else() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("data");
        let layers = data_dir.join("containers/id");
        let share = Share { root: dir.path().join("shared"), layers, nodes_or_mounts: Arc::default() };
        let made = share.make_layers("c").unwrap();
        for dir in [&*made, made.parent().unwrap(), &data_dir.join("containers")] {
            assert_eq!(std::fs::metadata(dir).unwrap().permissions().mode() & 0o7777, 0o700, "{}", dir.display());
        }
        assert_ne!(std::fs::metadata(&data_dir).unwrap().permissions().mode() & 0o7777, 0o700);
        assert_eq!(share.make_layers("c").unwrap(), made);
    }

    #[test]
    fn a_file_is_never_written_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "old").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join("hosts")).unwrap();
        assert!(make_file(&dir.path().join("hosts"), b"new").is_err());
        assert_eq!(std::fs::read(&victim).unwrap(), b"old");
    }
}
