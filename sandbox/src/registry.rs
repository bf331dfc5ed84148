//! The sandboxes of a host, as directories that every process can read.
//!
//! `STATE_DIR/ID/` holds:
//!
//! | name | what it is |
//! |---|---|
//! | `lock` | locked (`flock`) by the owner for as long as it lives |
//! | `record.json` | a [`Record`], replaced as a whole |
//! | `vsock.sock`, `control.sock` | the VMM's sockets |
//! | `network.json` | what is to be undone in a network namespace; only while it is in use |
//! | `shared/` | the tree that the guest sees; empty to all but the owner's mount namespace |
//! | `output.log` | what a detached container printed |
//!
//! What is hidden in `STATE_DIR` belongs to no sandbox: `.lock`, and `.turns/` with the turns at booting.
//!
//! Lock order: `STATE_DIR/.lock`, which serializes the making and sweeping of directories, before `ID/lock`.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use serde::{Deserialize, Serialize};

use crate::share;

/// Trouble with the state directory.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A file or directory of the state.
    #[error("cannot use the state in {path}: {source}; hull keeps it as root, or where HULL_STATE_DIR says")]
    State {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A record that is no record.
    #[error("the record {path} is damaged: {source}; `hull rm -f` removes it")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A name that is taken.
    #[error("the name {0} is in use; choose another, or remove it with `hull rm {0}`")]
    NameTaken(String),
    /// A name that nobody has.
    #[error("there is no container {0}; `hull ps -a` lists those that there are")]
    NotFound(String),
    /// The beginning of more than one identifier.
    #[error("{0} is the beginning of several containers' identifiers; give more of it")]
    Ambiguous(String),
    /// A record that is not to be removed.
    #[error("the container {0} is running; stop it first, or use `hull rm -f`")]
    Running(String),
}

/// Where a sandbox is in its life, as its record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its owner prepares it.
    Created,
    /// Its container runs.
    Running,
    /// Its container has ended, and its VM with it.
    Exited,
}

/// What is known of a sandbox to processes other than its owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its identifier, also that of its container.
    pub id: String,
    /// The name that somebody chose.
    pub name: Option<String>,
    /// Where it is in its life.
    pub phase: Phase,
    /// Seconds since the epoch when it was made.
    pub created_at_s: u64,
    /// The owner's process identifier.
    pub owner_pid: u32,
    /// The VMM's process identifier, while it runs.
    pub vmm_pid: Option<u32>,
    /// The image, or root directory, as the user named it.
    pub image: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Whether the container has a terminal.
    pub terminal: bool,
    /// The signal that asks the container to end.
    pub stop_signal: u32,
    /// The first process's exit status, once it has ended.
    pub exit_code: Option<u8>,
    /// Why the sandbox ended, where that was not its container's end.
    pub failure: Option<String>,
    /// The environment, user and working directory that `exec` takes as its own: the `process` object of the container's
    /// OCI specification.
    pub process: serde_json::Value,
    /// Where the guest looks users up, as in roots that it mounts itself: whom the container runs as, `USER[:GROUP]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_user: Option<String>,
    /// The files and devices that are the container's disks, in their order in the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<PathBuf>,
}

/// The state directory.
#[derive(Clone, Debug)]
pub struct Registry {
    dir: PathBuf,
    /// Where writable layers are, one directory per sandbox.
    layers: PathBuf,
}

/// A sandbox's directory, held by its owner.
#[derive(Debug)]
pub struct Claim {
    dir: PathBuf,
    layers: PathBuf,
    _lock: File,
}

impl Registry {
    /// The registry at `state_dir`, with writable layers below `data_dir`.
    #[must_use]
    pub fn new(state_dir: &Path, data_dir: &Path) -> Self {
        Self { dir: state_dir.to_owned(), layers: data_dir.join("containers") }
    }

