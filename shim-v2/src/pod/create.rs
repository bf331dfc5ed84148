//! Creates a container: in a VM of its own, in one that is there, or as the VM itself.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::topics;
use containerd_shim_protos::types::mount::Mount;
use hull_protocol::agent::{MemoryVolume, Storage};
use hull_sandbox::container::{Process as GuestProcess, Setup};
use hull_sandbox::disks::HostDevice;
use hull_sandbox::mount::FileSystem;
use hull_sandbox::root;
use hull_sandbox::share::{RootSource, Share};
use oci_spec::runtime::Spec;
use protobuf::MessageField;

use super::{Container, Pod, State, cpus, memory, start};
use crate::annotations::{self, Limits, Role};
use crate::error::{Error, Result};
use crate::live::{Followers, LiveVolume};
use crate::memory::MemoryVolumes;
use crate::process::{Body, Exit, Phase, Process};
use crate::rootfs;
use crate::spec::{self, PodFile, user_namespace};
use crate::streams::{Ends, Stdio};
use crate::vm::{Boot, Guest, Vm, sandbox_name};

/// Longest host name that Linux takes.
const MAX_HOSTNAME_BYTES: usize = 64;

/// A container to be created.
#[derive(Debug)]
pub(crate) struct Create {
    pub(crate) id: String,
    pub(crate) bundle: String,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) stdio: Stdio,
}

impl Pod {
    /// Creates a container and returns its process on the host.
    ///
    /// # Errors
    ///
    /// Fails where the specification or a stream cannot be honoured or the VM does not come up; nothing is left then.
    pub(crate) async fn create(self: &Arc<Self>, request: Create) -> Result<u32> {
        let _lifecycle = self.lifecycle.lock().await;
        self.lock().check_open()?;
        let bundle = PathBuf::from(&request.bundle);
        let spec = spec::read(&bundle)?;
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let cpu_limit = resources.and_then(|resources| cpus::limit(resources).ok()).flatten();
        let memory_limit = resources.and_then(memory::limit).flatten();
        let oom_score_adj = spec.process().as_ref().and_then(|process| process.oom_score_adj());
        let owns_processes = spec::owns_processes(&spec) == Some(true);
        let role = annotations::role(&spec.annotations().clone().unwrap_or_default())?;
        if self.lock().containers.contains_key(&request.id) {
            return Err(Error::Exists(format!("there is a container {} already", request.id)));
        }
        let ends = request.stdio.open(&self.namespace, &request.id, &self.streaming).await?;
        let (process, followers) = match &role {
            Role::Single | Role::Sandbox => self.create_first(&request, spec, role == Role::Sandbox, ends).await?,
            Role::Member(sandbox) if *sandbox == self.id => self.create_member(&request, spec, ends).await?,
            Role::Member(sandbox) => {
                return Err(Error::Invalid(format!("the container is of the pod {sandbox}, and this is {}", self.id)));
            }
        };
        let pid = self.pid();
        self.publisher.publish(
            topics::TASK_CREATE_EVENT_TOPIC,
            &TaskCreate {
                container_id: request.id.clone(),
                bundle: request.bundle.clone(),
                rootfs: request.rootfs,
                io: MessageField::some(TaskIO {
                    stdin: request.stdio.stdin,
                    stdout: request.stdio.stdout,
                    stderr: request.stdio.stderr,
                    terminal: request.stdio.terminal,
                    ..Default::default()
                }),
                pid,
                ..Default::default()
            },
        );
        let container = Container {
            bundle: request.bundle,
            init: process.clone(),
            cpu_limit,
            memory_limit,
            oom_score_adj,
            owns_processes,
            _followers: followers,
            execs: Default::default(),
        };
        self.lock().containers.insert(request.id, container);
        self.rank_for_oom();
        if let Err(error) = self.fit_cpus(false).await {
            // It runs, if on fewer CPUs than its limit allows.
            tracing::warn!("cannot bring CPUs online: {error}");
        }
        self.watch(process);
        Ok(pid)
    }

