//! Makes a new, empty ext4 file system in a sparse file: the disk that a container writes to.
//!
//! The host formats and the guest mounts. The guest's image has no mkfs, and there is nothing hostile to read in a file that this
//! process has just made.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hull_sandbox_sys::children;

/// Smaller ones leave too little beside the file system's own needs.
pub const MIN_BYTES: u64 = 16 << 20;
/// As much as ext4 takes with blocks of 4 KiB and no option.
pub const MAX_BYTES: u64 = 16 << 40;
/// PATH of a service may lack the last two, where mkfs.ext4 is.
const PLACES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Tables are not zeroed in the background, which a sparse file reads as anyway, and what is deleted goes back to the host.
pub(crate) const MOUNT_OPTIONS: [&str; 2] = ["noinit_itable", "discard"];

/// A disk that was not made.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// Too small or too large.
    #[error("a disk of {0} bytes for what a container writes; ask for {MIN_BYTES} (16m) to {MAX_BYTES}")]
    Size(u64),
    /// The program is missing.
    #[error("there is no mkfs.ext4 on this host, which a disk for what a container writes takes; install e2fsprogs")]
    NoProgram,
    /// A step failed.
    #[error("cannot make the disk {path} for what a container writes: {source}")]
    Make {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Makes the file at `path`, which must not exist, of this size.
///
/// # Errors
///
/// Fails where the size is none, the file cannot be made or e2fsprogs is not installed; no file is left then.
pub(crate) fn make(path: &Path, bytes: u64) -> Result<(), Ext4Error> {
    check_size(bytes)?;
    let program = program().ok_or(Ext4Error::NoProgram)?;
    let failed = |source| Ext4Error::Make { path: path.to_owned(), source };
    let file = File::options().write(true).create_new(true).open(path).map_err(failed)?;
    let made = file.set_len(bytes).and_then(|()| format(&program, path));
    made.map_err(|source| {
        let _ = std::fs::remove_file(path);
        failed(source)
    })
}

/// Whether there can be a disk of this size.
///
/// # Errors
///
/// Says the bounds.
pub fn check_size(bytes: u64) -> Result<(), Ext4Error> {
    if (MIN_BYTES..=MAX_BYTES).contains(&bytes) { Ok(()) } else { Err(Ext4Error::Size(bytes)) }
}

fn format(program: &Path, path: &Path) -> io::Result<()> {
    let mut command = Command::new(program);
    command
        // No journal: the disk goes with its sandbox. No blocks that only root may fill: root is who fills them.
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"])
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .env_clear();
    let (child, _started) = children::start(|| command.spawn(), |child| Some(child.id()))?;
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing").to_owned();
    Err(io::Error::other(format!("mkfs.ext4 failed: {said}")))
}

fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(PLACES.iter().map(PathBuf::from));
    places.map(|place| place.join("mkfs.ext4")).find(|program| program.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_bounds() {
        assert!(check_size(MIN_BYTES).is_ok() && check_size(MAX_BYTES).is_ok());
        for bytes in [0, MIN_BYTES - 1, MAX_BYTES + 1] {
            assert!(check_size(bytes).unwrap_err().to_string().contains("16m"), "{bytes}");
        }
    }

    #[test]
    fn a_failure_names_the_programs_own_reason_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("mkfs.ext4");
        std::fs::write(&program, "#!/bin/sh\necho first >&2; echo 'no space at all' >&2; exit 1\n").unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&program, executable).unwrap();
        let error = format(&program, &dir.path().join("disk")).unwrap_err();
        assert_eq!(error.to_string(), "mkfs.ext4 failed: no space at all");
        // A file that is there is somebody's.
        let path = dir.path().join("taken");
        std::fs::write(&path, "kept").unwrap();
        assert!(make(&path, MIN_BYTES).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"kept");
    }
}
