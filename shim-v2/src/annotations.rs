//! The annotations of config.json: which pod a container belongs to, and how large the pod is to be.

use std::collections::HashMap;

use hull_sandbox::cgroup::Cgroup;
use hull_sandbox::config::host_memory_mib;
use hull_sandbox::disks::DiskCache;
use hull_settings::{ANNOTATIONS, HYPERVISOR, Settings};

use crate::error::{Error, Result};

/// What a container is to its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A container without a pod: it is the pod.
    Single,
    /// The pod's own container, the one with the pause image.
    Sandbox,
    /// A container of the pod whose sandbox has this identifier.
    Member(String),
}

/// The pod's identifier in the cluster, where containerd says it.
pub(crate) const POD_UID: &str = "io.kubernetes.cri.sandbox-uid";

type Annotations = HashMap<String, String>;

/// containerd's spelling and CRI-O's.
const TYPES: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
const SANDBOXES: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// Reads what a container is.
///
/// # Errors
///
/// Fails on a type that does not exist, and on a member that names no pod.
pub(crate) fn role(annotations: &Annotations) -> Result<Role> {
    let first = |names: [&str; 2]| names.iter().find_map(|name| annotations.get(*name)).map(String::as_str);
    match first(TYPES) {
        None => Ok(Role::Single),
        Some("sandbox") => Ok(Role::Sandbox),
        Some("container") => match first(SANDBOXES) {
            Some(id) if !id.is_empty() => Ok(Role::Member(id.to_owned())),
            _ => Err(Error::Invalid(format!("the annotation {} is missing or empty", SANDBOXES[0]))),
        },
        Some(other) => {
            Err(Error::Invalid(format!("the annotation {}: {other:?} is neither sandbox nor container", TYPES[0])))
        }
    }
}

const MIB: u64 = 1 << 20;

/// How large a pod's VM is, and what else the pod can say of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// What it has whatever its containers' limits are.
    pub(crate) base_cpus: u8,
    /// What it starts with.
    pub(crate) cpus: u8,
    /// What it can grow to.
    pub(crate) max_cpus: u8,
    pub(crate) memory_mib: u64,
    pub(crate) kernel_params: String,
    /// Of its block volumes.
    pub(crate) block_cache: DiskCache,
}

/// A pod's limits; 0 where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) memory_bytes: u64,
    /// Whether that is all that the pod may use: a pod can have containers without a limit beside those whose limits are in the sum.
    pub(crate) memory_is_whole: bool,
    /// Of huge pages, which come on top.
    pub(crate) huge_pages_bytes: u64,
    pub(crate) cpu_quota_us: u64,
    pub(crate) cpu_period_us: u64,
}

impl Limits {
    /// Reads the sandbox's limits as CRI has summed them over the pod. They are all that it may use where its `cgroup` on the host, as an
    /// OCI specification has it, is within a limit.
    ///
    /// # Errors
    ///
    /// Names an annotation that is no number.
    pub(crate) fn of_sandbox(annotations: &Annotations, cgroup: Option<&str>) -> Result<Self> {
        Ok(Self {
            memory_bytes: number(annotations, "io.kubernetes.cri.sandbox-memory")?,
            memory_is_whole: is_limited(cgroup),
            // CRI does not tell.
            huge_pages_bytes: 0,
            cpu_quota_us: number(annotations, "io.kubernetes.cri.sandbox-cpu-quota")?,
            cpu_period_us: number(annotations, "io.kubernetes.cri.sandbox-cpu-period")?,
        })
    }
}

/// Whether the cgroup that a sandbox's lies in has a limit of memory.
pub(crate) fn is_limited(cgroup: Option<&str>) -> bool {
    cgroup.is_some_and(|path| Cgroup::at(path).is_ok_and(|cgroup| cgroup.is_memory_limited_above()))
}

/// Decides a pod's size from its limits, and from Kata's annotations, which win where the node's settings let pods use them.
///
/// # Errors
///
/// Names the annotation that is no number or out of range.
pub(crate) fn size(annotations: &Annotations, limits: Limits, settings: &Settings) -> Result<Size> {
    size_on(host_memory_mib(), annotations, limits, settings)
}

