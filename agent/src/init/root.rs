//! Makes the root file system one that containers can leave.
//!
//! pivot_root(2) refuses to leave the kernel's first file system, which an initramfs is: it has no parent on which
//! the new root could be mounted. So a bind mount of that root is moved over it, and everything from PID 1 on lives
//! in that mount, which has a parent.

use std::fs;

use rustix::fs::statfs;
use rustix::mount::{mount_bind, mount_move};
use rustix::process::{chdir, chroot};

use crate::error::{Result, Step};

/// File systems that an initramfs can be of (`<linux/magic.h>`).
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const TMPFS_MAGIC: u64 = 0x0102_1994;

const MOUNT_POINT: &str = "/.root";

/// Does nothing where the root is a disk, which the kernel mounts over its first file system by itself.
pub(super) fn make_movable() -> Result<()> {
    let magic = statfs("/").step("look at the root")?.f_type as u64;
    if magic != RAMFS_MAGIC && magic != TMPFS_MAGIC {
        return Ok(());
    }
    fs::create_dir_all(MOUNT_POINT).step("make a directory in the root")?;
    mount_bind("/", MOUNT_POINT).step("bind the root")?;
    chdir(MOUNT_POINT).step("enter the bound root")?;
    mount_move(".", "/").step("move the bound root")?;
    chroot(".").step("change to the bound root")?;
    chdir("/").step("enter the new root")?;
    fs::remove_dir(MOUNT_POINT).step("remove the directory in the root")
}
