//! What a caller wants of a sandbox, checked once.

use std::collections::HashMap;
use std::time::Duration;

use hull_vmm_api::config::{MAX_CPUS, MAX_MEMORY_MIB};

use crate::network::Network;

/// Least memory in MiB that a sandbox may have: kernel, agent and a small program fit.
pub const MIN_MEMORY_MIB: u64 = 64;

/// What a caller wants of a sandbox.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// Its name in the state directory and in messages.
    pub id: String,
    /// A second name that people choose, unique on the host.
    pub name: Option<String>,
    /// Virtual CPUs at boot.
    pub cpus: u8,
    /// The most that may be brought online later, [`Self::cpus`] included.
    pub max_cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The guest's host name.
    pub hostname: String,
    /// Sysctls of the guest as a whole, by name with dots.
    pub sysctls: HashMap<String, String>,
    /// Words added to the end of the kernel's command line.
    pub kernel_params: String,
    /// Where its network comes from.
    pub network: Network,
    /// How long the agent may take to answer after the VMM's start.
    pub boot_timeout: Duration,
}

/// A wish that cannot be fulfilled.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// An identifier that would not do as a file name, or in the agent's eyes.
    #[error(
        "{0:?} is not a valid name: use 1 to 64 letters, digits, '-', '_' and '.', starting with a letter or digit"
    )]
    Name(String),
    /// Too few or too many CPUs.
    #[error("{0} CPUs: a sandbox has 1 to {MAX_CPUS}")]
    Cpus(u8),
    /// Fewer or more CPUs at most than can be.
    #[error("{max} CPUs at most: a sandbox that starts with {cpus} may have {cpus} to {MAX_CPUS} later")]
    MaxCpus {
        /// How many it starts with.
        cpus: u8,
        /// How many it was to have at most.
        max: u8,
    },
    /// Too little memory.
    #[error("{0} MiB of memory: a sandbox needs {MIN_MEMORY_MIB} MiB or more")]
    MemoryTooSmall(u64),
    /// More memory than the host has, or than the VMM can give.
    #[error("{wanted} MiB of memory: this host has {available} MiB; ask for less")]
    MemoryTooLarge {
        /// What was asked for, in MiB.
        wanted: u64,
        /// What there is, in MiB.
        available: u64,
    },
}

/// Longest identifier. The two sockets of a sandbox lie in a directory of this name, and a socket's path has 107 bytes.
const MAX_NAME_BYTES: usize = 64;

/// Whether `name` can be the identifier or the name of a sandbox or container.
///
/// # Errors
///
/// Says what a name is made of.
pub fn check_name(name: &str) -> Result<(), ConfigError> {
    let mut bytes = name.bytes();
    let starts = bytes.next().is_some_and(|first| first.is_ascii_alphanumeric());
    let goes_on = bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if starts && goes_on && name.len() <= MAX_NAME_BYTES { Ok(()) } else { Err(ConfigError::Name(name.to_owned())) }
}

impl SandboxConfig {
    /// Checks the wish against what a VM may be and what this host has.
    ///
    /// # Errors
    ///
    /// Names the first thing that cannot be.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.check_against(host_memory_mib())
    }

    fn check_against(&self, host_memory_mib: u64) -> Result<(), ConfigError> {
        check_name(&self.id)?;
        self.name.as_deref().map_or(Ok(()), check_name)?;
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return Err(ConfigError::Cpus(self.cpus));
        }
        if self.max_cpus < self.cpus || self.max_cpus > MAX_CPUS {
            return Err(ConfigError::MaxCpus { cpus: self.cpus, max: self.max_cpus });
        }
        if self.memory_mib < MIN_MEMORY_MIB {
            return Err(ConfigError::MemoryTooSmall(self.memory_mib));
        }
        if self.memory_mib > host_memory_mib {
            return Err(ConfigError::MemoryTooLarge { wanted: self.memory_mib, available: host_memory_mib });
        }
        Ok(())
    }

    /// The guest kernel's command line; guest-kernel-config/README.md has the reason of each word.
    pub(crate) fn cmdline(&self) -> String {
        let mut cmdline = String::from(KERNEL_PARAMS);
        if !self.kernel_params.is_empty() {
            cmdline.push(' ');
            cmdline.push_str(&self.kernel_params);
        }
        cmdline
    }
}

/// The words that every guest kernel gets. The root is the guest's image, read where it lies in the host's page cache.
const KERNEL_PARAMS: &str = "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro rootwait init=/init console=hvc0 \
    quiet loglevel=3 panic=-1 8250.nr_uarts=0 swiotlb=noforce no_timer_check tsc=reliable rcupdate.rcu_expedited=1";

/// What this host has, and a guest at most; in MiB.
#[must_use]
pub fn host_memory_mib() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total_kib = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok());
    // Without /proc nothing can be said, and the VMM's own attempt to map the memory decides.
    total_kib.map_or(MAX_MEMORY_MIB, |kib| kib / 1024).min(MAX_MEMORY_MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> SandboxConfig {
        SandboxConfig {
            id: "a".into(),
            name: None,
            cpus: 1,
            max_cpus: 1,
            memory_mib: 128,
            hostname: "a".into(),
            sysctls: HashMap::new(),
            kernel_params: String::new(),
            network: Network::None,
            boot_timeout: Duration::from_secs(30),
        }
    }

    #[test]
    fn accepts_what_fits() {
        assert_eq!(config().check_against(1024), Ok(()));
    }

    #[test]
    fn refuses_no_and_too_many_cpus() {
        for cpus in [0, MAX_CPUS + 1, 255] {
            let wish = SandboxConfig { cpus, ..config() };
            assert_eq!(wish.check_against(1024), Err(ConfigError::Cpus(cpus)));
        }
    }

    #[test]
    fn refuses_a_most_below_the_start_or_above_what_can_be() {
        for max_cpus in [1, MAX_CPUS + 1] {
            let wish = SandboxConfig { cpus: 2, max_cpus, ..config() };
            assert_eq!(wish.check_against(1024), Err(ConfigError::MaxCpus { cpus: 2, max: max_cpus }));
        }
        assert_eq!(SandboxConfig { max_cpus: MAX_CPUS, ..config() }.check_against(1024), Ok(()));
    }

    #[test]
    fn refuses_more_memory_than_the_host_has() {
        let wish = SandboxConfig { memory_mib: 2048, ..config() };
        assert_eq!(wish.check_against(1024), Err(ConfigError::MemoryTooLarge { wanted: 2048, available: 1024 }));
    }

    #[test]
    fn refuses_names_that_are_paths() {
        for name in ["", ".", "..", "a/b", "../a", "a b", "-a", "é", &"a".repeat(65)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        for name in ["a", "web-1", "A_b.c", &"a".repeat(64)] {
            assert!(check_name(name).is_ok(), "{name:?}");
        }
    }
}
