//! What a container's root is made of, and who mounts it.
//!
//! Directories of the host are mounted on the host and reach the guest through the share. Disks are given to the guest, whose own
//! kernel reads the file system on them: the host never does, so that whoever has written one can break no more than the guest.
//!
//! ```text
//! Root ──prepare, while the guest boots──▶ Prepared ──plug, once its agent answers──▶ storages for the container
//! ```

use std::path::PathBuf;

use hull_protocol::ROOTS_DIRECTORY;
use hull_protocol::agent::{Overlay, Storage, storage};

use crate::agent::Agent;
use crate::disks::{DiskError, Disks, Opened};
use crate::ext4;
use crate::share::{RootSource, Share, ShareError};

/// With more disks than these, the layers of a further root are files of the share, which erofs can be mounted from as well: the bus has 31
/// places, of which a guest's other devices take some 10, and block volumes want some too.
const MAX_LAYER_DISKS: usize = 16;

/// A container's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// What is in it at the start.
    pub base: Base,
    /// Where changes go.
    pub writes: Writes,
    /// Options of the overlay, where there is to be one in the guest.
    pub options: Vec<String>,
}

/// What a root holds at the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Base {
    /// Directories of the host.
    Host(RootSource),
    /// Disks that the guest mounts, bottom first.
    Disks(Vec<Disk>),
}

/// Where a container's changes to its root go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Writes {
    /// To the base itself. Of several disks none can be written to.
    Base,
    /// To the guest's memory.
    Memory,
    /// To a new disk of this many bytes, which goes with the sandbox.
    NewDisk(u64),
    /// To a disk that others have made.
    Disk(Disk),
}

/// A raw file or block device with a file system on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The file or device.
    pub path: PathBuf,
    /// The file system, as mount(2) takes it.
    pub fstype: String,
    /// Options of the mount in the guest.
    pub options: Vec<String>,
    /// Whether the guest can write to it: enforced on the host.
    pub read_only: bool,
}

/// A root that is as ready as it can be without the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// Where the container's root is in the guest.
    pub path: String,
    guest: Option<GuestRoot>,
}

