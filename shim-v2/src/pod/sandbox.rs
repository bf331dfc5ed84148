//! The pod as a sandbox of its own: it is there before any container and stays until it is told to go.
//!
//! ```text
//! create ──▶ Created ──start──▶ Ready ──stop, or the VM's end──▶ Stopped ──shutdown──▶ gone
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use hull_settings::Settings;
use protobuf::Message;
use tokio::sync::watch;

use super::Pod;
use crate::annotations::{self, Limits};
use crate::error::{Error, Result};
use crate::generated::cri::{DNSConfig, NamespaceMode, PodSandboxConfig};
use crate::process::Exit;
use crate::spec::{self, PodFile};
use crate::stats;
use crate::vm::Guest;

const NODES_RESOLV_CONF: &str = "/etc/resolv.conf";
const NODES_HOSTS: &str = "/etc/hosts";
/// What containerd sets for every pod of which it makes the specification itself: low ports and ping are for every user.
const SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];

/// A sandbox to be created.
#[derive(Debug, Default)]
pub(crate) struct CreateSandbox {
    pub(crate) id: String,
    /// CRI's PodSandboxConfig; may be empty.
    pub(crate) config: Vec<u8>,
    pub(crate) network_namespace: String,
    /// Usually none; then those of the configuration count.
    pub(crate) annotations: HashMap<String, String>,
}

/// A sandbox that has been created.
#[derive(Debug)]
pub(super) struct Sandbox {
    guest: Guest,
    /// As an OCI specification has it.
    cgroup: String,
    /// Of its containers, unless they bring their own. containerd makes them for its own sandboxer only.
    files: Vec<PodFile>,
    /// Whether its containers see each other's processes.
    shares_processes: bool,
    created_at: SystemTime,
    phase: watch::Sender<Phase>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Created,
    Ready,
    Stopped(Exit),
}

/// What is told of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) pid: u32,
    pub(crate) is_ready: bool,
    pub(crate) created_at: SystemTime,
    /// How it ended, once it has.
    pub(crate) exit: Option<Exit>,
}

impl Pod {
    /// Notes what the sandbox is to be.
    ///
    /// # Errors
    ///
    /// Fails where it has been created before or cannot be as asked.
    pub(crate) fn create_sandbox(&self, request: CreateSandbox) -> Result<()> {
        self.check_sandbox_id(&request.id)?;
        let sandbox = Sandbox::new(request, &self.namespace, &self.settings)?;
        let mut state = self.lock();
        state.check_open()?;
        if state.sandbox.is_some() || state.vm.is_some() {
            return Err(Error::Exists(format!("there is a sandbox {} already", self.id)));
        }
        state.sandbox = Some(sandbox);
        Ok(())
    }

    /// Boots the sandbox's VM.
    ///
    /// # Errors
    ///
    /// Fails where it has been started before or does not come up.
    pub(crate) async fn start_sandbox(self: &Arc<Self>, id: &str) -> Result<Status> {
        self.check_sandbox_id(id)?;
        let _lifecycle = self.lifecycle.lock().await;
        let wish = self.with_sandbox(|sandbox| match *sandbox.phase.borrow() {
            Phase::Created => Ok((sandbox.guest.clone(), sandbox.cgroup.clone())),
            _ => Err(Error::State(format!("the sandbox {id} has been started already"))),
        })?;
        let (guest, cgroup) = wish?;
        self.join_cgroup(Some(&cgroup))?;
        let booted = self.boot(&guest, |_| Ok(())).await;
        if booted.is_err() {
            self.stop_vm().await;
        }
        let (vm, ()) = booted?;
        self.adopt(vm.clone(), guest);
        self.with_sandbox(|sandbox| sandbox.phase.send_replace(Phase::Ready))?;
        let pod = self.clone();
        tokio::spawn(async move {
            vm.ended().await;
            // Fails where the sandbox has been shut down, and nobody asks any more.
            let _ = pod.with_sandbox(|sandbox| sandbox.end(Exit::killed()));
        });
        self.sandbox_status(id)
    }