    /// Boots the pod's VM for its first container, which has no process of its own where it is the pod's.
    async fn create_first(
        self: &Arc<Self>,
        request: &Create,
        spec: Spec,
        is_sandbox: bool,
        ends: Ends,
    ) -> Result<(Arc<Process>, Followers)> {
        if self.lock().vm.is_some() {
            return Err(Error::Exists(format!("the pod {} has a virtual machine already", self.id)));
        }
        spec::check_host_namespaces(&spec, self.settings.pod.host_namespaces.value)?;
        // Nothing runs in its root, but it was made as those of its containers will be.
        let options = request.rootfs.iter().flat_map(|mount| &mount.options);
        if is_sandbox && spec::has_user_namespace(&spec) && !user_namespace::is_mapped(options) {
            return Err(user_namespace::changed_owners());
        }
        let notes = spec.annotations().clone().unwrap_or_default();
        let cgroup = spec::cgroup(&spec);
        let limits = if is_sandbox { Limits::of_sandbox(&notes, cgroup.as_deref())? } else { own_limits(&spec) };
        let size = annotations::size(&notes, limits, &self.settings)?;
        let network_namespace = spec::network_namespace(&spec);
        if let Some(path) = network_namespace.as_ref().filter(|path| !path.exists()) {
            return Err(Error::Invalid(format!("the network namespace {} does not exist", path.display())));
        }
        let hostname = spec.hostname().clone().unwrap_or_default();
        let mut hostname = if hostname.is_empty() { self.id.clone() } else { hostname };
        hostname.truncate(hostname.floor_char_boundary(MAX_HOSTNAME_BYTES));
        // Those of a container that is no sandbox are set with it.
        let sysctls = if is_sandbox { spec::sysctls(&spec) } else { HashMap::new() };
        let guest = Guest { hostname, sysctls, size, network_namespace };
        self.join_cgroup(cgroup.as_deref())?;
        let plan = Plan::new(request, self.memory_volumes.clone(), Vec::new());
        let prepare = |share: &Share| if is_sandbox { Ok(None) } else { plan.prepare(share, spec).map(Some) };
        let booted = self.boot(&guest, prepare).await;
        if booted.is_err() {
            self.stop_vm().await;
        }
        let (vm, prepared) = booted?;
        let process = match prepared {
            None => {
                let process = Process::new(&request.id, "", request.stdio.clone(), Body::Nothing);
                Ok((Arc::new(process), Followers::default()))
            }
            Some(prepared) => launch(&vm, request, prepared, ends).await,
        };
        match process {
            Ok(process) => {
                self.adopt(vm, guest);
                Ok(process)
            }
            Err(error) => {
                vm.stop().await;
                self.stop_vm().await;
                Err(error)
            }
        }
    }

    /// Boots the pod's VM, and has `prepare` fill the tree that the guest sees meanwhile.
    pub(super) async fn boot<T>(&self, guest: &Guest, prepare: impl FnOnce(&Share) -> Result<T>) -> Result<(Vm, T)> {
        let boot = Boot {
            host: self.host.clone(),
            name: sandbox_name(&self.namespace, &self.id),
            guest,
            timeout: Duration::from_secs(self.settings.pod.boot_timeout_s.value.get()),
        };
        Vm::boot(boot, prepare).await
    }

    /// Takes a VM that has come up for the pod's.
    pub(super) fn adopt(self: &Arc<Self>, vm: Vm, guest: Guest) {
        {
            let mut state = self.lock();
            state.vm = Some(vm.clone());
            state.size = Some(guest.size);
            state.network_namespace = guest.network_namespace;
        }
        tokio::spawn(self.clone().follow_events(vm));
    }

