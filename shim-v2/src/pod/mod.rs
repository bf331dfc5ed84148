//! A pod: its VM, its containers and their processes. One value owns all of it, and every service is a translator to it.
//!
//! Lock order: `lifecycle`, which is held across the coming and going of the VM and of containers, then a process's
//! `telling`, then `cpus_online`, then `state`, which is never held across an await.

mod cpus;
mod create;
mod delete;
mod memory;
mod operate;
mod sandbox;
mod start;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::events::task::TaskOOM;
use containerd_shim_protos::topics;
use hull_protocol::agent::event::What;
use hull_sandbox::cgroup::Cgroup;
use hull_sandbox::host::Host;
use hull_settings::Settings;
use tokio::sync::watch;

pub(crate) use self::create::Create;
pub(crate) use self::sandbox::CreateSandbox;
use self::sandbox::Sandbox;

use crate::annotations::Size;
use crate::error::{Error, Result};
use crate::events::Publisher;
use crate::launch;
use crate::live::Followers;
use crate::memory::MemoryVolumes;
use crate::process::{Exit, Phase, Process};
use crate::streams::Streaming;
use crate::vm::Vm;

/// How long containerd may take to accept the last events.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The guest's events are asked for at most this often.
const EVENT_INTERVAL: Duration = Duration::from_millis(100);

/// A pod, from the shim's start to its end.
#[derive(Debug)]
pub(crate) struct Pod {
    id: String,
    namespace: String,
    host: Host,
    settings: Settings,
    publisher: Publisher,
    memory_volumes: Arc<MemoryVolumes>,
    streaming: Arc<Streaming>,
    lifecycle: tokio::sync::Mutex<()>,
    /// How many CPUs the guest has been told to have online, once it has been told.
    cpus_online: tokio::sync::Mutex<Option<u8>>,
    state: Mutex<State>,
    finished: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    vm: Option<Vm>,
    size: Option<Size>,
    containers: HashMap<String, Container>,
    /// Where the pod came by the sandbox service rather than as a container of its own.
    sandbox: Option<Sandbox>,
    /// What the pod is accounted to on the host.
    cgroup: Option<Cgroup>,
    /// The pod's network namespace on the host.
    network_namespace: Option<PathBuf>,
    /// The shim is about to end.
    is_closed: bool,
}

#[derive(Debug)]
struct Container {
    bundle: String,
    init: Arc<Process>,
    cpu_limit: cpus::Limit,
    memory_limit: memory::Limit,
    /// How readily the kernel ends it where memory is short, as the kubelet ranks it.
    oom_score_adj: Option<i32>,
    /// Whether its processes are in a namespace of its own.
    owns_processes: bool,
    /// Keeps its volumes up to date, until it is dropped.
    _followers: Followers,
    execs: HashMap<String, Arc<Process>>,
}

impl Drop for Container {
    /// Ends what has not been started and now never will be: somebody may wait for it.
    fn drop(&mut self) {
        for exec in self.execs.values().filter(|exec| exec.phase() == Phase::Created) {
            exec.set_phase(Phase::Stopped(Exit::killed()));
        }
    }
}

