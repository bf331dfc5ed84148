//! The file systems of a guest.

use std::ffi::CStr;
use std::fs;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::error::{Result, Step};

struct Mount {
    fstype: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static CStr,
}

const STRICT: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// What the agent itself needs to read its command line and to listen.
const EARLY: [Mount; 3] = [
    Mount { fstype: "proc", target: "/proc", flags: STRICT, data: c"" },
    Mount { fstype: "sysfs", target: "/sys", flags: STRICT, data: c"" },
    Mount { fstype: "devtmpfs", target: "/dev", flags: MountFlags::NOSUID, data: c"mode=0755" },
];

/// What containers need, in order.
const LATE: [Mount; 7] = [
    // The group that owns terminals is 5 on every distribution.
    Mount {
        fstype: "devpts",
        target: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        data: c"gid=5,mode=0620,ptmxmode=0666",
    },
    // Of pods, as large as containerd makes it; containers of their own have one each.
    Mount {
        fstype: "tmpfs",
        target: "/dev/shm",
        flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        data: c"mode=1777,size=64m",
    },
    Mount { fstype: "mqueue", target: "/dev/mqueue", flags: STRICT, data: c"" },
    Mount { fstype: "tmpfs", target: "/run", flags: MountFlags::NOSUID.union(MountFlags::NODEV), data: c"mode=0755" },
    Mount { fstype: "tmpfs", target: "/tmp", flags: MountFlags::NOSUID.union(MountFlags::NODEV), data: c"mode=1777" },
    // Children are protected as far as their parent is; limits of a delegated cgroup are not its processes' to change;
    // moving a process, which every container and exec does, does not wait for a grace period of RCU (8 ms of 24).
    Mount {
        fstype: "cgroup2",
        target: "/sys/fs/cgroup",
        flags: STRICT,
        data: c"nsdelegate,memory_recursiveprot,favordynmods",
    },
    Mount { fstype: "bpf", target: "/sys/fs/bpf", flags: STRICT, data: c"mode=0700" },
];

/// What few containers need, and costs a module's work to mount.
const ON_DEMAND: [Mount; 1] =
    [Mount { fstype: "binfmt_misc", target: "/proc/sys/fs/binfmt_misc", flags: STRICT, data: c"" }];

pub(super) fn mount_early() -> Result<()> {
    EARLY.iter().try_for_each(Mount::apply)
}

pub(super) fn mount_late() {
    apply_all(&LATE);
}

/// Mounts what was left out at the start.
pub(crate) fn mount_on_demand() {
    apply_all(&ON_DEMAND);
}

fn apply_all(mounts: &[Mount]) {
    for mount in mounts {
        if let Err(error) = mount.apply() {
            tracing::error!("{error}");
        }
    }
}

impl Mount {
    fn apply(&self) -> Result<()> {
        let result = mount(self.fstype, self.target, self.fstype, self.flags, self.data);
        let result = match result {
            Err(Errno::NOENT) => {
                fs::create_dir_all(self.target).step_with(|| format!("make {}", self.target))?;
                mount(self.fstype, self.target, self.fstype, self.flags, self.data)
            }
            result => result,
        };
        match result {
            // Mounted by the kernel already.
            Err(Errno::BUSY) => Ok(()),
            // A kernel without it.
            Err(Errno::NODEV) => {
                tracing::info!("the kernel has no {}", self.fstype);
                Ok(())
            }
            result => result.step_with(|| format!("mount {}", self.target)),
        }
    }
}