fn size_on(host_memory_mib: u64, annotations: &Annotations, limits: Limits, settings: &Settings) -> Result<Size> {
    let (guest, pod) = (&settings.guest, &settings.pod);
    warn_of_ignored(annotations, settings);
    let allowed = |key: &str| {
        let name = format!("{HYPERVISOR}{key}");
        let text = annotations.get(&name).filter(|_| pod.allowed_annotations.value.allows(key));
        text.map(|text| (name, text))
    };
    let asked = |key: &str| allowed(key).map(|(name, text)| parse(&name, text)).transpose();
    let at_most = |what: &str, wanted: u64, most: u64| {
        if wanted > most {
            tracing::warn!(
                "the pod asks for {wanted} {what} and gets {most}, the most that this node has and its settings allow"
            );
        }
        wanted.min(most)
    };
    let cpus_asked = allowed("default_vcpus").map(|(name, text)| parse_cpus(&name, text)).transpose()?;
    let cpus_default = cpus_asked.filter(|cpus| *cpus > 0).unwrap_or(guest.default_vcpus.value.get());
    let cpus_limit = match limits.cpu_quota_us {
        0 => 0,
        quota => quota.div_ceil(limits.cpu_period_us.max(1)),
    };
    let most = pod.max_vcpus.value.get();
    let asked_most = asked("default_maxvcpus")?.filter(|max| *max > 0);
    let cpus = at_most("virtual CPUs", cpus_default.max(cpus_limit).min(asked_most.unwrap_or(u64::MAX)), most);
    let max_cpus = asked_most.unwrap_or(cpus + pod.spare_vcpus.value.get()).min(most).max(cpus);
    let narrow =
        |cpus: u64| u8::try_from(cpus).map_err(|_| Error::Invalid(format!("{cpus} virtual CPUs are too many")));

    let memory_default = asked("default_memory")?;
    let memory_mib = match (limits.memory_bytes, memory_default) {
        (0, None) => guest.default_memory_mib.value.get(),
        (0, Some(mib)) => mib,
        (bytes, base) => {
            let limited = base.unwrap_or(pod.overhead_mib.value.get()).saturating_add(bytes.div_ceil(MIB));
            // One without a limit is not to find less than in a pod where none has any.
            if limits.memory_is_whole || base.is_some() {
                limited
            } else {
                limited.max(guest.default_memory_mib.value.get())
            }
        }
    };
    let memory_mib = memory_mib.saturating_add(limits.huge_pages_bytes.div_ceil(MIB));
    let memory_mib = memory_mib.min(asked("default_maxmemory")?.filter(|max| *max > 0).unwrap_or(u64::MAX));
    let memory_mib = at_most("MiB of memory", memory_mib, pod.max_memory_mib.value.get().min(host_memory_mib));
    let mut words = vec![guest.kernel_params.value.as_str()];
    let asked_words = allowed("kernel_params");
    words.extend(asked_words.iter().map(|(_, text)| text.as_str()));
    words.retain(|words| !words.is_empty());
    let block_cache = match allowed("block_device_cache_direct") {
        None => pod.block_volume_cache.value.into(),
        Some((name, text)) => match text.trim() {
            "true" => DiskCache::None,
            "false" => DiskCache::Writeback,
            other => return Err(Error::Invalid(format!("the annotation {name}: {other:?} is neither true nor false"))),
        },
    };
    Ok(Size {
        block_cache,
        base_cpus: narrow(cpus_default.min(cpus))?,
        cpus: narrow(cpus)?,
        max_cpus: narrow(max_cpus)?,
        memory_mib,
        kernel_params: words.join(" "),
    })
}

