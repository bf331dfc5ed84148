//! Every setting there is: its name, what it means, what it may be, what it is unless told. All else is made from this.

use hull_sandbox::config::MIN_MEMORY_MIB;
use hull_sandbox::host;
use hull_vmm_api::config::{MAX_CPUS, MAX_MEMORY_MIB};
use serde::Deserialize;
use serde_json::{Value, json};
use toml::Spanned;
use toml::de::{DeValue, ValueDeserializer};

use crate::origin::{Origin, Setting};
use crate::value::{Allowed, BlockCache, HostNamespaces, KernelParams, Level, Number, Place, RunNetwork};

/// Virtual CPUs.
pub type Vcpus = Number<1, { MAX_CPUS as u64 }>;
/// Virtual CPUs beyond those at boot.
pub type SpareVcpus = Number<0, { MAX_CPUS as u64 - 1 }>;
/// A machine's memory.
pub type MemoryMib = Number<MIN_MEMORY_MIB, MAX_MEMORY_MIB>;
/// Memory besides a pod's limit. With the least of it a machine of the least limit still is one.
pub type OverheadMib = Number<MIN_MEMORY_MIB, 16384>;
/// A time limit.
pub type Seconds = Number<1, 3600>;

/// What is told of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Its table.
    pub table: &'static str,
    /// Its name in the table.
    pub key: &'static str,
    /// What it means, line by line.
    pub doc: &'static [&'static str],
    /// Its value.
    pub value: Value,
    /// Where that comes from.
    pub origin: Origin,
}

/// Why a value was not taken.
pub(crate) enum Refusal {
    /// There is no such key.
    Unknown,
    /// There is, and it cannot be that.
    Value(toml::de::Error),
}

macro_rules! settings {
    ($(
        $(#[doc = $table_doc:literal])+
        $table:ident: $Table:ident {
            $( $(#[doc = $doc:literal])+ $key:ident: $type:ty = $default:expr, )+
        }
    )+) => {
        /// The settings of a node.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Settings {
            $( $(#[doc = $table_doc])+ pub $table: $Table, )+
        }

        $(
            $(#[doc = $table_doc])+
            #[derive(Clone, Debug, PartialEq, Eq)]
            pub struct $Table {
                $( $(#[doc = $doc])+ pub $key: Setting<$type>, )+
            }
        )+

        impl Default for Settings {
            fn default() -> Self {
                Self { $( $table: $Table { $( $key: Setting::default($default), )+ }, )+ }
            }
        }

        impl Settings {
            /// The tables, with what each is for.
            pub(crate) const TABLES: &[(&str, &[&str])] =
                &[ $( (stringify!($table), &[ $( $table_doc ),+ ]), )+ ];
            /// All keys, each with its table.
            pub(crate) const KEYS: &[(&str, &str)] =
                &[ $( $( (stringify!($table), stringify!($key)), )+ )+ ];

            /// Gives a key another value.
            pub(crate) fn set(
                &mut self,
                table: &str,
                key: &str,
                value: Spanned<DeValue<'_>>,
                origin: Origin,
            ) -> Result<(), Refusal> {
                let value = ValueDeserializer::from(value);
                match (table, key) {
                    $( $( (stringify!($table), stringify!($key)) => {
                        let value = <$type>::deserialize(value).map_err(Refusal::Value)?;
                        self.$table.$key = Setting { value, origin };
                    } )+ )+
                    _ => return Err(Refusal::Unknown),
                }
                Ok(())
            }

            /// All keys with what they are.
            #[must_use]
            pub fn describe(&self) -> Vec<Described> {
                vec![ $( $( Described {
                    table: stringify!($table),
                    key: stringify!($key),
                    doc: &[ $( $doc ),+ ],
                    value: json!(self.$table.$key.value),
                    origin: self.$table.$key.origin.clone(),
                }, )+ )+ ]
            }
        }
    };
}

settings! {
    /// The files that machines are made with. By default those that were installed with the program that runs; the
    /// variables HULL_VMM, HULL_KERNEL and HULL_IMAGE of the environment come before what is said here.
    paths: Paths {
        /// The virtual machine monitor.
        vmm: Place = Place::Installed(host::VMM),
        /// The guest kernel, an uncompressed vmlinux.
        kernel: Place = Place::Installed(host::KERNEL),
        /// The guest image, with the agent in it.
        image: Place = Place::Installed(host::IMAGE),
    }
    /// Every machine, of a pod or of `hull run`.
    guest: Guest {
        /// Virtual CPUs where nothing says how many: 1 to 64.
        default_vcpus: Vcpus = Vcpus::fixed(1),
        /// Memory in MiB where nothing says how much. What a guest does not touch costs the host nothing.
        default_memory_mib: MemoryMib = MemoryMib::fixed(512),
        /// Words added to the guest kernel's command line, before those that a pod or `hull run` adds.
        kernel_params: KernelParams = KernelParams::default(),
    }
    /// The machines of `hull run` alone.
    run: Run {
        /// The network where --net is not given: "none", "user", "cni:NAME", or "auto": the first network of the CNI
        /// configuration, else "user" where passt is installed, else "none".
        network: RunNetwork = RunNetwork::Auto,
    }
    /// The machines of pods, and of what else containerd starts.
    pod: Pod {
        /// Most virtual CPUs, whatever a pod asks for: 1 to 64.
        max_vcpus: Vcpus = Vcpus::fixed(MAX_CPUS as u64),
        /// Virtual CPUs that a pod has beyond those it starts with, offline until its containers' limits are raised: 0 to
        /// 63. Each costs every start 6 ms and every pod 330 KiB. A pod that says default_maxvcpus can grow to that instead.
        spare_vcpus: SpareVcpus = SpareVcpus::fixed(0),
        /// Most memory in MiB, whatever a pod asks for.
        max_memory_mib: MemoryMib = MemoryMib::fixed(MAX_MEMORY_MIB),
        /// Memory in MiB that a machine has besides its pod's limit, for kernel and agent, so that a limit is reached
        /// before the guest is full: 64 or more.
        overhead_mib: OverheadMib = OverheadMib::fixed(96),
        /// Seconds that a guest may take to come up: what 200 that start at once on a small host need. The death of
        /// one is noticed at once.
        boot_timeout_s: Seconds = Seconds::fixed(120),
        /// What becomes of a pod with hostNetwork, hostPID or hostIPC: "refuse" it, or "ignore" the wish with a warning
        /// in the log. Then it sees its own machine's network (loopback alone), processes or IPC.
        host_namespaces: HostNamespaces = HostNamespaces::Refuse,
        /// Whether block volumes are in the host's page cache as well as in their guest's: "writeback", or "none": what is
        /// read and written goes past it (O_DIRECT). A pod may say so with block_device_cache_direct.
        block_volume_cache: BlockCache = BlockCache::Writeback,
        /// The annotations io.katacontainers.config.hypervisor.NAME that pods may use, by NAME or in full; * stands for
        /// any letters. Others are ignored with a warning in the log. There are also block_device_cache_direct, and
        /// kernel_params, with which a pod can switch off what its guest's kernel does for its own security.
        allowed_annotations: Allowed =
            Allowed::fixed(&["default_vcpus", "default_memory", "default_maxvcpus", "default_maxmemory"]),
    }
    /// What is logged. Pods log to containerd's log.
    log: Log {
        /// The least grave message that is logged: "error", "warn", "info" or "debug". Where containerd itself logs at
        /// debug, Hull does.
        level: Level = Level::Info,
    }
}
