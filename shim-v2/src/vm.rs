//! The pod's VM: one task owns it, everybody else has a handle.
//!
//! ```text
//! boot ──▶ kept by the task ──stop, or its own end──▶ gone, with the reason
//! ```

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hull_protocol::agent::Storage;
use hull_sandbox::agent::{Agent, AgentError};
use hull_sandbox::config::SandboxConfig;
use hull_sandbox::disks::{Disks, GuestDevice, HostDevice};
use hull_sandbox::host::Host;
use hull_sandbox::network::Network;
use hull_sandbox::registry::Registry;
use hull_sandbox::root::Prepared;
use hull_sandbox::sandbox::{Configured, Running};
use hull_sandbox::share::Share;
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot, watch};

use crate::annotations::Size;
use crate::error::{Error, Result};

/// The VMM's end follows that of its connections at once, if that is what has happened.
const END_GRACE: Duration = Duration::from_secs(2);

type ShareJob = Box<dyn FnOnce(&Share) + Send>;

enum Job {
    /// Something to be done with the tree that the guest sees.
    Share(ShareJob),
    /// The end of the VM, `true` where the guest is asked to end.
    Stop { orderly: bool },
}

/// What a pod's guest is to be.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) hostname: String,
    /// By name with dots.
    pub(crate) sysctls: HashMap<String, String>,
    pub(crate) size: Size,
    /// The pod's on the host; without one the guest has no interface.
    pub(crate) network_namespace: Option<PathBuf>,
}

/// What a VM is to be.
pub(crate) struct Boot<'a> {
    pub(crate) host: Host,
    /// Among Hull's sandboxes.
    pub(crate) name: String,
    pub(crate) guest: &'a Guest,
    pub(crate) timeout: Duration,
}

/// A handle to the VM.
#[derive(Clone)]
pub(crate) struct Vm {
    agent: Agent,
    pid: u32,
    jobs: mpsc::Sender<Job>,
    disks: Arc<tokio::sync::Mutex<Disks>>,
    /// Why it is gone, once it is.
    end: watch::Receiver<Option<String>>,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").field("pid", &self.pid).finish_non_exhaustive()
    }
}

impl Vm {
    /// Boots a VM with the interfaces of a network namespace, and has `prepare` fill the tree meanwhile.
    ///
    /// # Errors
    ///
    /// Fails with whatever kept it from coming up; nothing is left behind then.
    pub(crate) async fn boot<T>(boot: Boot<'_>, prepare: impl FnOnce(&Share) -> Result<T>) -> Result<(Self, T)> {
        let Guest { hostname, sysctls, size, network_namespace } = boot.guest.clone();
        let network = network_namespace.map_or(Network::None, Network::Namespace);
        let config = SandboxConfig {
            id: boot.name,
            name: None,
            cpus: size.cpus,
            max_cpus: size.max_cpus,
            memory_mib: size.memory_mib,
            hostname,
            sysctls,
            kernel_params: size.kernel_params,
            network,
            boot_timeout: boot.timeout,
        };
        let booting = Configured::new(boot.host, config)?.start(std::future::pending()).await?;
        let prepared = match prepare(booting.share()) {
            Ok(prepared) => prepared,
            Err(error) => {
                booting.abandon().await;
                return Err(error);
            }
        };
        let running = booting.ready(std::future::pending()).await?;
        let (jobs, received) = mpsc::channel(8);
        let (end, ended) = watch::channel(None);
        let vm = Self {
            agent: running.agent().clone(),
            pid: running.vmm_pid().unwrap_or_default(),
            jobs,
            disks: Arc::new(tokio::sync::Mutex::new(running.disks().with_device_cache(size.block_cache))),
            end: ended,
        };
        tracing::info!(vmm = vm.pid, ready_us = running.ready_us(), "the guest's agent answers");
        tokio::spawn(keep(running, received, end));
        Ok((vm, prepared))
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The VMM's process: what stands on the host for all of the pod's processes.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether the end has come; its process's number may be another's then.
    pub(crate) fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Does something with the tree that the guest sees.
    ///
    /// # Errors
    ///
    /// Fails where the VM is gone.
    pub(crate) async fn with_share<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Share) -> T + Send + 'static,
    ) -> Result<T> {
        let (done, result) = oneshot::channel();
        let job: ShareJob = Box::new(move |share| drop(done.send(work(share))));
        if self.jobs.send(Job::Share(job)).await.is_err() {
            return Err(Error::Gone(self.reason()));
        }
        result.await.map_err(|_| Error::Gone(self.reason()))
    }

    /// Has block devices of the host in the guest for a container, and says which they are there.
    ///
    /// # Errors
    ///
    /// Fails with the first that cannot be had; nothing is left of the others then.
    pub(crate) async fn add_disks(
        &self,
        container: &str,
        devices: &[HostDevice],
    ) -> Result<Vec<(HostDevice, GuestDevice)>> {
        let mut disks = self.disks.lock().await;
        let mut added = Vec::new();
        for device in devices {
            match disks.add(&self.agent, container, *device).await {
                Ok(guest) => added.push((*device, guest)),
                Err(error) => {
                    disks.release(&self.agent, container).await;
                    return Err(error.into());
                }
            }
        }
        Ok(added)
    }

    /// Has the disks of a container's root in the guest, and says what is to be mounted there.
    ///
    /// # Errors
    ///
    /// Fails with the first that cannot be had; those before it are released with the container's others.
    pub(crate) async fn plug_root(&self, container: &str, root: &Prepared) -> Result<Vec<Storage>> {
        let mut disks = self.disks.lock().await;
        Ok(root.plug(&mut disks, &self.agent, container).await?)
    }

    /// What a container's block devices are in the guest.
    pub(crate) async fn disks_of(&self, container: &str) -> Vec<(HostDevice, GuestDevice)> {
        self.disks.lock().await.of(container)
    }

    /// Lets go of a container's disks.
    pub(crate) async fn release_disks(&self, container: &str) {
        self.disks.lock().await.release(&self.agent, container).await;
    }

    /// Ends the VM and waits until nothing is left of it.
    pub(crate) async fn stop(&self) {
        self.end(Job::Stop { orderly: true }).await;
    }

    /// Ends the VM, whose guest does not answer, and waits until nothing is left of it.
    pub(crate) async fn kill(&self) {
        self.end(Job::Stop { orderly: false }).await;
    }

    async fn end(&self, job: Job) {
        // Fails where it has ended already.
        let _ = self.jobs.send(job).await;
        self.ended().await;
    }

    /// Waits for the end and says why it came.
    pub(crate) async fn ended(&self) -> String {
        let mut end = self.end.clone();
        // Fails where the task is gone, and the VM with it.
        let _ = end.wait_for(Option::is_some).await;
        self.reason()
    }

    /// Whether the end has come, or comes within a moment: a guest that does not answer may be one that is gone.
    pub(crate) async fn is_gone(&self) -> bool {
        tokio::time::timeout(END_GRACE, self.ended()).await.is_ok()
    }

    /// Finds out whether a call failed because the VM is gone, which says more.
    pub(crate) async fn explain(&self, error: AgentError) -> Error {
        let broken = matches!(error, AgentError::Silent { .. } | AgentError::Connect(_) | AgentError::Io(_));
        if broken && self.is_gone().await { Error::Gone(self.reason()) } else { error.into() }
    }

    fn reason(&self) -> String {
        self.end.borrow().clone().unwrap_or_else(|| "it was stopped".to_owned())
    }
}

