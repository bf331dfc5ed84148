//! The containers of the guest and what can be done with them, one operation per file.
//!
//! ```text
//! create ─▶ Creating ─▶ Created ─start─▶ Running ◀─pause, resume─▶ Paused
//!               │           └────────────────┴── first process ends ──┴──▶ Stopped ─▶ remove
//!               └── any step fails: nothing is left
//! ```
//!
//! A [`Container`]'s state is behind a mutex that is never held across an await. Operations that change the
//! container as a whole (start, update, pause, resume, remove) also hold its `operation` lock, across awaits; it is
//! taken before the state's. The map of containers is locked alone.

mod close_stdin;
mod create;
mod exec;
mod exit;
mod nodes;
mod oom;
mod pause;
mod pids;
mod remove;
mod resize;
pub(crate) mod rootfs;
mod signal;
pub(crate) mod spec;
mod start;
mod stats;
mod update;
mod update_files;
mod user;
mod wait;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::Pid;
use tokio::sync::watch;
use tokio::task::AbortHandle;

pub(crate) use self::create::CreateRequest;

use crate::cgroup::{Cgroup, devices};
use crate::error::{Error, Result};
use crate::events::{Events, ExitStatus};
use crate::reaper::Reaper;
use crate::storage::Mounted;
use crate::streams::parking::Parking;
use crate::streams::stdio::Controls;
use crate::volumes::Volumes;

/// The `exec_id` of a container's first process.
pub(crate) const INIT: &str = "";

/// All containers, and what they share.
pub(crate) struct Containers {
    map: Mutex<HashMap<String, Arc<Container>>>,
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) events: Arc<Events>,
    pub(crate) parking: Arc<Parking>,
    volumes: Arc<Volumes>,
    /// The cgroup above the containers'.
    cgroup: Cgroup,
    /// Where each container has a directory.
    directory: PathBuf,
}

/// One container, from before its first process is made until its removal.
pub(crate) struct Container {
    pub(crate) id: String,
    /// The bundle: config.json, and below `state` what libcontainer keeps.
    directory: PathBuf,
    cgroup: Cgroup,
    reaper: Arc<Reaper>,
    events: Arc<Events>,
    operation: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

struct State {
    phase: Phase,
    /// By exec id; the first process by [`INIT`].
    processes: HashMap<String, Process>,
    /// Execs that are being started. Their ids are taken.
    starting: HashSet<String>,
    /// The end of the first process while others have not ended yet: it is the last to be told.
    held_exit: Option<ExitStatus>,
    /// Processes that the kernel has killed for want of memory, as far as events have told.
    oom_kills: u64,
    oom_watch: Option<AbortHandle>,
    has_poststart: bool,
    has_poststop: bool,
    mounted: Vec<Mounted>,
    device_policy: Option<devices::Attached>,
}

/// A process of a container, until it is removed.
struct Process {
    pid: Pid,
    exit: watch::Sender<Option<ExitStatus>>,
    controls: Controls,
}

impl Containers {
    pub(crate) fn new(cgroup: Cgroup, directory: PathBuf, volumes: PathBuf) -> Self {
        Self {
            map: Mutex::default(),
            reaper: Arc::default(),
            events: Arc::new(Events::new()),
            parking: Arc::default(),
            volumes: Arc::new(Volumes::new(volumes)),
            cgroup,
            directory,
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    /// Ends every process of every container, at shutdown.
    pub(crate) async fn kill_all(&self) -> Result<()> {
        self.cgroup.kill()?;
        self.cgroup.wait_empty().await
    }

    /// Unmounts all file systems of containers, none of which may have a process: so that those on disks are whole.
    pub(crate) async fn unmount_all(&self) {
        let containers: Vec<_> = self.lock().values().cloned().collect();
        for container in containers {
            if let Err(error) = container.unmount().await {
                tracing::error!("container {}: {error}", container.id);
            }
        }
    }

    pub(crate) fn get(&self, id: &str) -> Result<Arc<Container>> {
        self.lock().get(id).cloned().ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Container {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn new() -> Self {
        Self {
            phase: Phase::Creating,
            processes: HashMap::new(),
            starting: HashSet::new(),
            held_exit: None,
            oom_kills: 0,
            oom_watch: None,
            has_poststart: false,
            has_poststop: false,
            mounted: Vec::new(),
            device_policy: None,
        }
    }

    fn process(&self, container_id: &str, exec_id: &str) -> Result<&Process> {
        self.processes.get(exec_id).ok_or_else(|| no_such_process(container_id, exec_id))
    }

    /// Refuses what the phase does not allow.
    fn require(&self, action: &str, allowed: &[Phase]) -> Result<()> {
        if allowed.contains(&self.phase) {
            return Ok(());
        }
        Err(Error::State(format!("cannot {action}: the container is {:?}", self.phase).to_lowercase()))
    }

    /// Whether a process other than the first runs or is about to.
    fn others_run(&self) -> bool {
        let running = |(id, process): (&String, &Process)| id != INIT && process.exit.borrow().is_none();
        !self.starting.is_empty() || self.processes.iter().any(running)
    }
}

fn no_such_process(container_id: &str, exec_id: &str) -> Error {
    match exec_id {
        INIT => Error::NotFound(format!("process of container {container_id}")),
        exec_id => Error::NotFound(format!("process {exec_id} of container {container_id}")),
    }
}

#[cfg(test)]
mod testing {
    //! A container without anything behind it, for tests of what goes on inside the agent.

    use super::*;

    pub(super) fn container() -> (Arc<Container>, Arc<Events>) {
        let events = Arc::new(Events::new());
        let container = Container {
            id: "c".into(),
            directory: "/nowhere".into(),
            cgroup: Cgroup::at("/nowhere".as_ref()),
            reaper: Arc::default(),
            events: events.clone(),
            operation: tokio::sync::Mutex::default(),
            state: Mutex::new(State::new()),
        };
        (Arc::new(container), events)
    }

    pub(super) fn process(pid: i32) -> Process {
        Process { pid: Pid::from_raw(pid).unwrap(), exit: watch::Sender::new(None), controls: Controls::default() }
    }
}
