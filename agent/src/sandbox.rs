//! The guest as a whole: what makes it one pod's sandbox, what it knows of itself, its end.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hull_protocol::MAX_ENTROPY_BYTES;
use rustix::system::{RebootCommand, reboot, sethostname, sysinfo};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::container::Containers;
use crate::container::spec::set_sysctls;
use crate::cpus;
use crate::error::{Error, Result, Step};
use crate::init;
use crate::network::{self, Network};
use crate::storage::Storage;

/// Longest host name of Linux.
const HOSTNAME_BYTES: usize = 64;
/// How long writing back file systems may take at shutdown before the power goes off anyway.
const SYNC_TIMEOUT: Duration = Duration::from_secs(30);
/// What is left to the answer of a shutdown to reach the host.
const ANSWER_TIME: Duration = Duration::from_millis(5);

pub(crate) struct Sandbox {
    /// Whether this is the init process of a guest, rather than a test on some machine.
    is_guest: bool,
    created: AtomicBool,
    /// What the network is, once it is set up.
    network: tokio::sync::Mutex<Option<Arc<Network>>>,
    /// Microseconds from the kernel's start until the agent listened.
    pub(crate) ready_us: u64,
}

pub(crate) struct CreateRequest {
    pub(crate) hostname: String,
    /// 0 leaves the clock alone.
    pub(crate) time_ns: u64,
    pub(crate) entropy: Vec<u8>,
    pub(crate) storages: Vec<Storage>,
    pub(crate) sysctls: HashMap<String, String>,
    /// None leaves interfaces alone.
    pub(crate) network: Option<Network>,
}

pub(crate) struct Stats {
    pub(crate) memory_total_bytes: u64,
    pub(crate) memory_available_bytes: u64,
    pub(crate) memory_free_bytes: u64,
    pub(crate) memory_inactive_file_bytes: u64,
    pub(crate) cpus_online: u32,
    /// In thousandths.
    pub(crate) load_1m_milli: u32,
    pub(crate) uptime_ms: u64,
    pub(crate) agent_resident_bytes: u64,
}

impl Sandbox {
    pub(crate) fn new(is_guest: bool) -> Self {
        Self {
            is_guest,
            created: AtomicBool::new(false),
            network: tokio::sync::Mutex::default(),
            ready_us: uptime_us(),
        }
    }

    /// Makes the guest into a sandbox; once.
    pub(crate) async fn create(&self, request: CreateRequest) -> Result<()> {
        check_entropy(&request.entropy)?;
        check_hostname(&request.hostname)?;
        if self.created.swap(true, Ordering::Relaxed) {
            return Err(Error::Exists("the sandbox".into()));
        }
        if request.time_ns != 0 {
            set_time(request.time_ns)?;
        }
        if !request.entropy.is_empty() {
            reseed(&request.entropy)?;
        }
        if !request.hostname.is_empty() {
            sethostname(request.hostname.as_bytes()).step("set the host name")?;
        }
        if self.is_guest {
            init::mount_on_demand();
        }
        if let Some(network) = request.network {
            let network = Arc::new(network);
            let wanted = network.clone();
            spawn_blocking(move || network::set_up(&wanted)).await.step("set up the network").flatten()?;
            *self.network.lock().await = Some(network);
        }
        set_sysctls(&request.sysctls)?;
        for storage in request.storages {
            storage.mount().await?;
        }
        Ok(())
    }

    /// Changes the network. What the kernel refuses is tried again with the next change.
    pub(crate) async fn update_network(&self, new: Network) -> Result<()> {
        let mut current = self.network.lock().await;
        let Some(old) = current.clone() else {
            return Err(Error::State("the sandbox has no network to change".into()));
        };
        let updated = spawn_blocking(move || network::update(&old, &new)).await;
        let (now, outcome) = updated.step("change the network")?;
        *current = Some(Arc::new(now));
        outcome
    }

    /// Ends everything, after a moment for the answer to get through.
    pub(crate) async fn shut_down(&self, containers: &Containers) {
        tokio::time::sleep(ANSWER_TIME).await;
        if let Err(error) = containers.kill_all().await {
            tracing::error!("shut down: {error}");
        }
        let write_back = async {
            containers.unmount_all().await;
            spawn_blocking(rustix::fs::sync).await
        };
        if timeout(SYNC_TIMEOUT, write_back).await.is_err() {
            tracing::error!("shut down: file systems take too long to write back");
        }
        if !self.is_guest {
            std::process::exit(0);
        }
        // Without a way to turn the power off, the call fails or halts; a reset ends the guest as well, since the
        // VMM takes it for the end.
        if let Err(error) = reboot(RebootCommand::PowerOff) {
            tracing::error!("turn the power off: {error}");
        }
        if let Err(error) = reboot(RebootCommand::Restart) {
            tracing::error!("restart: {error}");
        }
    }
}

