//! File systems that the host asks for: shares, disks, and those that need no source.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use tokio::task::spawn_blocking;

use crate::container::spec::check_path;
use crate::devices::{PciAddress, wait_for_block_device};
use crate::error::{Error, Result, Step};
use crate::files::{self, File};
use crate::overlay::Overlay;

/// The kernel takes a page of options and the zero byte behind it.
const MAX_DATA_BYTES: usize = 4095;

/// What holds a file system.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// A virtio-fs share by its tag.
    FsTag(String),
    /// A virtio-blk disk.
    Disk(PciAddress),
    /// A file of another file system.
    File(String),
    /// Nothing: a tmpfs or the like.
    None,
    /// File systems that have been mounted before.
    Overlay(Overlay),
}

#[derive(Clone, Debug)]
pub(crate) struct Storage {
    pub(crate) source: Source,
    pub(crate) fstype: String,
    pub(crate) options: Vec<String>,
    pub(crate) mount_point: PathBuf,
    /// What it holds from the start.
    pub(crate) files: Vec<File>,
    /// How far a share is read ahead, in KiB; 0: as far as the kernel does.
    pub(crate) read_ahead_kib: u32,
}

/// A file system that the agent has mounted.
#[derive(Debug)]
pub(crate) struct Mounted(PathBuf);

impl Storage {
    /// Mounts the file system, on a mount point that is made if it is missing.
    pub(crate) async fn mount(self) -> Result<Mounted> {
        let field = || format!("storages[{}]", self.mount_point.display());
        check_path("storages.mount_point", &self.mount_point)?;
        let options = parse_options(&self.options).map_err(|reason| Error::invalid(field(), reason))?;
        let (source, default_fstype) = match &self.source {
            Source::FsTag(tag) => (tag.clone(), "virtiofs"),
            Source::Disk(address) => (wait_for_block_device(address).await?, ""),
            Source::File(path) => (path.clone(), ""),
            Source::None => (self.fstype.clone(), ""),
            Source::Overlay(_) => ("overlay".to_owned(), "overlay"),
        };
        let fstype = if self.fstype.is_empty() { default_fstype.to_owned() } else { self.fstype.clone() };
        if fstype.is_empty() {
            return Err(Error::invalid(field(), "has no file system type"));
        }
        // Not on the agent's only thread: a journal may have to be replayed, a host may be slow.
        spawn_blocking(move || {
            let target = &self.mount_point;
            fs::create_dir_all(target).step("make the mount point")?;
            if let Source::Overlay(overlay) = &self.source {
                overlay.mount(target, &options.data, options.attributes())?;
            } else {
                let data = std::ffi::CString::new(options.data).step("read the mount's options")?;
                mount(&source, target, &fstype, options.flags, data.as_c_str()).map_err(|errno| {
                    let advice =
                        if matches!(self.source, Source::Disk(_) | Source::File(_)) { disk_advice(errno) } else { "" };
                    let step = format!("mount {source} of type {fstype} on {}", target.display());
                    Error::failed(step, format!("{}{advice}", std::io::Error::from(errno)))
                })?;
            }
            if let Some(propagation) = options.propagation {
                mount_change(target, propagation).step("set the mount's propagation")?;
            }
            let mounted = Mounted(self.mount_point);
            let mut prepared = Ok(());
            if !self.files.is_empty() {
                prepared = files::update(&mounted.0, &self.files);
            }
            if self.read_ahead_kib > 0 {
                prepared = prepared.and_then(|()| set_read_ahead(&mounted.0, self.read_ahead_kib));
            }
            if prepared.is_err() {
                let _ = unmount_now(&mounted.0);
            }
            prepared.map(|()| mounted)
        })
        .await
        .step("mount")?
    }
}

impl Mounted {
    /// What has been mounted there by other means.
    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Unmounts, at once if it is not in use. Otherwise everything is written back and the mount point is free at once, and the
    /// rest follows with the last use.
    pub(crate) async fn unmount(self) -> std::result::Result<(), (Self, Error)> {
        let target = self.0.clone();
        let result = spawn_blocking(move || unmount_now(&target)).await.step("unmount").flatten();
        result.map_err(|error| (self, error))
    }
}

/// Sets how far the file system that is mounted at `target` is read ahead, in KiB (`Documentation/ABI/testing/sysfs-class-bdi`).
fn set_read_ahead(target: &Path, kib: u32) -> Result<()> {
    let device = fs::metadata(target).step("look at the mount point")?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), kib.to_string())
        .step("set how far a share is read ahead")
}

/// What to do about a disk that cannot be mounted.
fn disk_advice(errno: Errno) -> &'static str {
    match errno {
        Errno::INVAL | Errno::UCLEAN | Errno::IO | Errno::BADMSG => {
            "; its file system is broken or of another type: check it with fsck where it comes from, or make it anew"
        }
        Errno::ROFS => "; its journal is to be replayed first: mount it once where it may be written to",
        Errno::NODEV => "; the guest's kernel has no such file system: use ext4, xfs, erofs or squashfs",
        _ => "",
    }
}

fn unmount_now(target: &Path) -> Result<()> {
    match unmount(target, UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => {
            // A disk may be taken off the bus before the last use ends.
            if let Ok(directory) = fs::File::open(target) {
                let _ = rustix::fs::syncfs(directory);
            }
            unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
        }
        // Not mounted any more.
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        result => result,
    }
    .step_with(|| format!("unmount {}", target.display()))
}

/// What mount(8) calls options, as mount(2) takes them.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MountFlags,
    propagation: Option<MountPropagationFlags>,
    data: String,
}