    /// Ends the VM and all in it; a sandbox that has ended stays so.
    ///
    /// # Errors
    ///
    /// Fails where there is no such sandbox.
    pub(crate) async fn stop_sandbox(&self, id: &str) -> Result<()> {
        self.check_sandbox_id(id)?;
        let _lifecycle = self.lifecycle.lock().await;
        // Noted first, so that the VM's end is not taken for an accident.
        self.with_sandbox(|sandbox| sandbox.end(Exit { code: 0, at: SystemTime::now() }))?;
        self.stop_vm().await;
        Ok(())
    }

    /// Waits until the sandbox has ended.
    ///
    /// # Errors
    ///
    /// Fails where there is no such sandbox.
    pub(crate) async fn wait_sandbox(&self, id: &str) -> Result<Exit> {
        self.check_sandbox_id(id)?;
        let mut phases = self.with_sandbox(|sandbox| sandbox.phase.subscribe())?;
        loop {
            if let Phase::Stopped(exit) = *phases.borrow_and_update() {
                return Ok(exit);
            }
            if phases.changed().await.is_err() {
                // Shut down without having been stopped.
                return Ok(Exit::killed());
            }
        }
    }

    /// How the sandbox is.
    ///
    /// # Errors
    ///
    /// Fails where there is no such sandbox.
    pub(crate) fn sandbox_status(&self, id: &str) -> Result<Status> {
        self.check_sandbox_id(id)?;
        let pid = self.pid();
        self.with_sandbox(|sandbox| {
            let phase = *sandbox.phase.borrow();
            let exit = if let Phase::Stopped(exit) = phase { Some(exit) } else { None };
            Status { pid, is_ready: phase == Phase::Ready, created_at: sandbox.created_at, exit }
        })
    }

    /// Forgets the sandbox, and ends the shim.
    ///
    /// # Errors
    ///
    /// Fails where the identifier is another pod's.
    pub(crate) async fn shutdown_sandbox(self: &Arc<Self>, id: &str) -> Result<()> {
        self.check_sandbox_id(id)?;
        {
            let _lifecycle = self.lifecycle.lock().await;
            self.stop_vm().await;
            let mut state = self.lock();
            state.sandbox = None;
            state.containers.clear();
        }
        self.shutdown().await;
        Ok(())
    }

    /// What the guest uses: memory as a whole, with its kernel's; the rest is that of its containers, those that are gone included, so that
    /// no counter ever falls.
    ///
    /// # Errors
    ///
    /// Fails where there is no VM, or it does not answer.
    pub(crate) async fn sandbox_metrics(&self, id: &str) -> Result<Metrics> {
        self.check_sandbox_id(id)?;
        let vm = self.vm()?;
        let guest = match vm.agent().stats().await {
            Ok(stats) => stats,
            Err(error) => return Err(vm.explain(error).await),
        };
        let mut metrics = stats::metrics(guest.of_containers.get_or_default());
        // containerd takes from what is used the cache that could go.
        let memory = metrics.memory.mut_or_insert_default();
        memory.usage = guest.memory_total_bytes.saturating_sub(guest.memory_free_bytes);
        memory.inactive_file = guest.memory_inactive_file_bytes;
        memory.usage_limit = guest.memory_total_bytes;
        Ok(metrics)
    }

    fn check_sandbox_id(&self, id: &str) -> Result<()> {
        if id == self.id { Ok(()) } else { Err(Error::NotFound(format!("there is no sandbox {id}"))) }
    }

    fn with_sandbox<T>(&self, work: impl FnOnce(&Sandbox) -> T) -> Result<T> {
        let state = self.lock();
        let sandbox = state.sandbox.as_ref();
        sandbox.map(work).ok_or_else(|| Error::NotFound(format!("there is no sandbox {}", self.id)))
    }
}

impl Pod {
    /// Whether the containers of the pod see each other's processes, as far as is known: with containerd's own sandboxer each container
    /// alone says what it wants.
    pub(super) fn shares_processes(&self) -> bool {
        self.lock().sandbox.as_ref().is_some_and(|sandbox| sandbox.shares_processes)
    }

    /// The files of the pod's containers; none where containerd makes them.
    pub(super) fn files(&self) -> Vec<PodFile> {
        self.lock().sandbox.as_ref().map(|sandbox| sandbox.files.clone()).unwrap_or_default()
    }
}

