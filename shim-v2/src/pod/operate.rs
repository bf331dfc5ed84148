//! What can be done with containers and processes while they are there.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::events::task::{TaskExecAdded, TaskPaused, TaskResumed};
use containerd_shim_protos::topics;
use hull_protocol::agent::ContainerStatsResponse;
use hull_sandbox::agent::AgentError;
use oci_spec::runtime::LinuxResources;

use super::{Pod, cpus, memory};
use crate::error::{Error, Result};
use crate::process::{Body, Exit, Phase, Process, SIGINT, SIGKILL, SIGTERM};
use crate::streams::Stdio;
use crate::{spec, stats};

/// Most processes of a container that are listed: a guest could claim any number.
const MAX_LISTED: usize = 4096;

/// A process of a container.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) pid: u32,
    /// The exec that started it, if one did.
    pub(crate) exec_id: String,
}

impl Pod {
    /// Registers another process of a container, to be started.
    ///
    /// # Errors
    ///
    /// Fails where the identifier is taken or the specification broken.
    pub(crate) fn exec(&self, container_id: &str, exec_id: &str, stdio: Stdio, json: &[u8]) -> Result<()> {
        if exec_id.is_empty() {
            return Err(Error::Invalid("the process has no identifier".into()));
        }
        let mut plan: oci_spec::runtime::Process = serde_json::from_slice(json)
            .map_err(|error| Error::Invalid(format!("the process's specification is broken: {error}")))?;
        spec::drop_labels(&mut plan);
        let process = Process::new(container_id, exec_id, stdio, Body::Planned(Box::new(plan)));
        {
            let mut state = self.lock();
            let init = &state.container(container_id)?.init;
            if init.is_virtual() {
                return Err(Error::State(format!("the {} is the pod's own and runs nothing", init.name())));
            }
            if let Phase::Stopped(_) = init.phase() {
                return Err(Error::State(format!("the {} has stopped", init.name())));
            }
            let container = state.containers.get_mut(container_id);
            let execs = container.map(|container| &mut container.execs);
            match execs.map(|execs| execs.entry(exec_id.to_owned())) {
                Some(std::collections::hash_map::Entry::Vacant(place)) => drop(place.insert(Arc::new(process))),
                _ => return Err(Error::Exists(format!("there is a {} already", process.name()))),
            }
        }
        let event =
            TaskExecAdded { container_id: container_id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.publisher.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    /// Sends a signal. SIGKILL to a container of a guest that does not answer ends the VM.
    ///
    /// # Errors
    ///
    /// Fails with "not found" where the process has ended.
    pub(crate) async fn kill(
        self: &Arc<Self>,
        container_id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<()> {
        let process = self.process(container_id, exec_id)?;
        let finished = || Error::NotFound(format!("the {} has ended", process.name()));
        if process.exit().is_some() {
            return Err(finished());
        }
        if process.is_virtual() {
            self.kill_pod(&process, signal);
            return Ok(());
        }
        let guest = process.guest()?;
        match guest.signal(signal, all && exec_id.is_empty()).await {
            Ok(()) => Ok(()),
            Err(error) if error.is_not_found() => Err(finished()),
            Err(error) => match self.vm()?.explain(error).await {
                Error::Gone(_) => Err(finished()),
                // Nothing in it can be told apart any more, and who kills must get there.
                error @ Error::Agent(AgentError::Silent { .. }) if signal == SIGKILL && exec_id.is_empty() => {
                    tracing::error!("the {} is killed with its virtual machine: {error}", process.name());
                    self.vm()?.kill().await;
                    Ok(())
                }
                error => Err(error),
            },
        }
    }

    /// Ends the pod's own container as the pause program would end, and the VM with it.
    fn kill_pod(self: &Arc<Self>, process: &Process, signal: u32) {
        let code = match signal {
            SIGKILL => 128 + SIGKILL,
            SIGTERM | SIGINT => 0,
            // The pause program has no use for any other.
            _ => return,
        };
        process.set_phase(Phase::Stopped(Exit { code, at: std::time::SystemTime::now() }));
        let pod = self.clone();
        // A stopped pod is to cost nothing, however long it takes until it is removed.
        tokio::spawn(async move {
            let _lifecycle = pod.lifecycle.lock().await;
            pod.stop_vm().await;
        });
    }

    /// Freezes a container's processes, or thaws them.
    ///
    /// # Errors
    ///
    /// Fails where the container does not run.
    pub(crate) async fn set_paused(&self, container_id: &str, paused: bool) -> Result<()> {
        let process = self.process(container_id, "")?;
        // Held over the call: an end that comes meanwhile is told after it, and after one that has been told the guest refuses.
        let _telling = process.telling.lock().await;
        if let Err(error) = process.guest()?.set_paused(paused).await {
            return Err(self.vm()?.explain(error).await);
        }
        let container_id = container_id.to_owned();
        if paused {
            process.set_phase(Phase::Paused);
            let event = TaskPaused { container_id, ..Default::default() };
            self.publisher.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        } else {
            process.set_phase(Phase::Running);
            let event = TaskResumed { container_id, ..Default::default() };
            self.publisher.publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        }
        Ok(())
    }

    /// Tells a terminal its window's size.
    ///
    /// # Errors
    ///
    /// Fails where there is no terminal.
    pub(crate) async fn resize(&self, container_id: &str, exec_id: &str, columns: u32, rows: u32) -> Result<()> {
        let side = |side: u32| u16::try_from(side).map_err(|_| Error::Invalid(format!("{side} is too large a side")));
        let (columns, rows) = (side(columns)?, side(rows)?);
        let process = self.process(container_id, exec_id)?;
        match process.guest()?.resize(columns, rows).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.vm()?.explain(error).await),
        }
    }

    /// Ends a process's input, once its clients have closed it too; of one that has not been started, from its start.
    ///
    /// # Errors
    ///
    /// Fails where there is no such process.
    pub(crate) fn close_input(&self, container_id: &str, exec_id: &str) -> Result<()> {
        self.process(container_id, exec_id)?.close_input();
        Ok(())
    }

    /// Changes a container's limits, given as `linux.resources` of an OCI specification.
    ///
    /// # Errors
    ///
    /// Fails where the guest's kernel refuses a limit, or the machine has less memory.
    pub(crate) async fn update(&self, container_id: &str, json: &[u8]) -> Result<()> {
        let mut resources: LinuxResources = serde_json::from_slice(json)
            .map_err(|error| Error::Invalid(format!("the resources are broken: {error}")))?;
        spec::fit(&mut resources);
        let process = self.process(container_id, "")?;
        if process.is_virtual() {
            return Ok(());
        }
        let vm = self.vm()?;
        let memory_limit = memory::limit(&resources);
        if let Some(after) = memory_limit {
            self.check_memory(container_id, after)?;
        }
        if let Some(rules) = resources.devices_mut() {
            spec::renumber_rules(rules, &vm.disks_of(container_id).await);
        }
        if let Err(error) = process.guest()?.update(&resources).await {
            return Err(vm.explain(error).await);
        }
        if let Some(container) = self.lock().containers.get_mut(container_id) {
            container.cpu_limit = cpus::limit(&resources).unwrap_or(container.cpu_limit);
            container.memory_limit = memory_limit.unwrap_or(container.memory_limit);
        }
        self.fit_cpus(true).await
    }

    /// What a container uses; of the pod's own, nothing.
    ///
    /// # Errors
    ///
    /// Fails where the guest does not answer.
    pub(crate) async fn stats(&self, container_id: &str) -> Result<Metrics> {
        let process = self.process(container_id, "")?;
        if process.is_virtual() {
            return Ok(stats::metrics(&ContainerStatsResponse::default()));
        }
        match process.guest()?.stats().await {
            Ok(answer) => Ok(stats::metrics(&answer)),
            Err(error) => match self.vm()?.explain(error).await {
                // What it used went with the guest. Whether memory ran out is known, and that is what is asked for after an end.
                Error::Gone(_) if process.exit().is_some() => Ok(stats::last(process.told_oom.load(Ordering::Relaxed))),
                error => Err(error),
            },
        }
    }

    /// A container's processes, numbered as in the guest. It is never empty: containerd takes a container without processes
    /// for one that is gone.
    ///
    /// # Errors
    ///
    /// Fails where the guest does not answer.
    pub(crate) async fn pids(&self, container_id: &str) -> Result<Vec<Listed>> {
        let process = self.process(container_id, "")?;
        let mut listed = Vec::new();
        if !process.is_virtual() && process.exit().is_none() {
            let pids = match process.guest()?.pids().await {
                Ok(answer) => answer.pids,
                Err(error) => return Err(self.vm()?.explain(error).await),
            };
            listed.extend(pids.into_iter().take(MAX_LISTED).map(|pid| Listed { pid: pid.pid, exec_id: pid.exec_id }));
        }
        if listed.is_empty() {
            listed.push(Listed { pid: self.pid(), exec_id: String::new() });
        }
        Ok(listed)
    }
}
