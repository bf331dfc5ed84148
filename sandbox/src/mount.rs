//! File systems given as mount(8) gives them, mounted on the host for a guest to see through its share.

use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

/// A file system, or a part of the host's tree, to be mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// `bind`, `overlay`, `ext4` and so on.
    pub fstype: String,
    /// A device, a directory, or what the type takes in their place.
    pub source: String,
    /// Options as mount(8) spells them, one each or joined by commas.
    pub options: Vec<String>,
}

impl FileSystem {
    /// Whether it is a part of the host's tree rather than a file system of its own.
    pub(crate) fn is_bind(&self) -> bool {
        self.fstype == "bind" || self.options.iter().any(|option| option == "bind" || option == "rbind")
    }

    /// Whether nothing may be written through it.
    pub(crate) fn is_read_only(&self) -> bool {
        self.options.iter().any(|option| option == "ro")
    }

    /// Mounts a file system of its own at `target`, whose device nodes nobody can open there.
    pub(crate) fn mount(&self, target: &Path) -> Result<(), Errno> {
        let mut parsed = Options::parse(&self.options);
        parsed.flags |= MountFlags::NODEV;
        match self.mount_piecewise(&parsed, target) {
            // Kernels before 6.7 take an overlay's lower directories only as one text, which the new interface caps at 255 bytes.
            Err(Errno::INVAL) if self.fstype == "overlay" => self.mount_at_once(&parsed, target),
            outcome => outcome,
        }
    }

    /// Through the interface of file descriptors, which has no page of options to fill: an overlay has any number of
    /// lower directories.
    fn mount_piecewise(&self, options: &Options<'_>, target: &Path) -> Result<(), Errno> {
        let context = fsopen(self.fstype.as_str(), FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", &*self.source)?;
        for &option in &options.data {
            match option.split_once('=') {
                Some(("lowerdir", directories)) if self.fstype == "overlay" => {
                    for directory in lower_directories(directories) {
                        fsconfig_set_string(&context, "lowerdir+", directory.as_str())?;
                    }
                }
                Some((key, value)) => fsconfig_set_string(&context, key, value)?,
                None => fsconfig_set_flag(&context, option)?,
            }
        }
        if options.flags.contains(MountFlags::RDONLY) {
            fsconfig_set_flag(&context, "ro")?;
        }
        fsconfig_create(&context)?;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, options.attributes())?;
        move_mount(&mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    }

    fn mount_at_once(&self, options: &Options<'_>, target: &Path) -> Result<(), Errno> {
        let data = std::ffi::CString::new(options.data.join(",")).map_err(|_| Errno::INVAL)?;
        rustix::mount::mount(&*self.source, target, self.fstype.as_str(), options.flags, data.as_c_str())
    }
}

/// Splits an overlay's list at its colons, of which a backslash takes one literally.
fn lower_directories(list: &str) -> Vec<String> {
    let mut directories = vec![String::new()];
    let mut letters = list.chars();
    while let Some(letter) = letters.next() {
        let last = directories.len() - 1;
        match letter {
            '\\' => directories[last].extend(letters.next()),
            ':' => directories.push(String::new()),
            letter => directories[last].push(letter),
        }
    }
    directories.retain(|directory| !directory.is_empty());
    directories
}

/// Options told apart into what the kernel's VFS takes and what is the file system's own.
#[derive(Debug, PartialEq, Eq)]
struct Options<'a> {
    flags: MountFlags,
    data: Vec<&'a str>,
}

impl<'a> Options<'a> {
    fn parse(options: &'a [String]) -> Self {
        let mut parsed = Self { flags: MountFlags::empty(), data: Vec::new() };
        for option in options.iter().map(String::as_str) {
            match option {
                "ro" => parsed.flags |= MountFlags::RDONLY,
                "nosuid" => parsed.flags |= MountFlags::NOSUID,
                "nodev" => parsed.flags |= MountFlags::NODEV,
                "noexec" => parsed.flags |= MountFlags::NOEXEC,
                "noatime" => parsed.flags |= MountFlags::NOATIME,
                "nodiratime" => parsed.flags |= MountFlags::NODIRATIME,
                // Defaults, and instructions to the mount program rather than to the kernel.
                "" | "rw" | "suid" | "dev" | "exec" | "atime" | "relatime" | "defaults" => {}
                _ if option.starts_with("X-") || option.starts_with("x-") => {}
                _ => parsed.data.push(option),
            }
        }
        parsed
    }

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lower_directories_keep_their_order_and_their_escaped_colons() {
        assert_eq!(lower_directories(r"/top:/a\:b::/bottom\\"), ["/top", "/a:b", r"/bottom\"]);
        assert!(lower_directories("").is_empty());
    }

    #[test]
    fn flags_are_told_from_what_is_the_file_systems_own() {
        let options = ["ro", "index=off", "nodev", "userxattr", "x-mount.mkdir"].map(String::from);
        let parsed = Options::parse(&options);
        assert_eq!(parsed.flags, MountFlags::RDONLY | MountFlags::NODEV);
        assert_eq!(parsed.data, ["index=off", "userxattr"]);
        assert_eq!(parsed.attributes(), MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV);
    }

    proptest! {
        #[test]
        fn no_list_of_directories_makes_the_parser_panic(list in "\\PC*") {
            let _ = lower_directories(&list);
        }
    }
}
