//! Who the share's thread is to the host's file systems.
//!
//! A file that the guest's user makes belongs to that user, so the thread takes on the user's file system identity for
//! as long as it makes one. It keeps its capabilities over that: the guest has already judged permissions, with
//! supplementary groups that the host does not know of. `CAP_FSETID` alone comes and goes: without it, a write clears the
//! set-user-ID bits, which is what the guest asks for when the writer lacks it (`FUSE_HANDLE_KILLPRIV_V2`).
//!
//! A process that may not change its identity makes all files as itself; what the guest then may do is what that user may.
//!
//! All is per thread, and changed only when it differs from what is wanted: a run of requests by one user costs no
//! system call.

use std::io;

use super::host::Host;

const CAP_FSETID: u32 = 4;
const CAP_SETGID: u32 = 6;
const CAP_SETUID: u32 = 7;
const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct CapabilitySet {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The calling thread's identity.
pub(super) struct Credentials {
    host: Host,
    home: (u32, u32),
    now: (u32, u32),
    umask: u32,
    /// Whether the thread may take on another identity at all.
    may_change: bool,
    /// Whether a change of identity leaves capabilities alone; else the thread must go back home after each request.
    keeps_capabilities: bool,
    capabilities: [CapabilitySet; 2],
    has_fsetid: bool,
}

impl Credentials {
    /// Those of the calling thread, which has entered the share ([`Host::enter_thread`]).
    pub(super) fn of_this_thread(host: Host) -> Self {
        let mut header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
        let mut capabilities = [CapabilitySet::default(); 2];
        // SAFETY: the kernel writes two sets for this version; the other calls take no pointers.
        let (home, keeps_capabilities) = unsafe {
            if libc::syscall(libc::SYS_capget, &raw mut header, capabilities.as_mut_ptr()) != 0 {
                capabilities = Default::default();
            }
            // A negative answer has all bits.
            let bits = libc::prctl(libc::PR_GET_SECUREBITS).max(0) as libc::c_ulong;
            let kept = bits & SECBIT_NO_SETUID_FIXUP != 0
                || libc::prctl(libc::PR_SET_SECUREBITS, bits | SECBIT_NO_SETUID_FIXUP) == 0;
            ((libc::geteuid(), libc::getegid()), kept)
        };
        let has = |capability: u32| capabilities[0].effective & 1 << capability != 0;
        let (may_change, has_fsetid) = (has(CAP_SETUID) && has(CAP_SETGID), has(CAP_FSETID));
        Self { host, home, now: home, umask: 0, may_change, keeps_capabilities, capabilities, has_fsetid }
    }

    /// Makes what is created from now on belong to this user and group, with `umask` where no default ACL replaces it.
    pub(super) fn create_as(&mut self, uid: u32, gid: u32, umask: u32) -> io::Result<()> {
        if self.umask != umask {
            self.host.set_umask(umask);
            self.umask = umask;
        }
        if self.may_change && self.now != (uid, gid) {
            self.switch(uid, gid)?;
        }
        Ok(())
    }

    /// Takes on a user's identity, as far as that leaves capabilities alone.
    pub(super) fn act_as(&mut self, uid: u32, gid: u32) -> io::Result<()> {
        if self.may_change && self.keeps_capabilities && self.now != (uid, gid) {
            self.switch(uid, gid)?;
        }
        Ok(())
    }

    /// To be called when a request is done.
    pub(super) fn done(&mut self) {
        if !self.keeps_capabilities && self.now != self.home {
            // The user comes first: only root may take back the group.
            let _ = self.switch_user(self.home.0);
            let _ = self.switch(self.home.0, self.home.1);
        }
    }

    /// Whether writes and changes of mode leave set-user-ID and set-group-ID bits alone.
    pub(super) fn keep_set_id(&mut self, keep: bool) {
        let bit = 1 << CAP_FSETID;
        if keep == self.has_fsetid || self.capabilities[0].permitted & bit == 0 {
            return;
        }
        let mut wanted = self.capabilities;
        if keep {
            wanted[0].effective |= bit;
        } else {
            wanted[0].effective &= !bit;
        }
        let header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
        // SAFETY: the kernel reads two sets for this version; changes this thread alone.
        if unsafe { libc::syscall(libc::SYS_capset, &raw const header, wanted.as_ptr()) } == 0 {
            self.capabilities = wanted;
            self.has_fsetid = keep;
        }
    }

    fn switch(&mut self, uid: u32, gid: u32) -> io::Result<()> {
        // The group comes first: a thread that is no longer root might not get it.
        // SAFETY: no pointers. The calls tell the value before; one for no valid group reads it.
        let group = unsafe {
            libc::syscall(libc::SYS_setfsgid, gid);
            libc::syscall(libc::SYS_setfsgid, u32::MAX) as u32
        };
        self.now.1 = group;
        self.switch_user(uid)?;
        if self.now == (uid, gid) { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EPERM)) }
    }

    fn switch_user(&mut self, uid: u32) -> io::Result<()> {
        // SAFETY: as above.
        let user = unsafe {
            libc::syscall(libc::SYS_setfsuid, uid);
            libc::syscall(libc::SYS_setfsuid, u32::MAX) as u32
        };
        self.now.0 = user;
        if user == uid { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EPERM)) }
    }
}
