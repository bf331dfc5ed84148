//! Volumes that the kubelet writes and programs watch: ConfigMaps, Secrets, projected volumes, the downward API.
//!
//! Not every host can tell what changes in a share. So the guest has these small, read-only volumes in memory of its
//! own, the shim watches them on the host, and the guest makes each change itself, where its watchers see it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use hull_protocol::agent::{File, Storage, file, storage};
use hull_protocol::{FILES_DIRECTORY, MAX_FILES_BYTES};
use hull_sandbox::container::Process;
use hull_sandbox::share::Volume;
use hull_sandbox_sys::readiness::readable;
use rustix::fs::inotify;
use tokio::task::AbortHandle;

/// The kubelet's plugins whose volumes are of this kind; their names are directories in the volumes' paths.
const PLUGINS: [&str; 4] =
    ["kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"];
/// Room for what there is and, during an update, what comes.
const OPTIONS: [&str; 4] = ["size=8m", "mode=0755", "nosuid", "nodev"];
/// What a file costs in a message besides its contents.
const FILE_OVERHEAD_BYTES: usize = 512;

/// One such volume of a container.
#[derive(Debug)]
pub(crate) struct LiveVolume {
    source: PathBuf,
    mount_point: String,
    /// From before the files were read, so that no change is missed.
    watch: OwnedFd,
    files: Vec<File>,
}

/// What keeps a container's live volumes up to date for as long as it is there.
#[derive(Debug, Default)]
pub(crate) struct Followers(Vec<AbortHandle>);

impl LiveVolume {
    /// Takes a volume if it is of this kind, and no larger than a message together with `others`.
    pub(crate) fn take(volume: &Volume, container: &str, index: usize, others: &[Self]) -> Option<Self> {
        let plugin = volume.source.parent().and_then(Path::file_name).and_then(OsStr::to_str)?;
        if !volume.read_only || !PLUGINS.contains(&plugin) {
            return None;
        }
        let budget = MAX_FILES_BYTES.checked_sub(others.iter().flat_map(|other| &other.files).map(cost).sum())?;
        let taken = watch(&volume.source).and_then(|watch| Ok((watch, read(&volume.source, budget)?)));
        match taken {
            Ok((watch, Some(files))) => Some(Self {
                source: volume.source.clone(),
                mount_point: format!("{FILES_DIRECTORY}/{container}/{index}"),
                watch,
                files,
            }),
            Ok((_, None)) => {
                tracing::info!("{} is shared: too large to be followed by inotify", volume.source.display());
                None
            }
            Err(error) => {
                tracing::warn!("{} is shared, it cannot be watched: {error}", volume.source.display());
                None
            }
        }
    }

    /// Where the guest has it.
    pub(crate) fn mount_point(&self) -> &str {
        &self.mount_point
    }

    /// The guest's file system for it.
    pub(crate) fn storage(&self) -> Storage {
        Storage {
            source: Some(storage::Source::None(true)),
            fstype: "tmpfs".into(),
            options: OPTIONS.map(str::to_owned).into(),
            mount_point: self.mount_point.clone(),
            files: self.files.clone(),
            ..Default::default()
        }
    }

    /// Passes changes on, until the container or the guest is gone.
    async fn follow(self, container: Process) -> io::Result<()> {
        let events = readable(self.watch)?;
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut seen = self.files;
        loop {
            let mut ready = events.readable().await?;
            let mut reader = inotify::Reader::new(events.get_ref(), &mut buffer);
            // What the events say is in the directory too.
            while reader.next().is_ok() {}
            ready.clear_ready();
            let files = match read(&self.source, MAX_FILES_BYTES) {
                Ok(Some(files)) => files,
                Ok(None) => {
                    tracing::warn!("{} has grown too large to be followed", self.source.display());
                    continue;
                }
                // Changed meanwhile: the next event tells.
                Err(error) => {
                    tracing::debug!("{}: {error}", self.source.display());
                    continue;
                }
            };
            if files == seen {
                continue;
            }
            match container.update_files(&self.mount_point, files.clone()).await {
                Ok(()) => seen = files,
                Err(error) if error.is_not_found() => return Ok(()),
                Err(error) => tracing::warn!("{} is not up to date in the guest: {error}", self.source.display()),
            }
        }
    }
}

