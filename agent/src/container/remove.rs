//! Forgets what has ended: a process, or a whole container.

use std::fs;
use std::io;

use super::{Container, Containers, INIT, Phase};
use crate::error::{Error, Result, Step};
use crate::helper::HookKind;

impl Containers {
    /// Removes a process, or with [`INIT`] the container, of which none may be left.
    pub(crate) async fn remove(&self, id: &str, exec_id: &str) -> Result<()> {
        let container = self.get(id)?;
        if exec_id != INIT {
            return container.remove_exec(exec_id);
        }
        let _operation = container.operation.lock().await;
        // Another removal may have been first.
        if !self.lock().contains_key(id) {
            return Err(Error::NotFound(format!("container {id}")));
        }
        {
            let state = container.lock();
            state.require("remove", &[Phase::Stopped])?;
            if state.others_run() || state.held_exit.is_some() {
                return Err(Error::State("cannot remove: the container has processes".into()));
            }
        }
        container.tear_down().await?;
        self.lock().remove(id);
        Ok(())
    }
}

impl Container {
    fn remove_exec(&self, exec_id: &str) -> Result<()> {
        let mut state = self.lock();
        if state.process(&self.id, exec_id)?.exit.borrow().is_none() {
            return Err(Error::State("cannot remove: the process has not ended".into()));
        }
        state.processes.remove(exec_id);
        Ok(())
    }

    /// Takes back everything that creating has made, as far as it got. Can be called again where it failed.
    pub(super) async fn tear_down(&self) -> Result<()> {
        if self.cgroup.directory().exists() {
            self.cgroup.kill()?;
            self.cgroup.wait_empty().await?;
        }
        if let Some(watch) = self.lock().oom_watch.take() {
            watch.abort();
        }
        let run_poststop = std::mem::take(&mut self.lock().has_poststop);
        self.cgroup.remove()?;
        if run_poststop && let Err(error) = self.run_hooks(HookKind::Poststop).await {
            // As the specification wants it: logged, and the removal goes on.
            tracing::warn!("container {}: {error}", self.id);
        }
        self.unmount().await?;
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.step("remove the container's directory"),
        }
    }

    /// Takes back what has been mounted for it, last first.
    pub(super) async fn unmount(&self) -> Result<()> {
        loop {
            let Some(mounted) = self.lock().mounted.pop() else { return Ok(()) };
            if let Err((mounted, error)) = mounted.unmount().await {
                self.lock().mounted.push(mounted);
                return Err(error);
            }
        }
    }
}