/// Owns the VM until its end.
async fn keep(mut running: Running, mut jobs: mpsc::Receiver<Job>, end: watch::Sender<Option<String>>) {
    let (reason, orderly) = loop {
        tokio::select! {
            biased;
            error = running.ended() => {
                tracing::error!("{error}");
                break (error.to_string(), true);
            }
            job = jobs.recv() => match job {
                Some(Job::Share(work)) => work(running.share()),
                Some(Job::Stop { orderly: false }) => break ("it did not answer and was killed".to_owned(), false),
                Some(Job::Stop { orderly: true }) | None => break ("it was stopped".to_owned(), true),
            },
        }
    };
    let ended = if orderly { running.stop().await } else { running.kill().await };
    let removed = match ended {
        Ok(claim) => claim.remove().map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    if let Err(error) = removed {
        tracing::error!("left behind: {error}");
    }
    end.send_replace(Some(reason));
}

/// The name of a pod among Hull's sandboxes. containerd's identifiers are unique only in their namespace, and can be longer
/// than a sandbox's name.
pub(crate) fn sandbox_name(namespace: &str, id: &str) -> String {
    let digest = Sha256::digest(format!("{namespace}/{id}"));
    let hex: String = digest.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    format!("pod-{hex}")
}

/// Removes what dead shims have left on the host.
///
/// # Errors
///
/// Fails where the state directory cannot be used.
pub(crate) fn sweep(host: &Host) -> Result<()> {
    let sandboxes = Registry::new(&host.state_dir, &host.data_dir);
    sandboxes.list().map(drop).map_err(|error| Error::Sandbox(error.into()))
}

/// Waits until the owner of a pod, if there is one, has let go of it.
///
/// # Errors
///
/// Fails where the state directory cannot be used.
pub(crate) fn wait_for_owner(host: &Host, name: &str) -> Result<()> {
    let sandboxes = Registry::new(&host.state_dir, std::path::Path::new(&host.data_dir));
    sandboxes.wait_for_owner(name).map_err(|error| Error::Sandbox(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_of_two_namespaces_have_two_names_fit_for_a_directory() {
        let (a, b) = (sandbox_name("default", "x"), sandbox_name("k8s.io", "x"));
        assert_ne!(a, b);
        assert!(hull_sandbox::config::check_name(&sandbox_name("n", &"i".repeat(76))).is_ok());
    }
}
