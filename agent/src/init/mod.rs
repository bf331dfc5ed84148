//! What PID 1 does before it serves: file systems, cgroups, the loopback interface. Everything that a first request needs
//! comes before listening, the rest right after it.

mod cmdline;
mod mounts;

use std::fs;
use std::os::unix::fs::symlink;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::{Resource, Rlimit, getpid, setrlimit};
use tracing::level_filters::LevelFilter;

pub(crate) use mounts::mount_on_demand;

use crate::cgroup::Cgroup;
use crate::error::{Result, Step};

/// The agent's own cgroup, beside the one with the containers'.
const AGENT_CGROUP: &str = "/agent";
/// The cgroup above all containers'.
pub(crate) const CONTAINERS_CGROUP: &str = "/containers";

/// Open files of the agent itself: three connections and as many pipes for each of a few thousand processes.
const OPEN_FILES: Rlimit = Rlimit { current: Some(65_536), maximum: Some(1 << 20) };

/// What must be there before the agent can listen and answer.
pub(crate) fn early() -> Result<()> {
    mounts::mount_early()?;
    crate::log::start(log_level(), true);
    Ok(())
}

/// What must be there before a container can be made. A step that fails is logged and left out: an agent that
/// answers is worth more than one that has panicked the kernel.
pub(crate) fn late() {
    mounts::mount_late();
    for (step, result) in [
        ("links in /dev", link_devices()),
        ("the loopback interface", raise_loopback()),
        ("cgroups", set_up_cgroups()),
        ("limits", set_limits()),
    ] {
        if let Err(error) = result {
            tracing::error!("set up {step}: {error}");
        }
    }
}

fn log_level() -> LevelFilter {
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    cmdline::value(&cmdline, "hull.log").and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::ERROR)
}

fn link_devices() -> Result<()> {
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, link).step_with(|| format!("link {link}"))?;
    }
    // The multiplexer of the mounted devpts instead of the kernel's node.
    let _ = fs::remove_file("/dev/ptmx");
    symlink("pts/ptmx", "/dev/ptmx").step("link /dev/ptmx")
}

fn raise_loopback() -> Result<()> {
    let socket =
        socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).step("open a socket")?;
    crate::sys::set_interface_up(&socket, "lo").step("raise lo")
}

fn set_up_cgroups() -> Result<()> {
    let root = Cgroup::at("/".as_ref());
    root.enable_controllers()?;
    let agent = Cgroup::at(AGENT_CGROUP.as_ref());
    agent.create()?;
    agent.add(getpid()).step("join the agent's cgroup")?;
    make_containers_cgroup(CONTAINERS_CGROUP).map(|_| ())
}

/// Makes the cgroup above all containers', whose children have all controllers.
pub(crate) fn make_containers_cgroup(path: &str) -> Result<Cgroup> {
    let containers = Cgroup::at(path.as_ref());
    containers.create()?;
    containers.enable_controllers()?;
    Ok(containers)
}

fn set_limits() -> Result<()> {
    setrlimit(Resource::Nofile, OPEN_FILES).step("set the limit of open files")?;
    // The guest ends with the agent, so the agent is the last to go. Helpers set their own value.
    fs::write("/proc/self/oom_score_adj", "-1000").step("set the OOM score")
}