    /// Makes a sandbox's directory, and sweeps those whose owners died.
    ///
    /// # Errors
    ///
    /// Fails where the identifier or the name is in use.
    pub fn claim(&self, id: &str, name: Option<&str>) -> Result<Claim, RegistryError> {
        std::fs::create_dir_all(&self.dir).map_err(|source| self.state(&self.dir, source))?;
        let _all = self.lock_all()?;
        self.sweep_locked()?;
        for record in self.read_all()? {
            let taken = [Some(record.id.as_str()), record.name.as_deref()].into_iter().flatten();
            for taken in taken {
                if taken == id || Some(taken) == name {
                    return Err(RegistryError::NameTaken(taken.to_owned()));
                }
            }
        }
        let dir = self.dir.join(id);
        make_private_dir(&dir).map_err(|source| match source.kind() {
            ErrorKind::AlreadyExists => RegistryError::NameTaken(id.to_owned()),
            _ => self.state(&dir, source),
        })?;
        let path = dir.join("lock");
        let locked = open_lock(&path).and_then(|lock| {
            flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        });
        match locked {
            Ok(lock) => Ok(Claim { dir, layers: self.layers.join(id), _lock: lock }),
            Err(source) => {
                // It is new, and without a lock nobody's. Where it stays, the next claim sweeps it.
                let _ = std::fs::remove_dir_all(&dir);
                Err(self.state(&path, source))
            }
        }
    }

    /// All records, oldest first, after sweeping what dead owners left.
    ///
    /// # Errors
    ///
    /// Fails where the state directory cannot be read.
    pub fn list(&self) -> Result<Vec<Record>, RegistryError> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        {
            let _all = self.lock_all()?;
            self.sweep_locked()?;
        }
        self.read_all()
    }

    /// The record that `reference` names: a name, an identifier, or the beginning of just one identifier.
    ///
    /// # Errors
    ///
    /// Fails where there is none, or more than one.
    pub fn find(&self, reference: &str) -> Result<Record, RegistryError> {
        let records = self.list()?;
        if let Some(exact) = records.iter().find(|r| r.id == reference || r.name.as_deref() == Some(reference)) {
            return Ok(exact.clone());
        }
        let mut begin = records.into_iter().filter(|r| !reference.is_empty() && r.id.starts_with(reference));
        match (begin.next(), begin.next()) {
            (Some(record), None) => Ok(record),
            (None, _) => Err(RegistryError::NotFound(reference.to_owned())),
            (Some(_), Some(_)) => Err(RegistryError::Ambiguous(reference.to_owned())),
        }
    }

    /// The directory of a sandbox.
    #[must_use]
    pub fn dir(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    /// The root of a running container that has its sandbox to itself: a mount in its owner's namespace, which leads there. What
    /// is in it, links included, is the guest's to change at any time.
    #[must_use]
    pub fn root(&self, record: &Record) -> PathBuf {
        let dir = self.dir(&record.id);
        let owner = Path::new("/proc").join(record.owner_pid.to_string()).join("root");
        let share = owner.join(dir.strip_prefix("/").unwrap_or(&dir)).join(share::DIR);
        share::root_in(&share, &record.id)
    }

    /// Waits until the sandbox's owner has let go of it. The caller's thread blocks.
    ///
    /// # Errors
    ///
    /// Fails where the lock cannot be opened; a sandbox that is gone is no error.
    pub fn wait_for_owner(&self, id: &str) -> Result<(), RegistryError> {
        let path = self.dir(id).join("lock");
        let lock = match open_lock(&path) {
            Ok(lock) => lock,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(self.state(&path, source)),
        };
        flock(&lock, FlockOperation::LockShared).map_err(|errno| self.state(&path, errno.into()))
    }

    /// Removes what is left of a sandbox that has exited.
    ///
    /// # Errors
    ///
    /// Fails with [`RegistryError::Running`] while it has an owner.
    pub fn remove(&self, id: &str) -> Result<(), RegistryError> {
        let _all = self.lock_all()?;
        if self.has_owner(id)? {
            return Err(RegistryError::Running(id.to_owned()));
        }
        self.remove_dirs(id)
    }

    /// Removes the directories of sandboxes that have neither an owner nor a record of their exit.
    fn sweep_locked(&self) -> Result<(), RegistryError> {
        for id in self.ids()? {
            let exited = matches!(self.read(&id), Ok(Some(record)) if record.phase == Phase::Exited);
            if !exited && !self.has_owner(&id)? {
                tracing::info!(id, "sweeping what a dead owner left");
                crate::network::sweep(&self.dir(&id));
                self.remove_dirs(&id)?;
            }
        }
        Ok(())
    }

    fn has_owner(&self, id: &str) -> Result<bool, RegistryError> {
        let path = self.dir(id).join("lock");
        let lock = match open_lock(&path) {
            Ok(lock) => lock,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(self.state(&path, source)),
        };
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(false),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
            Err(errno) => Err(self.state(&path, errno.into())),
        }
    }

    fn remove_dirs(&self, id: &str) -> Result<(), RegistryError> {
        // Nobody's mounts are below: they were in the owner's mount namespace, which ended with the owner.
        for dir in [self.layers.join(id), self.dir(id)] {
            match std::fs::remove_dir_all(&dir) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(self.state(&dir, error)),
                _ => {}
            }
        }
        Ok(())
    }

    fn lock_all(&self) -> Result<File, RegistryError> {
        let path = self.dir.join(".lock");
        let lock = open_lock(&path).map_err(|source| self.state(&path, source))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|errno| self.state(&path, errno.into()))?;
        Ok(lock)
    }

    fn ids(&self) -> Result<Vec<String>, RegistryError> {
        let state = |source| self.state(&self.dir, source);
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(state)? {
            let entry = entry.map_err(state)?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir())
                && let Ok(name) = entry.file_name().into_string()
                // What is hidden is the host's as a whole.
                && !name.starts_with('.')
            {
                ids.push(name);
            }
        }
        Ok(ids)
    }

    fn read_all(&self) -> Result<Vec<Record>, RegistryError> {
        let mut records = Vec::new();
        for id in self.ids()? {
            records.extend(self.read(&id)?);
        }
        records.sort_by(|a: &Record, b| (a.created_at_s, &a.id).cmp(&(b.created_at_s, &b.id)));
        Ok(records)
    }

    fn read(&self, id: &str) -> Result<Option<Record>, RegistryError> {
        let path = self.dir(id).join("record.json");
        match std::fs::read(&path) {
            Ok(json) => {
                serde_json::from_slice(&json).map(Some).map_err(|source| RegistryError::Damaged { path, source })
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.state(&path, source)),
        }
    }

    fn state(&self, path: &Path, source: std::io::Error) -> RegistryError {
        RegistryError::State { path: path.to_owned(), source }
    }
}

