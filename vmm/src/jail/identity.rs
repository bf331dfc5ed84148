//! Who the process is on the host: nobody.
//!
//! A user namespace whose map names all users of the host can only be had from somebody with `CAP_SETUID` outside it. So a
//! child is left outside for a moment, which writes the two maps and ends.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};

use super::{JailError, step, sys};

/// Who owns nothing on the host: the user and group that Linux shows for numbers it cannot map.
const NOBODY: u32 = 65534;
/// Every user and group but the last number, which stands for none.
const ALL: &[u8] = b"0 0 4294967295";

/// What a file server needs to act for others on files whose owners its user namespace knows
/// (capabilities(7), `capable_wrt_inode_uidgid` in the kernel).
const KEPT: [u32; 7] = [
    libc_capability::CHOWN,
    libc_capability::DAC_OVERRIDE,
    libc_capability::FOWNER,
    libc_capability::FSETID,
    libc_capability::SETGID,
    libc_capability::SETUID,
    libc_capability::SETFCAP,
];

/// linux/capability.h
mod libc_capability {
    pub(super) const CHOWN: u32 = 0;
    pub(super) const DAC_OVERRIDE: u32 = 1;
    pub(super) const FOWNER: u32 = 3;
    pub(super) const FSETID: u32 = 4;
    pub(super) const SETGID: u32 = 6;
    pub(super) const SETUID: u32 = 7;
    pub(super) const SETFCAP: u32 = 31;
}

/// The child that stays outside to write the maps.
pub(super) struct IdentityWriter {
    child: sys::Child,
    go: io::PipeWriter,
}

impl IdentityWriter {
    /// Starts the child, before the user namespace is made. `proc` shows the calling process as `self`.
    pub(super) fn start(proc: &OwnedFd) -> Result<Self, JailError> {
        let failed = step("prepare the user namespace");
        // The child's own `self` would be another.
        let own = sys::open_at(proc, c"self", libc::O_PATH | libc::O_DIRECTORY).map_err(&failed)?;
        let (mut wait, go) = io::pipe().map_err(&failed)?;
        let go_in_child = go.as_raw_fd();
        let child = sys::fork(move || {
            sys::close(go_in_child);
            // The end without the word means that the process has died.
            wait.read_exact(&mut [0])?;
            for map in [c"gid_map", c"uid_map"] {
                let file = sys::open_at(&own, map, libc::O_WRONLY)?;
                std::fs::File::from(file).write_all(ALL)?;
            }
            Ok(())
        })
        .map_err(&failed)?;
        Ok(Self { child, go })
    }

    /// Has the maps written, now that the process is in its user namespace.
    pub(super) fn write(mut self) -> Result<(), JailError> {
        let failed = step("map users into the user namespace");
        self.go.write_all(&[1]).map_err(&failed)?;
        self.child.wait().map_err(&failed)
    }
}

/// Takes on an identity that owns nothing, and the capabilities that a file server needs; to be called in the new user
/// namespace.
pub(super) fn become_nobody() -> Result<(), JailError> {
    // Before the change of user: it must leave capabilities alone.
    sys::keep_capabilities_over_user_changes().map_err(step("set the secure bits"))?;
    sys::set_identity(NOBODY, NOBODY).map_err(step("change the user"))?;
    sys::keep_capabilities(&KEPT).map_err(step("drop capabilities"))
}