/// Says which of Kata's annotations do nothing. Kata would refuse a pod for one that is not allowed; here it starts with the size
/// that the node gives to every pod, as it does for an annotation without a meaning.
fn warn_of_ignored(annotations: &Annotations, settings: &Settings) {
    for name in annotations.keys().filter(|name| name.starts_with("io.katacontainers.")) {
        match name.strip_prefix(HYPERVISOR) {
            Some(key) if settings.pod.allowed_annotations.value.allows(key) && ANNOTATIONS.contains(&key) => {}
            Some(key) if ANNOTATIONS.contains(&key) => {
                tracing::warn!("the annotation {name} is ignored: pod.allowed_annotations does not have {key}");
            }
            _ => tracing::warn!("the annotation {name} has no meaning here and is ignored"),
        }
    }
}

/// A number that may be missing, and below zero where there is no limit.
fn number(annotations: &Annotations, name: &str) -> Result<u64> {
    match annotations.get(name).map(|text| text.trim()) {
        None | Some("") => Ok(0),
        Some(text) => match text.parse::<i64>() {
            Ok(number) => Ok(u64::try_from(number).unwrap_or(0)),
            Err(_) => Err(Error::Invalid(format!("the annotation {name}: {text:?} is no number"))),
        },
    }
}

fn parse(name: &str, text: &str) -> Result<u64> {
    text.trim().parse().map_err(|_| Error::Invalid(format!("the annotation {name}: {text:?} is no number")))
}