impl Followers {
    /// Follows all of a container's live volumes.
    pub(crate) fn start(volumes: Vec<LiveVolume>, container: &Process) -> Self {
        let follow = |volume: LiveVolume| {
            let container = container.clone();
            let task = tokio::spawn(async move {
                let source = volume.source.clone();
                if let Err(error) = volume.follow(container).await {
                    tracing::warn!("{} is not followed any more: {error}", source.display());
                }
            });
            task.abort_handle()
        };
        Self(volumes.into_iter().map(follow).collect())
    }
}

impl Drop for Followers {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// Watches a directory's names: the kubelet changes a volume by a link of it.
fn watch(directory: &Path) -> io::Result<OwnedFd> {
    let fd = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    let names = inotify::WatchFlags::CREATE
        | inotify::WatchFlags::DELETE
        | inotify::WatchFlags::MOVED_FROM
        | inotify::WatchFlags::MOVED_TO
        | inotify::WatchFlags::CLOSE_WRITE
        | inotify::WatchFlags::ONLYDIR;
    inotify::add_watch(&fd, directory, names)?;
    Ok(fd)
}

/// All files below a directory, directories before what is in them; none where they are more than `budget` bytes or of other kinds.
fn read(root: &Path, budget: usize) -> io::Result<Option<Vec<File>>> {
    let mut files = Vec::new();
    let mut left = budget;
    let mut ahead = vec![PathBuf::new()];
    while let Some(path) = ahead.pop() {
        let full = root.join(&path);
        let metadata = fs::symlink_metadata(&full)?;
        let kind = metadata.file_type();
        let what = if kind.is_dir() {
            for entry in fs::read_dir(&full)? {
                ahead.push(path.join(entry?.file_name()));
            }
            file::What::Directory(true)
        } else if kind.is_symlink() {
            let Ok(target) = fs::read_link(&full)?.into_os_string().into_string() else { return Ok(None) };
            file::What::Link(target)
        } else if kind.is_file() && metadata.len() <= left as u64 {
            file::What::Contents(fs::read(&full)?)
        } else {
            return Ok(None);
        };
        let Ok(path) = path.into_os_string().into_string() else { return Ok(None) };
        let file = File {
            path,
            mode: metadata.permissions().mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            what: Some(what),
            ..Default::default()
        };
        let Some(rest) = left.checked_sub(cost(&file)) else { return Ok(None) };
        left = rest;
        files.push(file);
    }
    Ok(Some(files))
}

/// What a file takes of a message.
fn cost(file: &File) -> usize {
    let contents = match &file.what {
        Some(file::What::Contents(contents)) => contents.len(),
        _ => 0,
    };
    contents + FILE_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config_map(dir: &Path) -> Volume {
        let source = dir.join("kubernetes.io~configmap/config");
        fs::create_dir_all(source.join("..1")).unwrap();
        fs::write(source.join("..1/key"), "value").unwrap();
        std::os::unix::fs::symlink("..1", source.join("..data")).unwrap();
        Volume { source, read_only: true, ..Default::default() }
    }

    #[test]
    fn a_config_map_is_taken_with_directories_first() {
        let dir = tempfile::tempdir().unwrap();
        let taken = LiveVolume::take(&config_map(dir.path()), "c", 3, &[]).unwrap();
        assert_eq!(taken.mount_point(), "/run/hull/files/c/3");
        let paths: Vec<&str> = taken.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(paths[0], "");
        let place = |wanted: &str| paths.iter().position(|path| *path == wanted).unwrap();
        assert!(place("..1") < place("..1/key"));
        assert_eq!(taken.files[place("..data")].what, Some(file::What::Link("..1".into())));
    }

    #[test]
    fn other_volumes_are_left_to_the_share() {
        let dir = tempfile::tempdir().unwrap();
        let volume = config_map(dir.path());
        let writable = Volume { read_only: false, ..volume.clone() };
        assert!(LiveVolume::take(&writable, "c", 0, &[]).is_none());
        // A part of a volume (subPath) is another directory, whose changes nobody sees with any runtime.
        let part = Volume { source: volume.source.join("..1/key"), ..volume.clone() };
        assert!(LiveVolume::take(&part, "c", 0, &[]).is_none());
        fs::write(volume.source.join("large"), vec![0; MAX_FILES_BYTES]).unwrap();
        assert!(LiveVolume::take(&volume, "c", 0, &[]).is_none());
    }
}