impl Sandbox {
    fn new(request: CreateSandbox, namespace: &str, settings: &Settings) -> Result<Self> {
        let config = PodSandboxConfig::parse_from_bytes(&request.config)
            .map_err(|error| Error::Invalid(format!("the sandbox's configuration is broken: {error}")))?;
        let linux = config.linux.get_or_default();
        let modes = linux.security_context.get_or_default().namespace_options.get_or_default();
        for (mode, name) in [
            (modes.network, "network (hostNetwork)"),
            (modes.pid, "processes (hostPID)"),
            (modes.ipc, "System V IPC (hostIPC)"),
        ] {
            if mode == NamespaceMode::NODE.into() {
                spec::host_namespace_wanted(name, settings.pod.host_namespaces.value)?;
            }
        }
        let shares_processes = modes.pid == NamespaceMode::POD.into();
        let netns = request.network_namespace;
        if !netns.is_empty() && !std::path::Path::new(&netns).exists() {
            return Err(Error::Invalid(format!("the network namespace {netns} does not exist")));
        }
        let positive = |number: i64| u64::try_from(number).unwrap_or(0);
        let resources = linux.resources.get_or_default();
        let cgroup = cgroup_below(&linux.cgroup_parent, namespace, &request.id);
        let limits = Limits {
            memory_bytes: positive(resources.memory_limit_in_bytes),
            memory_is_whole: annotations::is_limited(Some(&cgroup)),
            huge_pages_bytes: resources
                .hugepage_limits
                .iter()
                .fold(0, |sum: u64, pages| sum.saturating_add(pages.limit)),
            cpu_quota_us: positive(resources.cpu_quota),
            cpu_period_us: positive(resources.cpu_period),
        };
        let mut notes = config.annotations;
        notes.extend(request.annotations);
        let mut sysctls: HashMap<String, String> =
            SYSCTLS.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        sysctls.extend(spec::with_dots(&linux.sysctls));
        let hostname = if config.hostname.is_empty() { short(&request.id) } else { config.hostname };
        let files = files(&hostname, config.dns_config.get_or_default());
        let guest = Guest {
            hostname,
            sysctls,
            size: annotations::size(&notes, limits, settings)?,
            network_namespace: (!netns.is_empty()).then(|| netns.into()),
        };
        Ok(Self {
            guest,
            cgroup,
            files,
            shares_processes,
            created_at: SystemTime::now(),
            phase: watch::Sender::new(Phase::Created),
        })
    }

    /// Notes the end, unless there has been one.
    fn end(&self, exit: Exit) {
        self.phase.send_if_modified(|phase| match phase {
            Phase::Stopped(_) => false,
            _ => {
                *phase = Phase::Stopped(exit);
                true
            }
        });
    }
}

/// What containerd gives the containers of its own sandboxer. The node's hosts(5) are for those of a client that brings none; the
/// kubelet does.
fn files(hostname: &str, dns: &DNSConfig) -> Vec<PodFile> {
    let texts = [
        ("hostname", Some(format!("{hostname}\n"))),
        ("hosts", std::fs::read_to_string(NODES_HOSTS).ok()),
        ("resolv.conf", resolv_conf(dns)),
    ];
    texts.into_iter().filter_map(|(name, text)| Some(PodFile { name, text: text? })).collect()
}

/// What a pod's resolv.conf(5) says, as containerd writes it: the node's where the pod wants nothing of its own.
fn resolv_conf(config: &DNSConfig) -> Option<String> {
    let DNSConfig { servers, searches, options, .. } = config;
    if servers.is_empty() && searches.is_empty() && options.is_empty() {
        return std::fs::read_to_string(NODES_RESOLV_CONF).ok();
    }
    let list = |word: &str, values: &[String]| {
        if values.is_empty() { String::new() } else { format!("{word} {}\n", values.join(" ")) }
    };
    let servers: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    Some(list("search", searches) + &servers + &list("options", options))
}

/// The cgroup of a sandbox below the one that the kubelet has made for the pod; without that, where containerd has those of its own.
fn cgroup_below(parent: &str, namespace: &str, id: &str) -> String {
    match parent.rsplit('/').next() {
        _ if parent.is_empty() => format!("/{namespace}/{id}"),
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:hull:{id}"),
        _ => format!("{parent}/{id}"),
    }
}