/// Kata takes parts of a CPU, and starts a whole one for each.
fn parse_cpus(name: &str, text: &str) -> Result<u64> {
    let cpus: f32 =
        text.trim().parse().map_err(|_| Error::Invalid(format!("the annotation {name}: {text:?} is no number")))?;
    if (0.0..=f32::from(u16::MAX)).contains(&cpus) {
        Ok(cpus.ceil() as u64)
    } else {
        Err(Error::Invalid(format!("the annotation {name}: {text:?} is no number of CPUs")))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sized(annotations: &Annotations, limits: Limits) -> Result<Size> {
        size(annotations, limits, &Settings::default())
    }

    /// The settings that a file with this text makes.
    fn settings(text: &str) -> Settings {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        Settings::read(&[path]).unwrap()
    }

    fn annotations<const N: usize>(pairs: [(&str, &str); N]) -> Annotations {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn both_spellings_group_containers_and_none_makes_a_pod_of_one() {
        assert_eq!(role(&annotations([])).unwrap(), Role::Single);
        assert_eq!(role(&annotations([(TYPES[0], "sandbox")])).unwrap(), Role::Sandbox);
        assert_eq!(role(&annotations([(TYPES[1], "sandbox")])).unwrap(), Role::Sandbox);
        for (kind, sandbox) in TYPES.into_iter().zip(SANDBOXES) {
            let member = annotations([(kind, "container"), (sandbox, "pod")]);
            assert_eq!(role(&member).unwrap(), Role::Member("pod".into()));
        }
        assert!(role(&annotations([(TYPES[0], "container")])).is_err());
        assert!(role(&annotations([(TYPES[0], "other")])).is_err());
    }

    #[test]
    fn a_pod_without_limits_gets_the_default_and_one_with_limits_the_overhead_on_top() {
        let default = sized(&annotations([]), Limits::default()).unwrap();
        assert_eq!((default.cpus, default.memory_mib), (1, 512));
        let limits = Limits {
            memory_bytes: 16 * MIB,
            memory_is_whole: true,
            cpu_quota_us: 150_000,
            cpu_period_us: 100_000,
            ..Limits::default()
        };
        let small = sized(&annotations([]), limits).unwrap();
        let huge = sized(&annotations([]), Limits { huge_pages_bytes: 4 * MIB, ..limits }).unwrap();
        assert_eq!(huge.memory_mib, small.memory_mib + 4);
        assert_eq!((small.cpus, small.memory_mib), (2, 96 + 16));
        let node = settings("guest = { default_vcpus = 3, default_memory_mib = 256 }\npod.overhead_mib = 64");
        let default = size(&annotations([]), Limits::default(), &node).unwrap();
        assert_eq!((default.cpus, default.memory_mib), (3, 256));
        assert_eq!(size(&annotations([]), limits, &node).unwrap().memory_mib, 64 + 16);
    }

    #[test]
    fn a_container_without_a_limit_beside_one_with_a_limit_does_not_make_the_pod_small() {
        let memory = |mib, memory_is_whole| {
            let limits = Limits { memory_bytes: mib * MIB, memory_is_whole, ..Limits::default() };
            sized(&annotations([]), limits).unwrap().memory_mib
        };
        assert_eq!(memory(64, true), 96 + 64);
        assert_eq!(memory(64, false), 512);
        assert_eq!(memory(1024, false), 96 + 1024);
    }

    #[test]
    fn a_limit_above_what_the_host_has_makes_a_pod_as_large_as_the_host() {
        let limits = Limits { memory_bytes: 8192 * MIB, memory_is_whole: true, ..Limits::default() };
        let on = |host_mib| size_on(host_mib, &annotations([]), limits, &Settings::default()).unwrap().memory_mib;
        assert_eq!((on(4096), on(16384)), (4096, 96 + 8192));
    }

    #[test]
    fn parts_of_a_cpu_are_a_whole_one() {
        let cpus = |text: &str| {
            let name = format!("{HYPERVISOR}default_vcpus");
            sized(&[(name, text.to_owned())].into(), Limits::default()).map(|size| size.cpus)
        };
        for (text, found) in [("0.5", 1), ("1.0", 1), ("1.5", 2), ("4", 4), ("0", 1)] {
            assert_eq!(cpus(text).unwrap(), found, "{text}");
        }
        for wrong in ["-1", "NaN", "inf", "many", ""] {
            assert!(cpus(wrong).unwrap_err().to_string().contains("default_vcpus"), "{wrong}");
        }
    }

    #[test]
    fn block_volumes_are_cached_as_the_node_says_or_an_allowed_annotation() {
        let cache = |annotation: Option<&str>, node: &str| {
            let annotated = annotation.map(|text| (format!("{HYPERVISOR}block_device_cache_direct"), text.to_owned()));
            size(&annotated.into_iter().collect(), Limits::default(), &settings(node)).map(|size| size.block_cache)
        };
        let allowed = "pod.allowed_annotations = ['block_device_cache_direct']";
        let uncached = "pod.block_volume_cache = 'none'";
        assert_eq!(cache(None, "").unwrap(), DiskCache::Writeback);
        assert_eq!(cache(None, uncached).unwrap(), DiskCache::None);
        assert_eq!(cache(Some("true"), "").unwrap(), DiskCache::Writeback, "not allowed");
        assert_eq!(cache(Some("true"), allowed).unwrap(), DiskCache::None);
        assert_eq!(cache(Some("false"), &format!("{allowed}\n{uncached}")).unwrap(), DiskCache::Writeback);
        assert!(cache(Some("maybe"), allowed).unwrap_err().to_string().contains("block_device_cache_direct"));
    }

    #[test]
    fn katas_annotations_win_and_are_capped_by_their_maxima() {
        let asked = annotations([
            ("io.katacontainers.config.hypervisor.default_vcpus", "4"),
            ("io.katacontainers.config.hypervisor.default_maxvcpus", "3"),
            ("io.katacontainers.config.hypervisor.default_memory", "2048"),
        ]);
        let size = sized(&asked, Limits::default()).unwrap();
        let kernel_params = String::new();
        assert_eq!(
            size,
            Size {
                base_cpus: 3,
                cpus: 3,
                max_cpus: 3,
                memory_mib: 2048,
                kernel_params,
                block_cache: DiskCache::Writeback
            }
        );
    }

    #[test]
    fn a_pod_can_grow_by_what_the_node_spares_or_to_what_it_asks_for() {
        let grown = |asked: &[(&str, &str)], quota, node: &str| {
            let limits = Limits { cpu_quota_us: quota, cpu_period_us: 1, ..Limits::default() };
            let asked: Vec<_> = asked
                .iter()
                .map(|(key, value)| (format!("io.katacontainers.config.hypervisor.{key}"), *value))
                .collect();
            let asked = asked.iter().map(|(key, value)| (key.clone(), (*value).to_owned())).collect();
            let size = size(&asked, limits, &settings(node)).unwrap();
            (size.base_cpus, size.cpus, size.max_cpus)
        };
        assert_eq!(grown(&[], 3, ""), (1, 3, 3));
        assert_eq!(grown(&[], 3, "pod.spare_vcpus = 2"), (1, 3, 5));
        assert_eq!(grown(&[], 3, "pod = { spare_vcpus = 2, max_vcpus = 4 }"), (1, 3, 4));
        assert_eq!(grown(&[("default_maxvcpus", "0")], 0, "pod.spare_vcpus = 1"), (1, 1, 2));
        assert_eq!(grown(&[("default_maxvcpus", "2"), ("default_vcpus", "2")], 4, ""), (2, 2, 2));
        assert_eq!(grown(&[("default_maxvcpus", "20")], 0, ""), (1, 1, 20));
    }

    #[test]
    fn annotations_that_are_not_allowed_do_nothing() {
        let asked = annotations([
            ("io.katacontainers.config.hypervisor.default_vcpus", "nonsense"),
            ("io.katacontainers.config.hypervisor.kernel_params", "init=/bin/sh"),
        ]);
        let none = size(&asked, Limits::default(), &settings("pod.allowed_annotations = []")).unwrap();
        let kernel_params = String::new();
        assert_eq!(
            none,
            Size {
                base_cpus: 1,
                cpus: 1,
                max_cpus: 1,
                memory_mib: 512,
                kernel_params,
                block_cache: DiskCache::Writeback
            }
        );
        let node = settings("guest.kernel_params = 'quiet'\npod.allowed_annotations = ['kernel_*']");
        assert_eq!(size(&asked, Limits::default(), &node).unwrap().kernel_params, "quiet init=/bin/sh");
    }

    #[test]
    fn nothing_is_larger_than_the_node_allows() {
        let node = settings("pod = { max_vcpus = 2, max_memory_mib = 1024 }");
        let limits = Limits {
            memory_bytes: u64::MAX,
            huge_pages_bytes: u64::MAX,
            cpu_quota_us: u64::MAX,
            cpu_period_us: 1,
            ..Limits::default()
        };
        let asked = annotations([
            ("io.katacontainers.config.hypervisor.default_maxvcpus", "32"),
            ("io.katacontainers.config.hypervisor.default_maxmemory", "4096"),
        ]);
        let size = size(&asked, limits, &node).unwrap();
        assert_eq!((size.cpus, size.memory_mib), (2, 1024));
    }

    #[test]
    fn what_is_no_number_is_named() {
        let wrong = annotations([("io.kubernetes.cri.sandbox-memory", "lots")]);
        assert!(Limits::of_sandbox(&wrong, None).unwrap_err().to_string().contains("sandbox-memory"));
        let wrong = annotations([("io.katacontainers.config.hypervisor.default_vcpus", "-1")]);
        assert!(sized(&wrong, Limits::default()).unwrap_err().to_string().contains("default_vcpus"));
        let none = annotations([("io.kubernetes.cri.sandbox-memory", "-1")]);
        assert_eq!(Limits::of_sandbox(&none, None).unwrap(), Limits::default());
    }

    proptest! {
        #[test]
        fn no_annotation_makes_sizing_panic(value in "\\PC*", memory: u64, quota: u64, period: u64) {
            for key in ["default_vcpus", "default_memory", "default_maxvcpus", "default_maxmemory"] {
                let name = format!("io.katacontainers.config.hypervisor.{key}");
                let limits = Limits { memory_bytes: memory, huge_pages_bytes: memory, cpu_quota_us: quota, cpu_period_us: period, ..Limits::default() };
                let _ = sized(&annotations([(&name, &value)]), limits);
            }
            let _ = Limits::of_sandbox(&annotations([("io.kubernetes.cri.sandbox-memory", &value)]), None);
        }
    }
}