impl Pod {
    pub(crate) fn new(id: &str, namespace: &str, host: Host, settings: Settings, publisher: Publisher) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_owned(),
            namespace: namespace.to_owned(),
            host,
            settings,
            publisher,
            memory_volumes: Arc::default(),
            streaming: Arc::default(),
            lifecycle: tokio::sync::Mutex::default(),
            cpus_online: tokio::sync::Mutex::default(),
            state: Mutex::default(),
            finished: watch::Sender::new(false),
        })
    }

    /// What containerd opens its ends of standard streams with.
    pub(crate) fn streaming(&self) -> &Arc<Streaming> {
        &self.streaming
    }

    /// Waits until the pod is to be forgotten.
    pub(crate) async fn finished(&self) {
        // The sender is this pod's own, so this does not fail.
        let _ = self.finished.subscribe().wait_for(|finished| *finished).await;
    }

    /// Ends the shim, unless there are containers or a sandbox left. Nothing can be created in it from then on.
    pub(crate) async fn shutdown(self: &Arc<Self>) {
        let _lifecycle = self.lifecycle.lock().await;
        if !self.lock().close() {
            return;
        }
        self.stop_vm().await;
        let pod = self.clone();
        // After the answer to this request, which is not to wait for the events.
        tokio::spawn(async move {
            pod.publisher.flush(FLUSH_TIMEOUT).await;
            pod.finished.send_replace(true);
        });
    }

    /// Ends the VM, if there is one, and everything in it.
    async fn stop_vm(&self) {
        let vm = self.lock().vm.clone();
        if let Some(vm) = vm {
            vm.stop().await;
        }
        let cgroup = self.lock().cgroup.take();
        if let Some(cgroup) = cgroup {
            cgroup.leave();
        }
    }

    /// The process that stands on the host for those of the pod; 0 without a VM.
    pub(crate) fn pid(&self) -> u32 {
        self.lock().vm.as_ref().map_or(0, Vm::pid)
    }

    fn vm(&self) -> Result<Vm> {
        self.lock().vm.clone().ok_or_else(|| Error::State(format!("the pod {} has no virtual machine", self.id)))
    }

    /// A container's first process, or another.
    pub(crate) fn process(&self, container_id: &str, exec_id: &str) -> Result<Arc<Process>> {
        let state = self.lock();
        let container = state.container(container_id)?;
        if exec_id.is_empty() {
            return Ok(container.init.clone());
        }
        let unknown = || Error::NotFound(format!("container {container_id} has no process {exec_id}"));
        container.execs.get(exec_id).cloned().ok_or_else(unknown)
    }

    /// Where a container's files are.
    pub(crate) fn bundle(&self, container_id: &str) -> Result<String> {
        Ok(self.lock().container(container_id)?.bundle.clone())
    }

    /// Passes on what the guest tells unasked, until its end.
    async fn follow_events(self: Arc<Self>, vm: Vm) {
        let mut seen = 0;
        while let Ok(response) = vm.agent().next_events(seen).await {
            let mut short_of_memory = BTreeSet::new();
            for event in response.events {
                if event.number <= seen {
                    tracing::warn!("the guest tells the same again, and is not listened to any more");
                    return;
                }
                seen = event.number;
                if matches!(event.what, Some(What::Oom(_))) {
                    short_of_memory.insert(event.container_id);
                }
            }
            for container_id in short_of_memory {
                // Not a name that the guest made up.
                if let Ok(process) = self.process(&container_id, "") {
                    self.tell_oom(&process);
                }
            }
            // A guest that tells without end is not to keep the host busy.
            tokio::time::sleep(EVENT_INTERVAL).await;
        }
    }

    /// Tells that a container ran out of memory.
    fn tell_oom(&self, process: &Process) {
        process.told_oom.store(true, Ordering::Relaxed);
        let event = TaskOOM { container_id: process.container_id.clone(), ..Default::default() };
        self.publisher.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
    }

    /// Puts the shim, and with it the VMM that it will start, where the pod is accounted to. `delete` finds it there should the shim die.
    fn join_cgroup(&self, path: Option<&str>) -> Result<()> {
        let Some(path) = path.filter(|path| !path.is_empty()) else { return Ok(()) };
        let cgroup = Cgroup::at(path)?;
        // The shim is in the bundle of what it was started for.
        std::fs::write(launch::CGROUP_FILE, path)
            .map_err(Error::host(format!("cannot write {}", launch::CGROUP_FILE)))?;
        cgroup.join()?;
        self.lock().cgroup = Some(cgroup);
        Ok(())
    }

    /// Whether the host has killed the VMM for want of memory.
    fn vmm_ran_out_of_memory(&self) -> bool {
        self.lock().cgroup.as_ref().is_some_and(Cgroup::has_oom_killed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn container(&self, id: &str) -> Result<&Container> {
        self.containers.get(id).ok_or_else(|| Error::NotFound(format!("there is no container {id}")))
    }

    /// Whether somebody still relies on the shim.
    fn is_in_use(&self) -> bool {
        !self.containers.is_empty() || self.sandbox.is_some()
    }

    /// Lets nothing more be created, unless somebody still relies on the shim; returns whether it was this call that did.
    fn close(&mut self) -> bool {
        let closes = !self.is_in_use() && !self.is_closed;
        self.is_closed |= closes;
        closes
    }

    /// # Errors
    ///
    /// Fails once the shim is about to end.
    fn check_open(&self) -> Result<()> {
        if self.is_closed {
            return Err(Error::State(
                "the pod's shim is about to end, as nothing was left in it; start another".into(),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::time::SystemTime;

    use super::*;
    use crate::process::Body;
    use crate::streams::Stdio;

    const EXIT: Exit = Exit { code: 3, at: SystemTime::UNIX_EPOCH };

    /// A pod without a VM; its one container, and an exec of that which has not been started.
    fn pod() -> (Arc<Pod>, Arc<Process>, Arc<Process>) {
        let publisher = Publisher::start("/nobody/listens/here", "tests");
        let pod = Pod::new("p", "tests", Host::discover().unwrap(), Settings::default(), publisher);
        let init = Arc::new(Process::new("c", "", Stdio::default(), Body::Nothing));
        let exec = Arc::new(Process::new("c", "e", Stdio::default(), Body::Planned(Box::default())));
        let container = Container {
            bundle: String::new(),
            init: init.clone(),
            cpu_limit: None,
            memory_limit: None,
            oom_score_adj: None,
            owns_processes: true,
            _followers: Followers::default(),
            execs: HashMap::from([("e".to_owned(), exec.clone())]),
        };
        pod.lock().containers.insert("c".into(), container);
        (pod, init, exec)
    }

    #[tokio::test]
    async fn a_containers_end_is_told_after_the_start_of_an_exec_that_is_under_way() {
        let (pod, init, exec) = pod();
        let telling = exec.telling.lock().await;
        let mut ended = pin!(pod.ended(&init, EXIT));
        tokio::select! {
            biased;
            () = &mut ended => panic!("it was told before"),
            () = std::future::ready(()) => assert_eq!(init.exit(), None),
        }
        drop(telling);
        ended.await;
        assert_eq!(init.exit(), Some(EXIT));
    }

    #[tokio::test]
    async fn a_pause_is_told_when_nobody_else_tells_of_the_container() {
        let (pod, init, _) = pod();
        let telling = init.telling.lock().await;
        let mut paused = pin!(pod.set_paused("c", true));
        tokio::select! {
            biased;
            paused = &mut paused => panic!("it was not waited: {paused:?}"),
            () = std::future::ready(()) => {}
        }
        drop(telling);
        // There is nothing in this one to pause.
        paused.await.unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    async fn an_exec_that_was_never_started_ends_with_its_container() {
        let (pod, _, exec) = pod();
        let ended = tokio::time::timeout(Duration::from_secs(60), exec.wait());
        let (ended, deleted) = tokio::join!(ended, pod.delete("c", ""));
        deleted.unwrap();
        assert_eq!(ended.unwrap().code, 137);
    }
}