/// What the guest mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
struct GuestRoot {
    lower: Lower,
    /// The disks of `lower` as files in the guest, where their file systems can be mounted from files too.
    files: Vec<String>,
    writable: Option<Writable>,
    options: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Lower {
    /// A directory in the guest.
    Directory(String),
    Disks(Vec<Disk>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Writable {
    Memory,
    Disk(Disk),
}

/// A root that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The part of it that is the host's.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The disk for what is written.
    #[error(transparent)]
    Ext4(#[from] ext4::Ext4Error),
    /// There is nothing in it.
    #[error("the root has no layers; an image has one at least")]
    Empty,
}

impl Root {
    /// A root on the host that changes go to.
    #[must_use]
    pub fn of_host(source: RootSource) -> Self {
        Self { base: Base::Host(source), writes: Writes::Base, options: Vec::new() }
    }

    /// Puts what the host has of the root into the tree that the guest sees, and makes the disk for what is written.
    ///
    /// # Errors
    ///
    /// Fails where a source is missing, a mount fails or a disk cannot be made.
    pub fn prepare(&self, share: &Share, container: &str) -> Result<Prepared, RootError> {
        let writable = match &self.writes {
            Writes::Base => None,
            Writes::Memory => Some(Writable::Memory),
            Writes::Disk(disk) => Some(Writable::Disk(disk.clone())),
            Writes::NewDisk(bytes) => Some(Writable::Disk(Disk {
                path: share.add_disk(container, *bytes)?,
                fstype: "ext4".to_owned(),
                options: ext4::MOUNT_OPTIONS.map(str::to_owned).to_vec(),
                read_only: false,
            })),
        };
        let lower = match (&self.base, &writable) {
            (Base::Host(source), None) => {
                return Ok(Prepared { path: share.add_root(container, source)?, guest: None });
            }
            (Base::Host(source), Some(_)) => Lower::Directory(share.add_lower_root(container, source)?),
            (Base::Disks(disks), _) if disks.is_empty() => return Err(RootError::Empty),
            (Base::Disks(disks), _) => Lower::Disks(disks.clone()),
        };
        let files = match &lower {
            Lower::Disks(disks) if disks.iter().all(|disk| disk.fstype == "erofs") => {
                let layers = disks.iter().enumerate();
                layers.map(|(index, disk)| share.add_layer(container, index, &disk.path)).collect::<Result<_, _>>()?
            }
            _ => Vec::new(),
        };
        let guest = GuestRoot { lower, files, writable, options: self.options.clone() };
        Ok(Prepared { path: place(container, "root"), guest: Some(guest) })
    }
}

impl Prepared {
    /// A root that is in the tree already.
    #[must_use]
    pub fn in_tree(path: String) -> Self {
        Self { path, guest: None }
    }

    /// Has the root's disks in the guest, for as long as the container has them, and says what the guest is to mount before it creates the
    /// container.
    ///
    /// # Errors
    ///
    /// Fails with the first disk that cannot be had. Those before it stay the container's, to be released as its others.
    pub async fn plug(&self, disks: &mut Disks, agent: &Agent, container: &str) -> Result<Vec<Storage>, DiskError> {
        let Some(guest) = &self.guest else { return Ok(Vec::new()) };
        let lower = guest.lower_mounts(container);
        let as_files = !guest.files.is_empty() && disks.count() + lower.len() > MAX_LAYER_DISKS;
        let mut storages = Vec::new();
        for (index, (disk, place)) in lower.into_iter().enumerate() {
            let source = match guest.files.get(index).filter(|_| as_files) {
                Some(file) => storage::Source::Path(file.clone()),
                None => plug(disk, disks, agent, container).await?,
            };
            storages.push(of_disk(disk, source, place));
        }
        if let Some(Writable::Disk(disk)) = &guest.writable {
            let source = plug(disk, disks, agent, container).await?;
            storages.push(of_disk(disk, source, place(container, "writable")));
        }
        storages.extend(guest.others(container));
        Ok(storages)
    }
}

impl GuestRoot {
    /// The disks that are read first, with where each is mounted.
    fn lower_mounts<'a>(&'a self, container: &str) -> Vec<(&'a Disk, String)> {
        match &self.lower {
            Lower::Directory(_) => Vec::new(),
            Lower::Disks(disks) => match disks.as_slice() {
                [whole] if self.writable.is_none() => vec![(whole, place(container, "root"))],
                layers => layers.iter().zip(lower_places(container)).collect(),
            },
        }
    }

    /// What else is to be mounted once the disks are.
    fn others(&self, container: &str) -> Vec<Storage> {
        let lower: Vec<String> = match &self.lower {
            Lower::Directory(directory) => vec![directory.clone()],
            Lower::Disks(disks) if disks.len() == 1 && self.writable.is_none() => return Vec::new(),
            Lower::Disks(disks) => lower_places(container).take(disks.len()).collect(),
        };
        let writable = place(container, "writable");
        let mut storages = Vec::new();
        if self.writable == Some(Writable::Memory) {
            storages.push(Storage {
                source: Some(storage::Source::None(true)),
                fstype: "tmpfs".to_owned(),
                options: vec!["mode=0700".to_owned()],
                mount_point: writable.clone(),
                ..Default::default()
            });
        }
        let writable = if self.writable.is_some() { writable } else { String::new() };
        storages.push(Storage {
            source: Some(storage::Source::Overlay(Overlay { lower, writable, ..Default::default() })),
            options: self.options.clone(),
            mount_point: place(container, "root"),
            ..Default::default()
        });
        storages
    }
}

/// Has a disk in the guest and says which it is there.
async fn plug(disk: &Disk, disks: &mut Disks, agent: &Agent, container: &str) -> Result<storage::Source, DiskError> {
    let (path, read_only) = (disk.path.clone(), disk.read_only);
    // Opening waits for the host's storage.
    let opened = tokio::task::spawn_blocking(move || Opened::file_system(&path, read_only)).await;
    let failed =
        |error: tokio::task::JoinError| DiskError::Open { disk: disk.path.display().to_string(), source: error.into() };
    Ok(storage::Source::PciAddress(disks.add_opened(agent, container, opened.map_err(failed)??).await?))
}

fn of_disk(disk: &Disk, source: storage::Source, mount_point: String) -> Storage {
    let access = if disk.read_only { "ro" } else { "rw" };
    Storage {
        source: Some(source),
        fstype: disk.fstype.clone(),
        options: disk.options.iter().map(String::as_str).chain([access]).map(str::to_owned).collect(),
        mount_point,
        ..Default::default()
    }
}

/// Where the guest has a part of a container's root.
fn place(container: &str, part: &str) -> String {
    format!("{ROOTS_DIRECTORY}/{container}/{part}")
}

fn lower_places(container: &str) -> impl Iterator<Item = String> {
    (0..).map(move |index: usize| place(container, &index.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str, read_only: bool) -> Disk {
        Disk { path: name.into(), fstype: "ext4".into(), options: vec!["nodev".into()], read_only }
    }

    fn guest(lower: Lower, writable: Option<Writable>) -> (Vec<String>, Vec<Storage>) {
        let guest = GuestRoot { lower, files: Vec::new(), writable, options: Vec::new() };
        let disks = guest.lower_mounts("c").into_iter().map(|(disk, place)| format!("{} {place}", disk.path.display()));
        (disks.collect(), guest.others("c"))
    }

    fn overlay(storages: &[Storage]) -> (Vec<String>, String) {
        match storages.last().and_then(|storage| storage.source.clone()) {
            Some(storage::Source::Overlay(overlay)) => (overlay.lower, overlay.writable),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_single_disk_is_the_root() {
        let (disks, others) = guest(Lower::Disks(vec![disk("a", false)]), None);
        assert_eq!(disks, ["a /run/hull/roots/c/root"]);
        assert!(others.is_empty());
    }

    #[test]
    fn read_only_disks_lie_below_memory_or_a_disk() {
        let layers = || Lower::Disks(vec![disk("bottom", true), disk("top", true)]);
        let (disks, others) = guest(layers(), Some(Writable::Memory));
        assert_eq!(disks, ["bottom /run/hull/roots/c/0", "top /run/hull/roots/c/1"]);
        assert_eq!(
            (others[0].fstype.as_str(), others[0].mount_point.as_str()),
            ("tmpfs", "/run/hull/roots/c/writable")
        );
        let lower = ["/run/hull/roots/c/0", "/run/hull/roots/c/1"].map(str::to_owned).to_vec();
        assert_eq!(overlay(&others), (lower.clone(), "/run/hull/roots/c/writable".to_owned()));
        let (disks, others) = guest(layers(), Some(Writable::Disk(disk("w", false))));
        assert_eq!(disks.len(), 2);
        assert_eq!((others.len(), overlay(&others).1.as_str()), (1, "/run/hull/roots/c/writable"));
        // Where nothing can be written.
        let (_, others) = guest(layers(), None);
        assert_eq!(overlay(&others), (lower, String::new()));
    }

    #[test]
    fn a_directory_of_the_share_lies_below_a_disk() {
        let (disks, others) = guest(Lower::Directory("/shared".into()), Some(Writable::Disk(disk("w", false))));
        assert!(disks.is_empty());
        assert_eq!(overlay(&others).0, ["/shared"]);
        assert_eq!(others[0].mount_point, "/run/hull/roots/c/root");
    }

    #[test]
    fn a_disk_is_mounted_with_its_options_and_as_writable_as_it_is() {
        let source = || storage::Source::PciAddress("0000:00:05.0".into());
        assert_eq!(of_disk(&disk("a", true), source(), "/m".into()).options, ["nodev", "ro"]);
        assert_eq!(of_disk(&disk("a", false), source(), "/m".into()).options, ["nodev", "rw"]);
    }
}
