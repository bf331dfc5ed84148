//! Owners, modes, times and extended attributes.

use std::os::fd::AsFd;

use rustix::fs::{Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;

use crate::image::tar::{Entry, Time};

/// Who owns what this process makes.
#[derive(Clone, Copy)]
pub(super) struct Maker {
    uid: u32,
    gid: u32,
}

impl Maker {
    pub(super) fn this_process() -> Self {
        Self { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }
}

/// What an entry says of its file beside the content.
#[derive(Debug)]
pub(super) struct Meta {
    uid: u32,
    gid: u32,
    pub(super) mode: u32,
    mtime: Time,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Meta {
    /// The entry's metadata; its extended attributes are taken out of it.
    pub(super) fn of(entry: &mut Entry) -> Self {
        let mut xattrs = std::mem::take(&mut entry.xattrs);
        xattrs.retain(|(name, _)| wanted(name));
        Self { uid: entry.uid, gid: entry.gid, mode: entry.mode, mtime: entry.mtime, xattrs }
    }

    /// What a layer's root has if the archive does not list it.
    pub(super) fn of_root() -> Self {
        Self { uid: 0, gid: 0, mode: 0o755, mtime: Time::default(), xattrs: Vec::new() }
    }

    /// The new owner, if `maker` is not it.
    pub(super) fn owner(&self, maker: Maker) -> Option<(Uid, Gid)> {
        let other = (self.uid, self.gid) != (maker.uid, maker.gid);
        other.then(|| (Uid::from_raw_unchecked(self.uid), Gid::from_raw_unchecked(self.gid)))
    }

    pub(super) fn mode(&self) -> Mode {
        Mode::from_raw_mode(self.mode)
    }

    pub(super) fn times(&self) -> Timestamps {
        Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: self.mtime.seconds, tv_nsec: self.mtime.nanoseconds.into() },
        }
    }

    /// Gives an open file or directory all of it. `has_mode` says that the mode is right already.
    pub(super) fn apply(&self, file: impl AsFd, maker: Maker, has_mode: bool) -> Result<(), (&'static str, Errno)> {
        let file = file.as_fd();
        // In this order: a change of owner clears the setuid bits and the file's capabilities.
        let owner = self.owner(maker);
        if let Some((uid, gid)) = owner {
            rustix::fs::fchown(file, Some(uid), Some(gid)).map_err(|error| ("set the owner of", error))?;
        }
        if !has_mode {
            rustix::fs::fchmod(file, self.mode()).map_err(|error| ("set the mode of", error))?;
        }
        for (name, value) in &self.xattrs {
            match rustix::fs::fsetxattr(file, name.as_slice(), value, XattrFlags::empty()) {
                // A file system without them; only capabilities change what a program may do.
                Err(Errno::OPNOTSUPP) if !name.starts_with(b"security.") => {}
                other => other.map_err(|error| ("set an extended attribute of", error))?,
            }
        }
        rustix::fs::futimens(file, &self.times()).map_err(|error| ("set the time of", error))
    }
}

/// Whether an image may set this attribute.
///
/// `trusted.overlay.*` steers overlayfs, security labels steer the host's policy: neither is the image's to set.
pub(in crate::image) fn wanted(name: &[u8]) -> bool {
    match name {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        _ => name.starts_with(b"user.") && !name.starts_with(b"user.overlay.") && !name.contains(&0),
    }
}

#[cfg(test)]
mod tests {
    use super::wanted;

    #[test]
    fn attributes_that_steer_the_host_are_left_out() {
        for name in ["user.note", "security.capability", "system.posix_acl_access"] {
            assert!(wanted(name.as_bytes()), "{name}");
        }
        for name in
            ["trusted.overlay.redirect", "trusted.x", "user.overlay.opaque", "security.selinux", "user.a\0b", ""]
        {
            assert!(!wanted(name.as_bytes()), "{name}");
        }
    }
}
