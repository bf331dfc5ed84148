//! The annotations of config.json: which pod a container belongs to, and how large the pod is to be.

use std::collections::HashMap;

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

/// Virtual CPUs of a pod that asks for nothing.
const DEFAULT_CPUS: u64 = 1;
/// Memory in MiB of a pod without a limit: what it does not touch costs the host nothing.
const DEFAULT_MEMORY_MIB: u64 = 512;
/// What kernel, agent and the kernel's own books need besides a pod's limit, so that a limit is reached before the guest is full.
const OVERHEAD_MIB: u64 = 96;

const MIB: u64 = 1 << 20;

/// How large a pod's VM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) cpus: u8,
    pub(crate) memory_mib: u64,
    pub(crate) kernel_params: String,
}

/// A pod's limits; 0 where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) memory_bytes: u64,
    pub(crate) cpu_quota_us: u64,
    pub(crate) cpu_period_us: u64,
}

impl Limits {
    /// Reads the sandbox's limits as CRI has summed them over the pod.
    ///
    /// # Errors
    ///
    /// Names an annotation that is no number.
    pub(crate) fn of_sandbox(annotations: &Annotations) -> Result<Self> {
        Ok(Self {
            memory_bytes: number(annotations, "io.kubernetes.cri.sandbox-memory")?,
            cpu_quota_us: number(annotations, "io.kubernetes.cri.sandbox-cpu-quota")?,
            cpu_period_us: number(annotations, "io.kubernetes.cri.sandbox-cpu-period")?,
        })
    }
}

/// Decides a pod's size from its limits, and from Kata's annotations, which win.
///
/// # Errors
///
/// Names the annotation that is no number or out of range.
pub(crate) fn size(annotations: &Annotations, limits: Limits) -> Result<Size> {
    const HYPERVISOR: &str = "io.katacontainers.config.hypervisor.";
    let asked = |key: &str| -> Result<Option<u64>> {
        let name = format!("{HYPERVISOR}{key}");
        annotations.get(&name).map(|text| parse(&name, text)).transpose()
    };
    let cpus_default = asked("default_vcpus")?.unwrap_or(DEFAULT_CPUS);
    let cpus_limit = match limits.cpu_quota_us {
        0 => 0,
        quota => quota.div_ceil(limits.cpu_period_us.max(1)),
    };
    let cpus = cpus_default.max(cpus_limit).min(asked("default_maxvcpus")?.filter(|max| *max > 0).unwrap_or(u64::MAX));
    let cpus = u8::try_from(cpus).map_err(|_| Error::Invalid(format!("{cpus} virtual CPUs are too many")))?;

    let memory_default = asked("default_memory")?;
    let memory_mib = match (limits.memory_bytes, memory_default) {
        (0, None) => DEFAULT_MEMORY_MIB,
        (0, Some(mib)) => mib,
        (bytes, base) => base.unwrap_or(OVERHEAD_MIB).saturating_add(bytes.div_ceil(MIB)),
    };
    let memory_mib = memory_mib.min(asked("default_maxmemory")?.filter(|max| *max > 0).unwrap_or(u64::MAX));
    let kernel_params = annotations.get(&format!("{HYPERVISOR}kernel_params")).cloned().unwrap_or_default();
    for name in annotations.keys().filter(|name| name.starts_with("io.katacontainers.")) {
        let known = ["default_vcpus", "default_memory", "default_maxvcpus", "default_maxmemory", "kernel_params"];
        if !name.strip_prefix(HYPERVISOR).is_some_and(|key| known.contains(&key)) {
            tracing::warn!("the annotation {name} has no meaning here and is ignored");
        }
    }
    Ok(Size { cpus, memory_mib, kernel_params })
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
        let default = size(&annotations([]), Limits::default()).unwrap();
        assert_eq!((default.cpus, default.memory_mib), (1, DEFAULT_MEMORY_MIB));
        let limits = Limits { memory_bytes: 16 * MIB, cpu_quota_us: 150_000, cpu_period_us: 100_000 };
        let small = size(&annotations([]), limits).unwrap();
        assert_eq!((small.cpus, small.memory_mib), (2, OVERHEAD_MIB + 16));
    }

    #[test]
    fn katas_annotations_win_and_are_capped_by_their_maxima() {
        let asked = annotations([
            ("io.katacontainers.config.hypervisor.default_vcpus", "4"),
            ("io.katacontainers.config.hypervisor.default_maxvcpus", "3"),
            ("io.katacontainers.config.hypervisor.default_memory", "2048"),
            ("io.katacontainers.config.hypervisor.kernel_params", "quiet"),
        ]);
        let size = size(&asked, Limits::default()).unwrap();
        assert_eq!(size, Size { cpus: 3, memory_mib: 2048, kernel_params: "quiet".into() });
    }

    #[test]
    fn what_is_no_number_is_named() {
        let wrong = annotations([("io.kubernetes.cri.sandbox-memory", "lots")]);
        assert!(Limits::of_sandbox(&wrong).unwrap_err().to_string().contains("sandbox-memory"));
        let wrong = annotations([("io.katacontainers.config.hypervisor.default_vcpus", "-1")]);
        assert!(size(&wrong, Limits::default()).unwrap_err().to_string().contains("default_vcpus"));
        let none = annotations([("io.kubernetes.cri.sandbox-memory", "-1")]);
        assert_eq!(Limits::of_sandbox(&none).unwrap(), Limits::default());
    }

    proptest! {
        #[test]
        fn no_annotation_makes_sizing_panic(value in "\\PC*", memory: u64, quota: u64, period: u64) {
            for key in ["default_vcpus", "default_memory", "default_maxvcpus", "default_maxmemory"] {
                let name = format!("io.katacontainers.config.hypervisor.{key}");
                let limits = Limits { memory_bytes: memory, cpu_quota_us: quota, cpu_period_us: period };
                let _ = size(&annotations([(&name, &value)]), limits);
            }
            let _ = Limits::of_sandbox(&annotations([("io.kubernetes.cri.sandbox-memory", &value)]));
        }
    }
}
