//! Finding a file in stacked layers as overlayfs would show it, without mounting them.
//!
//! Every step opens or reads one name in an open directory and follows nothing, so links cannot lead out;
//! what they lead to is looked up from the top of the stack again, as the container will see it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

/// As for the kernel.
const LINKS_MAX: usize = 40;

/// One directory as the container sees it: its parts in those layers that have it, the topmost first.
type Merged = Rc<Vec<OwnedFd>>;

enum Found {
    Directory(Vec<OwnedFd>),
    Link(Vec<u8>),
    File(OwnedFd),
}

/// Reads the regular file at the absolute `path`; none if there is none, or it is larger than `cap`.
pub(super) fn read(layers: &[PathBuf], path: &str, cap: u64) -> io::Result<Option<Vec<u8>>> {
    let Some(file) = find(layers, path)? else { return Ok(None) };
    let file = File::from(file);
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > cap {
        return Ok(None);
    }
    let mut content = Vec::new();
    file.take(cap).read_to_end(&mut content)?;
    Ok(Some(content))
}

fn find(layers: &[PathBuf], path: &str) -> io::Result<Option<OwnedFd>> {
    let root: Merged = Rc::new(layers.iter().rev().map(|layer| open_root(layer)).collect::<io::Result<_>>()?);
    let mut above = vec![root];
    // Components that are still to be walked, the next one last.
    let mut left: Vec<Vec<u8>> = path.as_bytes().split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect();
    let mut links = 0;
    while let Some(name) = left.pop() {
        match name.as_slice() {
            b"" | b"." => continue,
            b".." => {
                if above.len() > 1 {
                    above.pop();
                }
                continue;
            }
            _ => {}
        }
        let here = above.last().cloned().unwrap_or_default();
        match step(&here, &name)? {
            None => return Ok(None),
            Some(Found::Directory(parts)) => above.push(Rc::new(parts)),
            Some(Found::File(file)) => return Ok(left.iter().all(|name| name.is_empty()).then_some(file)),
            Some(Found::Link(target)) => {
                links += 1;
                if links > LINKS_MAX {
                    return Ok(None);
                }
                if target.starts_with(b"/") {
                    above.truncate(1);
                }
                left.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
            }
        }
    }
    Ok(None)
}

/// What `name` is in the merged directory.
fn step(parts: &[OwnedFd], name: &[u8]) -> Result<Option<Found>, Errno> {
    let mut directory = Vec::new();
    for part in parts {
        let found = match rustix::fs::statat(part, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT | Errno::NAMETOOLONG) => continue,
            other => other?,
        };
        let kind = FileType::from_raw_mode(found.st_mode);
        // Whatever else is below a directory is hidden by it.
        if kind != FileType::Directory && !directory.is_empty() {
            break;
        }
        let open = |flags| rustix::fs::openat(part, name, flags | NEVER_WAIT, Mode::empty());
        match kind {
            FileType::Directory => {
                let opened = open(OFlags::DIRECTORY)?;
                let mut value = [0];
                let opaque = rustix::fs::fgetxattr(&opened, "trusted.overlay.opaque", &mut value) == Ok(1);
                directory.push(opened);
                if opaque && value == *b"y" {
                    break;
                }
            }
            FileType::RegularFile => return Ok(Some(Found::File(open(OFlags::empty())?))),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(part, name, Vec::new())?;
                return Ok(Some(Found::Link(target.into_bytes())));
            }
            // A whiteout, or something that is no file to read.
            _ => return Ok(None),
        }
    }
    Ok((!directory.is_empty()).then_some(Found::Directory(directory)))
}

const NEVER_WAIT: OFlags =
    OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC).union(OFlags::NOCTTY);

fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn layers(count: usize) -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        let layers: Vec<_> = (0..count).map(|number| dir.path().join(number.to_string())).collect();
        layers.iter().for_each(|layer| fs::create_dir_all(layer.join("etc")).unwrap());
        (dir, layers)
    }

    fn text(layers: &[PathBuf], path: &str) -> Option<String> {
        read(layers, path, 100).unwrap().map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn the_topmost_layer_that_has_it_wins() {
        let (_dir, layers) = layers(3);
        fs::write(layers[0].join("etc/passwd"), "bottom").unwrap();
        fs::write(layers[0].join("etc/group"), "group").unwrap();
        fs::write(layers[1].join("etc/passwd"), "middle").unwrap();
        assert_eq!(text(&layers, "/etc/passwd").as_deref(), Some("middle"));
        assert_eq!(text(&layers, "/etc/group").as_deref(), Some("group"));
        assert_eq!(text(&layers, "/etc/shadow"), None);
        assert_eq!(text(&layers, "/etc"), None);
        assert_eq!(text(&layers, "/etc/passwd/x"), None);
    }

    #[test]
    fn links_are_followed_through_all_layers_and_never_out_of_them() {
        let (dir, layers) = layers(2);
        fs::write(dir.path().join("secret"), "secret").unwrap();
        fs::create_dir_all(layers[0].join("nix")).unwrap();
        fs::write(layers[0].join("nix/users"), "users").unwrap();
        symlink("/nix/users", layers[1].join("etc/passwd")).unwrap();
        symlink("../../../nix/users", layers[1].join("etc/up")).unwrap();
        symlink(dir.path().join("secret"), layers[1].join("etc/absolute")).unwrap();
        symlink("../../secret", layers[1].join("etc/relative")).unwrap();
        symlink("loop", layers[1].join("etc/loop")).unwrap();
        assert_eq!(text(&layers, "/etc/passwd").as_deref(), Some("users"));
        assert_eq!(text(&layers, "/etc/up").as_deref(), Some("users"));
        for name in ["absolute", "relative", "loop"] {
            assert_eq!(text(&layers, &format!("/etc/{name}")), None, "{name}");
        }
    }

    #[test]
    fn a_file_hides_a_directory_below_it() {
        let (_dir, layers) = layers(2);
        fs::remove_dir(layers[1].join("etc")).unwrap();
        fs::write(layers[1].join("etc"), "no directory").unwrap();
        fs::write(layers[0].join("etc/passwd"), "hidden").unwrap();
        assert_eq!(text(&layers, "/etc/passwd"), None);
    }

    #[test]
    fn neither_fifos_nor_large_files_are_read() {
        let (_dir, layers) = layers(1);
        fs::write(layers[0].join("etc/passwd"), "x".repeat(101)).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, layers[0].join("etc/group"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(text(&layers, "/etc/passwd"), None);
        assert_eq!(text(&layers, "/etc/group"), None);
    }
}
