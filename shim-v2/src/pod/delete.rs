//! Forgets processes and containers that have ended.

use std::sync::Arc;

use containerd_shim_protos::events::task::TaskDelete;
use containerd_shim_protos::topics;
use protobuf::MessageField;

use super::Pod;
use crate::error::{Error, Result};
use crate::events::timestamp;
use crate::process::{Exit, Phase, Process, SIGKILL};

impl Pod {
    /// Forgets a process, or a container, and says how it ended. With the last container the VM ends.
    ///
    /// # Errors
    ///
    /// Fails where it runs.
    pub(crate) async fn delete(self: &Arc<Self>, container_id: &str, exec_id: &str) -> Result<(u32, Exit)> {
        let process = self.process(container_id, exec_id)?;
        match process.phase() {
            Phase::Running | Phase::Paused => {
                return Err(Error::State(format!("the {} runs; kill it first", process.name())));
            }
            Phase::Created => self.end_before_start(&process).await?,
            Phase::Stopped(_) => {}
        }
        let exit = process.exit().unwrap_or_else(Exit::killed);
        process.finish_streams().await;
        let pid = self.pid();
        if !exec_id.is_empty() {
            if let Ok(guest) = process.guest() {
                self.forget(&process, guest.remove().await).await?;
            }
            if let Some(container) = self.lock().containers.get_mut(container_id) {
                container.execs.remove(exec_id);
            }
            return Ok((pid, exit));
        }
        let _lifecycle = self.lifecycle.lock().await;
        self.remove_container(&process).await?;
        self.publisher.publish(
            topics::TASK_DELETE_EVENT_TOPIC,
            &TaskDelete {
                container_id: container_id.to_owned(),
                pid,
                exit_status: exit.code,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            },
        );
        let is_in_use = {
            let mut state = self.lock();
            state.containers.remove(container_id);
            state.is_in_use()
        };
        self.rank_for_oom();
        if !is_in_use {
            self.stop_vm().await;
        }
        Ok((pid, exit))
    }

    async fn remove_container(&self, process: &Process) -> Result<()> {
        let (Ok(guest), Ok(vm)) = (process.guest(), self.vm()) else { return Ok(()) };
        self.forget(process, guest.remove().await).await?;
        vm.release_disks(&process.container_id).await;
        let id = process.container_id.clone();
        match vm.with_share(move |share| share.remove_container(&id)).await {
            Ok(removed) => Ok(removed?),
            // All of the tree went with the VM.
            Err(_) => Ok(()),
        }
    }

    /// Takes the guest's answer to a removal; what is gone already is removed.
    async fn forget(&self, process: &Process, answer: Result<(), hull_sandbox::agent::AgentError>) -> Result<()> {
        match answer {
            Ok(()) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => match self.vm()?.explain(error).await {
                Error::Gone(reason) => {
                    tracing::debug!("the {} went with its virtual machine: {reason}", process.name());
                    Ok(())
                }
                error => Err(error),
            },
        }
    }

    /// Ends a process that was created but never started.
    async fn end_before_start(&self, process: &Process) -> Result<()> {
        let Ok(guest) = process.guest() else {
            process.set_phase(Phase::Stopped(Exit::killed()));
            return Ok(());
        };
        match guest.signal(SIGKILL, false).await {
            Err(error) if !error.is_not_found() => match self.vm()?.explain(error).await {
                Error::Gone(_) => {}
                error => return Err(error),
            },
            _ => {}
        }
        process.wait().await;
        Ok(())
    }
}