impl Options {
    /// The flags as fsmount(2) takes them.
    fn attributes(&self) -> MountAttrFlags {
        let pairs = [
            (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
            (MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
            (MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
            (MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
            (MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
            (MountFlags::NODIRATIME, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
        ];
        pairs.iter().filter(|(flag, _)| self.flags.contains(*flag)).map(|(_, attribute)| *attribute).collect()
    }
}

fn parse_options(options: &[String]) -> std::result::Result<Options, String> {
    let mut parsed = Options { flags: MountFlags::empty(), propagation: None, data: String::new() };
    for option in options.iter().flat_map(|list| split(list)) {
        let propagation = match option {
            "shared" => Some(MountPropagationFlags::SHARED),
            "rshared" => Some(MountPropagationFlags::SHARED | MountPropagationFlags::REC),
            "slave" => Some(MountPropagationFlags::DOWNSTREAM),
            "rslave" => Some(MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC),
            "private" => Some(MountPropagationFlags::PRIVATE),
            "rprivate" => Some(MountPropagationFlags::PRIVATE | MountPropagationFlags::REC),
            _ => None,
        };
        if propagation.is_some() {
            parsed.propagation = propagation;
            continue;
        }
        match flag(option) {
            Some((flag, true)) => parsed.flags |= flag,
            Some((flag, false)) => parsed.flags -= flag,
            None if matches!(option, "bind" | "rbind" | "remount" | "move") => {
                return Err(format!("{option} is not for the file systems of a request"));
            }
            None => {
                if !parsed.data.is_empty() {
                    parsed.data.push(',');
                }
                parsed.data.push_str(option);
            }
        }
    }
    if parsed.data.len() > MAX_DATA_BYTES {
        return Err(format!("the options are longer than {MAX_DATA_BYTES} bytes"));
    }
    if parsed.data.contains('\0') {
        return Err("the options have a zero byte".into());
    }
    Ok(parsed)
}

/// Splits a list at its commas, except those that a backslash takes literally (in the paths of an overlay).
fn split(list: &str) -> impl Iterator<Item = &str> {
    let mut escaped = false;
    list.split(move |letter: char| {
        let comma = letter == ',' && !escaped;
        escaped = letter == '\\' && !escaped;
        comma
    })
    .filter(|option| !option.is_empty())
}

/// A flag, and whether the option sets it or clears it.
fn flag(option: &str) -> Option<(MountFlags, bool)> {
    Some(match option {
        "defaults" => (MountFlags::empty(), true),
        "ro" => (MountFlags::RDONLY, true),
        "rw" => (MountFlags::RDONLY, false),
        "nosuid" => (MountFlags::NOSUID, true),
        "suid" => (MountFlags::NOSUID, false),
        "nodev" => (MountFlags::NODEV, true),
        "dev" => (MountFlags::NODEV, false),
        "noexec" => (MountFlags::NOEXEC, true),
        "exec" => (MountFlags::NOEXEC, false),
        "sync" => (MountFlags::SYNCHRONOUS, true),
        "async" => (MountFlags::SYNCHRONOUS, false),
        "dirsync" => (MountFlags::DIRSYNC, true),
        "noatime" => (MountFlags::NOATIME, true),
        "atime" => (MountFlags::NOATIME, false),
        "nodiratime" => (MountFlags::NODIRATIME, true),
        "diratime" => (MountFlags::NODIRATIME, false),
        "relatime" => (MountFlags::RELATIME, true),
        "norelatime" => (MountFlags::RELATIME, false),
        "strictatime" => (MountFlags::STRICTATIME, true),
        "nostrictatime" => (MountFlags::STRICTATIME, false),
        "lazytime" => (MountFlags::LAZYTIME, true),
        "nolazytime" => (MountFlags::LAZYTIME, false),
        "silent" => (MountFlags::SILENT, true),
        "loud" => (MountFlags::SILENT, false),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(options: &[&str]) -> Options {
        parse_options(&options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn flags_are_told_from_data_and_later_ones_win() {
        let options = parsed(&["ro", "nodev,size=10m", "rw", "mode=755"]);
        assert_eq!(options.flags, MountFlags::NODEV);
        assert_eq!(options.data, "size=10m,mode=755");
        assert_eq!(
            parsed(&["rslave"]).propagation,
            Some(MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        );
    }

    #[test]
    fn a_disk_that_cannot_be_mounted_has_a_remedy() {
        for errno in [Errno::INVAL, Errno::UCLEAN, Errno::ROFS, Errno::NODEV] {
            assert!(disk_advice(errno).starts_with("; "), "{errno}");
        }
    }

    #[test]
    fn escaped_commas_stay_in_their_option() {
        assert_eq!(parsed(&[r"lowerdir=/a\,b:/c,ro"]).data, r"lowerdir=/a\,b:/c");
        assert_eq!(split(r"a\\,b,,c").collect::<Vec<_>>(), [r"a\\", "b", "c"]);
    }

    #[test]
    fn what_is_no_mount_of_a_file_system_is_refused() {
        assert!(parse_options(&["bind".into()]).is_err());
        assert!(parse_options(&["x".repeat(MAX_DATA_BYTES + 1)]).is_err());
    }

    proptest! {
        #[test]
        fn options_that_are_no_flags_reach_the_file_system_in_order(
            options in proptest::collection::vec("x[a-z0-9=:/]{0,20}", 0..10)
        ) {
            let parsed = parse_options(&options).unwrap();
            prop_assert_eq!(parsed.data, options.join(","));
            prop_assert_eq!(parsed.flags, MountFlags::empty());
        }

        #[test]
        fn no_option_makes_the_parser_panic(options in proptest::collection::vec("\\PC*", 0..4)) {
            let _ = parse_options(&options);
        }
    }
}
