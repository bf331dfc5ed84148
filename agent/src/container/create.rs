//! Creates a container: everything up to a first process that waits to be started.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustix::process::Pid;
use tokio::sync::watch;

use super::{Container, Containers, INIT, Phase, Process, State, spec};
use crate::cgroup::{devices, resources};
use crate::error::{Error, Result, Step};
use crate::helper;
use crate::storage::Storage;
use crate::streams::stdio::Io;
use crate::volumes::Volume;

pub(crate) struct CreateRequest {
    pub(crate) container_id: String,
    /// An OCI runtime specification as JSON.
    pub(crate) spec: Vec<u8>,
    pub(crate) io: Io,
    pub(crate) storages: Vec<Storage>,
    pub(crate) volumes: Vec<Volume>,
    /// To be looked up in the root; empty where the specification says it.
    pub(crate) user: String,
}

impl Containers {
    /// Creates a container; leaves nothing behind if that fails.
    pub(crate) async fn create(&self, request: CreateRequest) -> Result<Pid> {
        let container = self.reserve(&request.container_id)?;
        match container.build(self, request).await {
            Ok(pid) => Ok(pid),
            Err(error) => {
                if let Err(error) = container.tear_down().await {
                    tracing::error!("container {}: clean up: {error}", container.id);
                }
                self.lock().remove(&container.id);
                Err(error)
            }
        }
    }

    fn reserve(&self, id: &str) -> Result<Arc<Container>> {
        let mut map = self.lock();
        if map.contains_key(id) {
            return Err(Error::Exists(format!("container {id}")));
        }
        let container = Arc::new(Container {
            id: id.to_owned(),
            directory: self.directory.join(id),
            cgroup: self.cgroup.child(id),
            reaper: self.reaper.clone(),
            events: self.events.clone(),
            operation: tokio::sync::Mutex::default(),
            state: Mutex::new(State::new()),
        });
        map.insert(id.to_owned(), container.clone());
        Ok(container)
    }
}

impl Container {
    async fn build(self: &Arc<Self>, containers: &Containers, request: CreateRequest) -> Result<Pid> {
        make_directory(&self.directory).step("make the container's directory")?;
        for storage in request.storages {
            let mounted = storage.mount().await?;
            self.lock().mounted.push(mounted);
        }
        for volume in request.volumes {
            let mounted = containers.volumes.attach(volume).await?;
            self.lock().mounted.push(mounted);
        }
        // After these, which may hold the root and the sources of mounts.
        let adapted = spec::adapt(&request.spec, &request.io, &self.cgroup.path(), &request.user)?;
        adapted.spec.save(self.directory.join("config.json")).step("write the bundle")?;
        let state_directory = self.directory.join("state");
        make_directory(&state_directory).step("make libcontainer's directory")?;
        spec::set_sysctls(&adapted.guest_sysctls)?;

        self.cgroup.create()?;
        self.cgroup.limit_depth()?;
        resources::apply(&self.cgroup, &adapted.resources)?;
        let rules = adapted.resources.devices().as_deref().unwrap_or_default();
        let device_policy = devices::apply(&self.cgroup, rules, None)?;
        {
            let mut state = self.lock();
            state.device_policy = device_policy;
            state.has_poststart = adapted.has_poststart;
            state.has_poststop = adapted.has_poststop;
        }
        self.watch_memory();

        let (streams, descriptors) = request.io.prepare(&containers.parking).await?;
        let helper_request = helper::Request::Create(helper::CreateRequest {
            container_id: self.id.clone(),
            bundle: self.directory.clone(),
            state: state_directory,
            terminal: request.io.terminal,
            window: adapted.window,
        });
        let birth = self.reaper.birth();
        let outcome = helper::run(helper_request, descriptors).await?;
        let pid = outcome.pid.ok_or_else(|| Error::failed("create the container", "there is no process"))?;
        let exit = self.reaper.watch(&birth, pid);
        let controls = streams.start(outcome.terminal)?;
        {
            let mut state = self.lock();
            state.phase = Phase::Created;
            state.processes.insert(INIT.into(), Process { pid, exit: watch::Sender::new(None), controls });
        }
        self.supervise(INIT.into(), exit);
        Ok(pid)
    }
}

/// Makes a directory that only root can look into: a specification can have secrets in its environment.
fn make_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}
