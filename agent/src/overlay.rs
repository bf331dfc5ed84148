//! Overlays of file systems that the guest has mounted, for roots of containers.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen, move_mount,
};

use crate::error::{Error, Result, Step};

/// What an overlay is made of.
#[derive(Clone, Debug)]
pub(crate) struct Overlay {
    /// Directories that nobody changes, bottom first.
    pub(crate) lower: Vec<PathBuf>,
    /// Has the directories for what is written and for the kernel's own use.
    pub(crate) writable: Option<PathBuf>,
}

impl Overlay {
    /// Mounts the overlay at `target`, with options of its own.
    pub(crate) fn mount(&self, target: &Path, options: &str, attributes: MountAttrFlags) -> Result<()> {
        let writable = match (&self.writable, self.lower.last()) {
            (Some(writable), Some(top)) => Some(make_writable(writable, top).step("make the writable layer")?),
            _ => None,
        };
        let mounted = self.mount_at(target, options, attributes, writable.as_ref());
        mounted.map_err(|errno| {
            let step = format!("mount {} layers on {}", self.lower.len(), target.display());
            Error::failed(step, io::Error::from(errno).to_string())
        })
    }

    /// Through the interface of file descriptors, which takes any number of layers, where mount(2) has a page for all their names.
    fn mount_at(
        &self,
        target: &Path,
        options: &str,
        attributes: MountAttrFlags,
        writable: Option<&(PathBuf, PathBuf)>,
    ) -> rustix::io::Result<()> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", "overlay")?;
        // The kernel wants the top first.
        for lower in self.lower.iter().rev() {
            fsconfig_set_string(&context, "lowerdir+", lower)?;
        }
        if let Some((upper, work)) = writable {
            fsconfig_set_string(&context, "upperdir", upper)?;
            fsconfig_set_string(&context, "workdir", work)?;
        }
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some((key, value)) => fsconfig_set_string(&context, key, value)?,
                None => fsconfig_set_flag(&context, option)?,
            }
        }
        fsconfig_create(&context)?;
        let read_only = if writable.is_none() { MountAttrFlags::MOUNT_ATTR_RDONLY } else { MountAttrFlags::empty() };
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes | read_only)?;
        move_mount(&mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    }
}

/// The directories for what is written and for the kernel's own use. A new one of the first kind looks like `top`, the root that it
/// covers.
fn make_writable(directory: &Path, top: &Path) -> io::Result<(PathBuf, PathBuf)> {
    let (upper, work) = (directory.join("upper"), directory.join("work"));
    if make_directory(&upper)? {
        let like = fs::metadata(top)?;
        chown(&upper, Some(like.uid()), Some(like.gid()))?;
        fs::set_permissions(&upper, fs::Permissions::from_mode(like.mode() & 0o7777))?;
    }
    make_directory(&work)?;
    Ok((upper, work))
}

/// Makes a directory unless there is one. Anything else in its place, a link above all, is an error.
fn make_directory(path: &Path) -> io::Result<bool> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match fs::symlink_metadata(path)?.is_dir() {
            true => Ok(false),
            false => Err(Errno::NOTDIR.into()),
        },
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_writable_layer_looks_like_the_root_that_it_covers_and_an_old_one_is_kept() {
        let (writable, top) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::set_permissions(top.path(), fs::Permissions::from_mode(0o1751)).unwrap();
        let (upper, work) = make_writable(writable.path(), top.path()).unwrap();
        assert_eq!(fs::metadata(&upper).unwrap().mode() & 0o7777, 0o1751);
        fs::write(upper.join("file"), "kept").unwrap();
        fs::set_permissions(top.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(make_writable(writable.path(), top.path()).unwrap(), (upper.clone(), work));
        assert_eq!(fs::read(upper.join("file")).unwrap(), b"kept");
        assert_eq!(fs::metadata(&upper).unwrap().mode() & 0o7777, 0o1751);
    }

    #[test]
    fn a_link_is_never_taken_for_the_writable_layer() {
        let (writable, top) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(top.path(), writable.path().join("upper")).unwrap();
        assert!(make_writable(writable.path(), top.path()).is_err());
    }
}