impl Claim {
    /// The sandbox's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the writable layers of its containers go.
    #[must_use]
    pub fn layers(&self) -> &Path {
        &self.layers
    }

    /// Replaces the record.
    ///
    /// # Errors
    ///
    /// Fails where the state directory is full or gone.
    pub fn write(&self, record: &Record) -> Result<(), RegistryError> {
        let path = self.dir.join("record.json");
        let draft = self.dir.join("record.json.new");
        let json = serde_json::to_vec_pretty(record)
            .map_err(|source| RegistryError::Damaged { path: path.clone(), source })?;
        std::fs::write(&draft, json)
            .and_then(|()| std::fs::rename(&draft, &path))
            .map_err(|source| RegistryError::State { path, source })
    }

    /// Lets go of the sandbox and keeps its record, for people to look at until they remove it.
    ///
    /// # Errors
    ///
    /// Fails where the record cannot be written; what is kept then says that the sandbox still runs, and is swept.
    pub fn keep(self, record: &Record) -> Result<(), RegistryError> {
        self.write(record)
    }

    /// Lets go of the sandbox and removes all that is left of it.
    ///
    /// # Errors
    ///
    /// Fails where a directory will not go.
    pub fn remove(self) -> Result<(), RegistryError> {
        for dir in [&self.layers, &self.dir] {
            match std::fs::remove_dir_all(dir) {
                Err(source) if source.kind() != ErrorKind::NotFound => {
                    return Err(RegistryError::State { path: dir.clone(), source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn open_lock(path: &Path) -> std::io::Result<File> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
    // Without the directory there is nothing to lock, and a lock must not bring it back.
    rustix::fs::open(path, flags, Mode::from_raw_mode(0o600)).map(File::from).map_err(Into::into)
}

fn make_private_dir(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(dir: &tempfile::TempDir) -> Registry {
        Registry::new(&dir.path().join("state"), &dir.path().join("data"))
    }

    fn record(id: &str, name: Option<&str>, phase: Phase) -> Record {
        Record {
            id: id.into(),
            name: name.map(Into::into),
            phase,
            created_at_s: 1,
            owner_pid: 1,
            vmm_pid: None,
            image: "image".into(),
            command: vec!["true".into()],
            cpus: 1,
            memory_mib: 128,
            terminal: false,
            stop_signal: 15,
            exit_code: None,
            failure: None,
            process: serde_json::Value::Null,
            guest_user: None,
            disks: Vec::new(),
        }
    }

    #[test]
    fn what_is_hidden_is_no_sandbox_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(&dir);
        let hidden = dir.path().join("state/.turns");
        std::fs::create_dir_all(&hidden).unwrap();
        drop(registry.claim("one", None).unwrap());
        assert!(registry.list().unwrap().is_empty());
        assert!(hidden.exists());
        assert!(!registry.dir("one").exists(), "what a dead owner left is swept");
    }

    #[test]
    fn a_running_sandbox_is_found_by_name_and_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(&dir);
        let claim = registry.claim("abc1", Some("web")).unwrap();
        claim.write(&record("abc1", Some("web"), Phase::Running)).unwrap();
        assert_eq!(registry.find("web").unwrap().id, "abc1");
        assert_eq!(registry.find("abc").unwrap().id, "abc1");
        assert!(matches!(registry.find("x"), Err(RegistryError::NotFound(_))));
        assert!(matches!(registry.find(""), Err(RegistryError::NotFound(_))));
    }

    #[test]
    fn two_beginnings_are_ambiguous() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(&dir);
        let claims: Vec<_> = ["abc1", "abc2"]
            .map(|id| {
                let claim = registry.claim(id, None).unwrap();
                claim.write(&record(id, None, Phase::Running)).unwrap();
                claim
            })
            .into();
        assert!(matches!(registry.find("abc"), Err(RegistryError::Ambiguous(_))));
        drop(claims);
    }

    #[test]
    fn a_name_is_taken_while_its_holder_lives() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(&dir);
        let claim = registry.claim("abc1", Some("web")).unwrap();
        claim.write(&record("abc1", Some("web"), Phase::Running)).unwrap();
        for (id, name) in [("abc2", Some("web")), ("abc1", None), ("web", None), ("abc2", Some("abc1"))] {
            assert!(matches!(registry.claim(id, name), Err(RegistryError::NameTaken(_))), "{id} {name:?}");
        }
        claim.remove().unwrap();
        registry.claim("abc2", Some("web")).unwrap();
    }

    #[test]
    fn what_a_dead_owner_left_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(&dir);
        let claim = registry.claim("abc1", None).unwrap();
        claim.write(&record("abc1", None, Phase::Running)).unwrap();
        std::fs::create_dir_all(claim.layers()).unwrap();
        drop(claim);
        assert!(registry.list().unwrap().is_empty());
        assert!(!registry.dir("abc1").exists());
        assert!(!dir.path().join("data/containers/abc1").exists());
    }

    #[test]
    fn the_record_of_an_exit_is_kept_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(&dir);
        let claim = registry.claim("abc1", None).unwrap();
        assert!(matches!(registry.remove("abc1"), Err(RegistryError::Running(_))));
        claim.keep(&record("abc1", None, Phase::Exited)).unwrap();
        assert_eq!(registry.list().unwrap().len(), 1);
        registry.remove("abc1").unwrap();
        assert!(registry.list().unwrap().is_empty());
    }
}