    /// Creates a container in the pod's VM.
    async fn create_member(&self, request: &Create, spec: Spec, ends: Ends) -> Result<(Arc<Process>, Followers)> {
        let vm = self.vm()?;
        let joins = spec::owns_processes(&spec) == Some(false) && !self.shares_processes();
        let joined = if joins { self.lock().target() } else { None };
        let plan = Plan::new(request, self.memory_volumes.clone(), self.files());
        let prepared = vm.with_share(move |share| plan.prepare(share, spec)).await?;
        let created = match prepared {
            Ok(mut prepared) => {
                if let Some(pid) = joined {
                    spec::join_processes(&mut prepared.spec, pid);
                }
                launch(&vm, request, prepared, ends).await
            }
            Err(error) => Err(error),
        };
        if created.is_err() {
            let id = request.id.clone();
            // An error is that the VM is gone, and the tree with it.
            if let Ok(Err(error)) = vm.with_share(move |share| share.remove_container(&id)).await {
                tracing::error!("left behind: {error}");
            }
        }
        created
    }

    /// Tells of a process's end when that comes.
    pub(super) fn watch(self: &Arc<Self>, process: Arc<Process>) {
        let pod = self.clone();
        tokio::spawn(async move {
            let Ok(vm) = pod.vm() else { return };
            let exit = match process.guest() {
                Ok(guest) => match guest.wait().await {
                    Ok(status) => {
                        // The guest's event may still be on its way, and the reason comes before the end.
                        let is_first = process.exec_id.is_empty();
                        if is_first && status.oom_killed && !process.told_oom.load(Ordering::Relaxed) {
                            pod.tell_oom(&process);
                        }
                        Exit::of_guest(&status)
                    }
                    Err(error) => {
                        let error = vm.explain(error).await;
                        if pod.vmm_ran_out_of_memory() {
                            pod.tell_oom(&process);
                        }
                        tracing::warn!("{} is taken for killed: {error}", process.name());
                        Exit::killed()
                    }
                },
                // The pod's own container, which others end, or the VM's end does.
                Err(_) => tokio::select! {
                    exit = process.wait() => exit,
                    _ = vm.ended() => Exit::killed(),
                },
            };
            pod.ended(&process, exit).await;
        });
    }
}

impl State {
    /// The guest's number of the first process of the container whose processes another one is to see; none where it is to see the pod's.
    ///
    /// containerd names a container of the pod (`kubectl debug --target`) by the process on the host, and all have the same. In a
    /// pod that does not share its processes it must be one that has a namespace of its own, and where that is one alone it is known.
    fn target(&self) -> Option<u32> {
        let running = self.containers.values().filter(|container| {
            container.owns_processes && matches!(container.init.phase(), Phase::Running | Phase::Paused)
        });
        let pids: Vec<u32> = running.filter_map(|container| container.init.guest().ok()?.pid()).collect();
        if pids.len() > 1 {
            tracing::warn!(
                "the container is to see another one's processes, and it is not told whose: it sees the pod's"
            );
        }
        <[u32; 1]>::try_from(pids).ok().map(|[pid]| pid)
    }
}

/// Creates the guest's container and connects its streams.
async fn launch(vm: &Vm, request: &Create, prepared: Prepared, ends: Ends) -> Result<(Arc<Process>, Followers)> {
    let Prepared { mut spec, root, live, memory, block } = prepared;
    spec::renumber(&mut spec, &vm.add_disks(&request.id, &block).await?);
    let launched = match vm.plug_root(&request.id, &root).await {
        Ok(storages) => launch_with_disks(vm, request, &spec, (storages, live, memory), ends).await,
        Err(error) => Err(error),
    };
    if launched.is_err() {
        vm.release_disks(&request.id).await;
    }
    launched
}

async fn launch_with_disks(
    vm: &Vm,
    request: &Create,
    spec: &Spec,
    (mut storages, live, memory): (Vec<Storage>, Vec<LiveVolume>, Vec<MemoryVolume>),
    ends: Ends,
) -> Result<(Arc<Process>, Followers)> {
    let streams = request.stdio.streams();
    storages.extend(live.iter().map(LiveVolume::storage));
    // containerd has looked the user up.
    let setup = Setup { storages, volumes: memory, user: String::new() };
    let created = GuestProcess::create(vm.agent(), &request.id, spec, streams, setup).await;
    let (guest, connections) = match created {
        Ok(created) => created,
        Err(error) => return Err(vm.explain(error).await),
    };
    let pumps = start::carry(&guest, connections, ends, request.stdio.terminal).await?;
    let followers = Followers::start(live, &guest);
    let process = Process::new(&request.id, "", request.stdio.clone(), Body::Nothing);
    process.set_guest(guest, pumps);
    Ok((Arc::new(process), followers))
}