/// An identifier cut to a host name's length.
fn short(id: &str) -> String {
    id[..id.floor_char_boundary(64)].to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(change: impl FnOnce(&mut PodSandboxConfig)) -> CreateSandbox {
        let mut config = PodSandboxConfig::default();
        change(&mut config);
        CreateSandbox { id: "p".into(), config: config.write_to_bytes().unwrap(), ..Default::default() }
    }

    fn made(request: CreateSandbox) -> Result<Sandbox> {
        Sandbox::new(request, "k8s.io", &Settings::default())
    }

    #[test]
    fn a_sandbox_is_as_large_as_its_pod_may_get() {
        let sandbox = made(config(|config| {
            config.hostname = "web".into();
            let linux = config.linux.mut_or_insert_default();
            linux.resources.mut_or_insert_default().memory_limit_in_bytes = 1 << 30;
        }));
        let sandbox = sandbox.unwrap();
        assert_eq!(sandbox.guest.hostname, "web");
        assert!(sandbox.guest.size.memory_mib > 1024);
    }

    #[test]
    fn a_pod_without_a_name_has_the_beginning_of_its_identifier_for_one() {
        let hostname = |files: Vec<PodFile>| files.into_iter().find(|file| file.name == "hostname").unwrap().text;
        assert_eq!(hostname(made(config(|_| {})).unwrap().files), "p\n");
        assert_eq!(hostname(made(config(|config| config.hostname = "web".into())).unwrap().files), "web\n");
    }

    #[test]
    fn names_are_resolved_as_the_pod_wants() {
        let config = DNSConfig {
            servers: vec!["192.0.2.1".into(), "2001:db8::1".into()],
            options: vec!["ndots:5".into(), "rotate".into()],
            ..Default::default()
        };
        let text = "nameserver 192.0.2.1\nnameserver 2001:db8::1\noptions ndots:5 rotate\n";
        assert_eq!(resolv_conf(&config).as_deref(), Some(text));
        assert_eq!(resolv_conf(&DNSConfig::default()), std::fs::read_to_string(NODES_RESOLV_CONF).ok());
    }

    #[test]
    fn a_sandbox_is_accounted_to_its_pod_under_both_drivers() {
        assert_eq!(cgroup_below("", "k8s.io", "p"), "/k8s.io/p");
        assert_eq!(cgroup_below("/kubepods/pod1", "k8s.io", "p"), "/kubepods/pod1/p");
        let slice = cgroup_below("/kubepods.slice/kubepods-pod1.slice", "k8s.io", "p");
        assert_eq!(slice, "kubepods-pod1.slice:hull:p");
    }

    #[test]
    fn the_hosts_namespaces_are_refused_by_name() {
        let request = config(|config| {
            let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            context.namespace_options.mut_or_insert_default().pid = NamespaceMode::NODE.into();
        });
        assert!(made(request).unwrap_err().to_string().contains("hostPID"));
    }

    #[test]
    fn sysctls_of_the_pod_are_the_guests() {
        let sandbox = made(config(|config| {
            let linux = config.linux.mut_or_insert_default();
            linux.sysctls.insert("net/ipv4/tcp_syncookies".into(), "0".into());
            linux.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "1024".into());
        }));
        let sysctls = sandbox.unwrap().guest.sysctls;
        assert_eq!(sysctls["net.ipv4.tcp_syncookies"], "0");
        assert_eq!(sysctls["net.ipv4.ip_unprivileged_port_start"], "1024", "the pod's word counts");
        assert!(sysctls.contains_key("net.ipv4.ping_group_range"));
    }

    #[test]
    fn a_network_namespace_must_exist() {
        let request = CreateSandbox { network_namespace: "/no/such/netns".into(), ..Default::default() };
        assert!(made(request).unwrap_err().to_string().contains("/no/such/netns"));
    }

    proptest! {
        #[test]
        fn no_configuration_makes_the_parser_panic(config in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = made(CreateSandbox { config, ..Default::default() });
        }
    }
}
