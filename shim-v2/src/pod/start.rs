//! Starts processes, and tells of their ends.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::events::task::{TaskExecStarted, TaskExit, TaskStart};
use containerd_shim_protos::topics;
use hull_sandbox::agent::AgentError;
use hull_sandbox::container::{Connections, Process as GuestProcess};
use protobuf::MessageField;

use super::Pod;
use crate::error::{Error, Result};
use crate::events::timestamp;
use crate::process::{Exit, Phase, Process, SIGKILL};
use crate::streams::{Ends, Pumps};

/// How long a process that has been killed may take to end, in a guest that may be hostile.
const UNDO_TIMEOUT: Duration = Duration::from_secs(30);

impl Pod {
    /// Starts a container's first process, or another that has been registered.
    ///
    /// # Errors
    ///
    /// Fails where it has been started before or its container has ended.
    pub(crate) async fn start(self: &Arc<Self>, container_id: &str, exec_id: &str) -> Result<u32> {
        let process = self.process(container_id, exec_id)?;
        // Until the start has been told nobody tells of the end.
        let _telling = process.telling.lock().await;
        if process.phase() != Phase::Created {
            return Err(Error::State(format!("the {} has been started already", process.name())));
        }
        let pid = self.pid();
        if exec_id.is_empty() {
            self.start_first(&process).await?;
            let event = TaskStart { container_id: container_id.to_owned(), pid, ..Default::default() };
            self.publisher.publish(topics::TASK_START_EVENT_TOPIC, &event);
        } else {
            self.start_exec(&process).await?;
            let event = TaskExecStarted {
                container_id: container_id.to_owned(),
                exec_id: exec_id.to_owned(),
                pid,
                ..Default::default()
            };
            self.publisher.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
            self.watch(process.clone());
        }
        Ok(pid)
    }

    async fn start_first(&self, process: &Process) -> Result<()> {
        let vm = self.vm()?;
        if !process.is_virtual()
            && let Err(error) = process.guest()?.start().await
        {
            return Err(vm.explain(error).await);
        }
        process.set_phase(Phase::Running);
        Ok(())
    }

    async fn start_exec(&self, process: &Process) -> Result<()> {
        let vm = self.vm()?;
        let init = self.process(&process.container_id, "")?;
        if init.phase() != Phase::Running {
            return Err(Error::State(format!("the {} does not run", init.name())));
        }
        let plan = process.plan().ok_or_else(|| Error::State(format!("the {} was started", process.name())))?;
        let ends = process.stdio.open(&self.namespace, &process.container_id, &self.streaming).await?;
        let streams = process.stdio.streams();
        let (container_id, exec_id) = (&process.container_id, &process.exec_id);
        let started = GuestProcess::exec(vm.agent(), container_id, exec_id, &plan, streams, "").await;
        let (guest, connections) = match started {
            Ok(started) => started,
            Err(error) => return Err(vm.explain(error).await),
        };
        let pumps = carry(&guest, connections, ends, process.stdio.terminal).await?;
        process.set_guest(guest, pumps);
        process.set_phase(Phase::Running);
        Ok(())
    }

    /// Notes a process's end and tells of it; a container's first process is the last to be told of.
    pub(super) async fn ended(&self, process: &Process, exit: Exit) {
        if process.exec_id.is_empty() {
            let execs: Vec<_> = match self.lock().containers.get(&process.container_id) {
                Some(container) => container.execs.values().cloned().collect(),
                None => Vec::new(),
            };
            for exec in execs {
                // One that is being started may have an end too.
                drop(exec.telling.lock().await);
                // One that was never started has none to wait for.
                if exec.guest().is_ok() {
                    exec.wait().await;
                    // Until it has been told.
                    drop(exec.telling.lock().await);
                }
            }
        }
        let _telling = process.telling.lock().await;
        process.set_phase(Phase::Stopped(exit));
        let id = if process.exec_id.is_empty() { &process.container_id } else { &process.exec_id };
        self.publisher.publish(
            topics::TASK_EXIT_EVENT_TOPIC,
            &TaskExit {
                container_id: process.container_id.clone(),
                id: id.clone(),
                pid: self.pid(),
                exit_status: exit.code,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            },
        );
    }
}

/// Carries the streams of a process that the guest has just made, which is undone where that fails.
pub(super) async fn carry(guest: &GuestProcess, connections: Connections, ends: Ends, terminal: bool) -> Result<Pumps> {
    match Pumps::start(connections, ends, terminal) {
        Ok(pumps) => Ok(pumps),
        Err(error) => {
            if let Err(error) = undo(guest).await {
                tracing::error!("left behind in the guest: {error}");
            }
            Err(Error::host("cannot carry streams")(error))
        }
    }
}

/// Ends a process of the guest's and has the guest forget it.
async fn undo(guest: &GuestProcess) -> std::result::Result<(), AgentError> {
    match guest.signal(SIGKILL, false).await {
        Err(error) if !error.is_not_found() => return Err(error),
        _ => {}
    }
    // The guest refuses to forget one that has not ended by then.
    if let Ok(ended) = tokio::time::timeout(UNDO_TIMEOUT, guest.wait()).await {
        ended?;
    }
    guest.remove().await
}