/// Microseconds since the kernel's start.
pub(crate) fn uptime_us() -> u64 {
    let since_boot = clock_gettime(ClockId::Monotonic);
    since_boot.tv_sec as u64 * 1_000_000 + since_boot.tv_nsec as u64 / 1000
}

fn check_entropy(entropy: &[u8]) -> Result<()> {
    if entropy.len() > MAX_ENTROPY_BYTES {
        return Err(Error::invalid("entropy", format!("is longer than {MAX_ENTROPY_BYTES} bytes")));
    }
    Ok(())
}

fn check_hostname(hostname: &str) -> Result<()> {
    if hostname.len() > HOSTNAME_BYTES || hostname.contains('\0') {
        return Err(Error::invalid("hostname", format!("is not a name of at most {HOSTNAME_BYTES} bytes")));
    }
    Ok(())
}

/// Sets the time of day.
pub(crate) fn set_time(time_ns: u64) -> Result<()> {
    let time = Timespec { tv_sec: (time_ns / 1_000_000_000) as i64, tv_nsec: (time_ns % 1_000_000_000) as i64 };
    clock_settime(ClockId::Realtime, time).step("set the clock")
}

/// Gives the kernel new entropy and has its generator use it at once.
pub(crate) fn reseed(entropy: &[u8]) -> Result<()> {
    check_entropy(entropy)?;
    if entropy.is_empty() {
        return Err(Error::invalid("entropy", "is empty"));
    }
    let random = fs::File::options().write(true).open("/dev/urandom").step("open /dev/urandom")?;
    crate::sys::add_entropy(&random, entropy).step("add the entropy")
}

pub(crate) fn stats() -> Result<Stats> {
    let system = sysinfo();
    let meminfo = fs::read_to_string("/proc/meminfo").step("read /proc/meminfo")?;
    let statm = fs::read_to_string("/proc/self/statm").step("read /proc/self/statm")?;
    let resident_pages: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    let since_boot = clock_gettime(ClockId::Boottime);
    Ok(Stats {
        memory_total_bytes: meminfo_bytes(&meminfo, "MemTotal"),
        memory_available_bytes: meminfo_bytes(&meminfo, "MemAvailable"),
        memory_free_bytes: meminfo_bytes(&meminfo, "MemFree"),
        memory_inactive_file_bytes: meminfo_bytes(&meminfo, "Inactive(file)"),
        cpus_online: cpus::online()?,
        // A fixed-point number with 16 bits behind the point.
        load_1m_milli: (system.loads[0] * 1000 / 65536) as u32,
        uptime_ms: since_boot.tv_sec as u64 * 1000 + since_boot.tv_nsec as u64 / 1_000_000,
        agent_resident_bytes: resident_pages * rustix::param::page_size() as u64,
    })
}

/// A line such as "MemTotal:  1024 kB".
fn meminfo_bytes(meminfo: &str, key: &str) -> u64 {
    meminfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(found, _)| *found == key)
        .and_then(|(_, value)| value.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_in_bytes() {
        let meminfo = "MemTotal:         128 kB\nMemFree:  1 kB\nMemAvailable:   64 kB\n";
        assert_eq!(meminfo_bytes(meminfo, "MemAvailable"), 65536);
        assert_eq!(meminfo_bytes(meminfo, "Missing"), 0);
    }

    #[test]
    fn entropy_and_names_have_bounds() {
        assert!(check_entropy(&[0; MAX_ENTROPY_BYTES]).is_ok());
        assert!(check_entropy(&[0; MAX_ENTROPY_BYTES + 1]).is_err());
        assert!(reseed(&[]).is_err());
        assert!(check_hostname(&"h".repeat(65)).is_err());
    }

    #[test]
    fn the_agent_knows_its_own_size() {
        let stats = stats().unwrap();
        assert!(stats.agent_resident_bytes > 0 && stats.memory_total_bytes > stats.agent_resident_bytes);
    }
}