/// A pod of one container is as large as that is allowed to get.
fn own_limits(spec: &Spec) -> Limits {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let memory = resources.and_then(|resources| resources.memory().as_ref());
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    let huge_pages = resources.and_then(|resources| resources.hugepage_limits().as_ref()).into_iter().flatten();
    let positive = |limit: Option<i64>| limit.and_then(|limit| u64::try_from(limit).ok()).unwrap_or(0);
    Limits {
        memory_bytes: positive(memory.and_then(|memory| memory.limit())),
        memory_is_whole: true,
        huge_pages_bytes: huge_pages.map(|limit| positive(Some(limit.limit()))).fold(0, u64::saturating_add),
        cpu_quota_us: positive(cpu.and_then(|cpu| cpu.quota())),
        cpu_period_us: cpu.and_then(|cpu| cpu.period()).unwrap_or(0),
    }
}

/// A container as the guest can make it.
#[derive(Debug)]
struct Prepared {
    spec: Spec,
    root: root::Prepared,
    live: Vec<LiveVolume>,
    memory: Vec<MemoryVolume>,
    block: Vec<HostDevice>,
}

/// What brings a container's files into the tree that the guest sees.
struct Plan {
    id: String,
    bundle: PathBuf,
    rootfs: Vec<FileSystem>,
    memory_volumes: Arc<MemoryVolumes>,
    /// The pod's, unless the container brings its own.
    files: Vec<PodFile>,
}

impl Plan {
    fn new(request: &Create, memory_volumes: Arc<MemoryVolumes>, files: Vec<PodFile>) -> Self {
        let rootfs = request.rootfs.iter().map(|mount| FileSystem {
            fstype: mount.type_.clone(),
            source: mount.source.clone(),
            options: mount.options.clone(),
        });
        Self {
            id: request.id.clone(),
            bundle: request.bundle.clone().into(),
            rootfs: rootfs.collect(),
            memory_volumes,
            files,
        }
    }

    /// Fills the tree and makes the guest's specification.
    fn prepare(mut self, share: &Share, mut spec: Spec) -> Result<Prepared> {
        spec::give_files(&mut spec, &self.bundle, &self.files)?;
        user_namespace::absorb(&mut spec, &mut self.rootfs)?;
        let root = if self.rootfs.is_empty() {
            let path = spec.root().as_ref().map_or(Path::new("rootfs"), |root| root.path());
            let path = self.bundle.join(path);
            if !path.is_dir() {
                return Err(Error::Invalid(format!("the container's root {} is missing", path.display())));
            }
            root::Prepared::in_tree(share.add_root(&self.id, &RootSource::Directory(path))?)
        } else if let Some(root) = rootfs::on_disks(&self.rootfs)? {
            root.prepare(share, &self.id)?
        } else {
            root::Prepared::in_tree(share.add_mounted_root(&self.id, &self.rootfs)?)
        };
        let pod_uid = spec.annotations().as_ref().and_then(|notes| notes.get(annotations::POD_UID)).cloned();
        let block = spec::take_block_devices(&mut spec)?;
        let (mut live, mut memory) = (Vec::new(), Vec::new());
        let spec = spec::translate(spec, &root.path, |placed| {
            if let Some(volume) = LiveVolume::take(&placed.volume, &self.id, placed.index, &live) {
                let mount_point = volume.mount_point().to_owned();
                live.push(volume);
                return Ok(mount_point);
            }
            let source = &placed.volume.source;
            if let Some(volume) = self.memory_volumes.take(source, pod_uid.as_deref(), &self.id, placed.index) {
                let mount_point = volume.mount_point.clone();
                memory.push(volume);
                return Ok(mount_point);
            }
            Ok(share.add_volume(&self.id, placed.index, &placed.volume)?)
        })?;
        Ok(Prepared { spec, root, live, memory, block })
    }
}
