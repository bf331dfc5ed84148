//! Starts another process in a container.
//!
//! Not with libcontainer, whose 0.7 neither applies the container's seccomp filter to such a process nor joins its
//! user namespace. The steps are those of runc: join the namespaces, fork into the PID namespace, and in the child
//! the cgroup, session, streams, user, capabilities and filter, in the order that their privileges allow.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use libcontainer::capabilities;
use libcontainer::config::PersonalityDomain;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{IOPriorityClass, LinuxPersonalityDomain, Process, Spec};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Uid, ioctl_tiocsctty, setsid, umask};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::thread::{
    CpuSet, ThreadNameSpaceType, move_into_thread_name_spaces, sched_setaffinity, set_keep_capabilities,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::message::{Answer, ExecRequest};
use super::{Outcome, process};
use crate::cgroup::MOUNT_POINT;
use crate::container::rootfs;
use crate::container::spec::home_of;
use crate::error::{Error, Result, Step, chain};
use crate::streams::stdio::set_size;
use crate::sys::{Fork, exit_now, fork_sibling};

const NAMESPACES: [(&str, ThreadNameSpaceType); 8] = [
    ("user", ThreadNameSpaceType::USER),
    ("mnt", ThreadNameSpaceType::MOUNT),
    ("pid", ThreadNameSpaceType::PROCESS_ID),
    ("net", ThreadNameSpaceType::NETWORK),
    ("ipc", ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION),
    ("uts", ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME),
    ("cgroup", ThreadNameSpaceType::CONTROL_GROUP),
    ("time", ThreadNameSpaceType::TIME),
];

/// What the child needs and the parent has opened, while both are still outside.
struct Child {
    spec: Spec,
    process: Process,
    /// Files to write the child into its cgroup, by preference.
    cgroups: Vec<File>,
    streams: Vec<OwnedFd>,
}

pub(super) fn run(request: &ExecRequest, mut descriptors: Vec<OwnedFd>) -> Result<Outcome> {
    if descriptors.is_empty() {
        return Err(Error::failed("exec", "there is no container"));
    }
    let init = descriptors.remove(0);
    let mut child = Child {
        spec: Spec::load(request.bundle.join("config.json")).step("read the specification")?,
        process: request.process.clone(),
        cgroups: open_cgroups(request)?,
        streams: descriptors,
    };
    if child.process.scheduler().is_some() {
        return Err(Error::invalid("process.scheduler", "is not supported for another process of a container"));
    }
    process::set_oom_score(&child.process)?;
    let system = SyscallType::Linux.create_syscall();
    // Before the user namespace is joined, in which no limit could be raised.
    for limit in child.process.rlimits().iter().flatten() {
        system.set_rlimit(limit).step("process.rlimits: set one")?;
    }

    let namespaces = differing_namespaces(request.init_pid)?;
    // Before the user namespace is joined too: the agent's pipes are not that one's to give.
    let owner = outer_uid(request.init_pid, child.process.user().uid());
    for stream in &child.streams {
        process::give_stream(stream, owner).step("hand over a stream")?;
    }
    move_into_thread_name_spaces(init.as_fd(), namespaces).step("join the container's namespaces")?;
    if namespaces.contains(ThreadNameSpaceType::USER) {
        set_ids(0, 0).step("become the container's root")?;
    }
    set_home(&mut child.process);
    let terminal = if child.process.terminal() == Some(true) {
        let (master, slave) = open_terminal(child.process.user().uid())?;
        set_size(&master, request.window).step("set the terminal's size")?;
        child.streams = vec![slave];
        Some(master)
    } else {
        None
    };

    // Executing closes the pipe; until then errors come through it.
    let (errors, report) = pipe_with(PipeFlags::CLOEXEC).step("make a pipe")?;
    match fork_sibling().step("fork into the container")? {
        Fork::Child => {
            let error = child.become_program();
            let answer = match error {
                Error::Invalid { field, reason } => Answer::Invalid { field: field.into_owned(), reason },
                Error::Failed { step, cause } => Answer::Failed { step: step.into_owned(), cause },
                error => Answer::Failed { step: "exec".into(), cause: error.to_string() },
            };
            let _ = File::from(report).write_all(&serde_json::to_vec(&answer).unwrap_or_default());
            exit_now(255)
        }
        Fork::Parent(pid) => {
            drop(report);
            drop(child);
            let mut answer = Vec::new();
            File::from(errors).read_to_end(&mut answer).step("hear from the process")?;
            if answer.is_empty() {
                return Ok(Outcome { pid: Some(pid), terminal });
            }
            let answer: Answer = serde_json::from_slice(&answer).step("understand the process")?;
            answer.into_result().map(|_| Outcome { pid: None, terminal: None })
        }
    }
}

/// The container's cgroup; and that of its first process, because a container that has made cgroups of its own can
/// have processes only in those.
fn open_cgroups(request: &ExecRequest) -> Result<Vec<File>> {
    let open = |directory: &Path| File::options().write(true).open(directory.join("cgroup.procs"));
    let mut cgroups = vec![open(&request.cgroup).step("open the container's cgroup")?];
    let of_init = fs::read_to_string(format!("/proc/{}/cgroup", request.init_pid)).unwrap_or_default();
    if let Some(path) = of_init.lines().find_map(|line| line.strip_prefix("0::/")) {
        let directory = PathBuf::from(MOUNT_POINT).join(path);
        if directory.starts_with(&request.cgroup) && directory != request.cgroup {
            cgroups.extend(open(&directory));
        }
    }
    Ok(cgroups)
}

/// The namespaces in which the container's first process is and this one is not. Joining one's own user namespace
/// is an error, and joining others for nothing costs time.
fn differing_namespaces(init_pid: i32) -> Result<ThreadNameSpaceType> {
    let mut differing = ThreadNameSpaceType::empty();
    for (name, namespace) in NAMESPACES {
        let Ok(own) = fs::read_link(format!("/proc/self/ns/{name}")) else {
            // A kind that this kernel does not have.
            continue;
        };
        let theirs = fs::read_link(format!("/proc/{init_pid}/ns/{name}")).step("look up the container's namespaces")?;
        if own != theirs {
            differing |= namespace;
        }
    }
    Ok(differing)
}

/// A user of the container in the guest's numbers, by the mapping of the container's first process.
fn outer_uid(init_pid: i32, uid: u32) -> u32 {
    let mappings = fs::read_to_string(format!("/proc/{init_pid}/uid_map")).unwrap_or_default();
    map_uid(&mappings, uid).unwrap_or(uid)
}

/// Looks a user up in lines of a first user inside, a first user outside, and a number of users.
fn map_uid(mappings: &str, uid: u32) -> Option<u32> {
    mappings.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let (inside, outside, count) = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        let distance = uid.checked_sub(inside)?;
        (distance < count).then(|| outside.checked_add(distance))?
    })
}

/// As at creation, but after joining: the container may have changed its users.
fn set_home(process: &mut Process) {
    let mut env = process.env().clone().unwrap_or_default();
    if env.iter().any(|variable| variable.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        return;
    }
    env.retain(|variable| !variable.starts_with("HOME="));
    let passwd = rootfs::read(Path::new("/"), Path::new("etc/passwd")).unwrap_or_default();
    env.push(format!("HOME={}", home_of(&passwd, process.user().uid())));
    process.set_env(Some(env));
}

/// A new terminal of the container's own /dev/pts, which belongs to the given user.
fn open_terminal(uid: u32) -> Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).step("open /dev/ptmx in the container")?;
    unlockpt(&master).step("unlock the terminal")?;
    let slave = ioctl_tiocgptpeer(&master, flags).step("open the terminal")?;
    rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None).step("hand over the terminal")?;
    Ok((master, slave))
}

fn set_ids(uid: u32, gid: u32) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)
}

impl Child {
    /// Returns only if something goes wrong.
    fn become_program(&self) -> Error {
        match self.prepare() {
            Ok(()) => process::execute(&self.process),
            Err(error) => error,
        }
    }

    fn prepare(&self) -> Result<()> {
        let system = SyscallType::Linux.create_syscall();
        let (spec, process) = (&self.spec, &self.process);
        let linux = spec.linux().as_ref().ok_or_else(|| Error::invalid("linux", "is missing"))?;
        let affinity = process.exec_cpu_affinity().as_ref();
        set_affinity(affinity.and_then(|affinity| affinity.initial().as_deref()))?;
        self.join_cgroup()?;
        set_affinity(affinity.and_then(|affinity| affinity.cpu_affinity_final().as_deref()))?;
        setsid().step("make a session")?;
        self.take_streams()?;
        if let Some(priority) = process.io_priority() {
            let class = match priority.class() {
                IOPriorityClass::IoprioClassRt => 1,
                IOPriorityClass::IoprioClassBe => 2,
                IOPriorityClass::IoprioClassIdle => 3,
            };
            system.set_io_priority(class, priority.priority()).step("process.ioPriority: set it")?;
        }
        if let Some(personality) = linux.personality() {
            let domain = match personality.domain() {
                LinuxPersonalityDomain::PerLinux => PersonalityDomain::Linux,
                LinuxPersonalityDomain::PerLinux32 => PersonalityDomain::Linux32,
            };
            system.personality(domain).step("linux.personality: set it")?;
        }
        let user = process.user();
        umask(Mode::from_raw_mode(user.umask().unwrap_or(0o022)));
        let no_new_privileges = process.no_new_privileges() == Some(true);
        if no_new_privileges {
            set_no_new_privs(true).step("process.noNewPrivileges: set it")?;
        }
        // As root where that is allowed, then as the user, for directories that only one of the two may enter.
        let entered = std::env::set_current_dir(process.cwd());

        let groups: Vec<_> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
        match set_thread_groups(&groups) {
            // A user namespace that does not allow it, and nothing to set.
            Err(Errno::PERM) if groups.is_empty() => {}
            result => result.step("process.user.additionalGids: set them")?,
        }
        set_keep_capabilities(true).step("keep the capabilities")?;
        set_ids(user.uid(), user.gid()).step("process.user: become it")?;
        capabilities::reset_effective(system.as_ref()).step("regain the capabilities")?;
        set_keep_capabilities(false).step("keep the capabilities no more")?;
        if let Err(first) = entered {
            std::env::set_current_dir(process.cwd())
                .map_err(|_| Error::invalid("process.cwd", format!("{}: {first}", process.cwd().display())))?;
        }
        // A working directory outside the container's root would show as "(unreachable)" or fail.
        match std::env::current_dir() {
            Ok(directory) if directory.is_absolute() => {}
            _ => return Err(Error::invalid("process.cwd", "is not inside the container")),
        }

        // Loading a filter takes CAP_SYS_ADMIN or the promise to gain no privileges; with the promise it can wait
        // until hardly anything is left that it would have to allow.
        if !no_new_privileges {
            self.load_filter()?;
        }
        if let Some(sets) = process.capabilities() {
            capabilities::drop_privileges(sets, system.as_ref()).step("process.capabilities: set them")?;
        }
        if no_new_privileges {
            self.load_filter()?;
        }
        Ok(())
    }

    fn join_cgroup(&self) -> Result<()> {
        let mut result = Ok(());
        for cgroup in &self.cgroups {
            result = (&mut &*cgroup).write_all(b"0");
            if result.is_ok() {
                break;
            }
        }
        result.step("join the container's cgroup")
    }

    fn take_streams(&self) -> Result<()> {
        let (stdin, stdout, stderr) = match self.streams.as_slice() {
            [terminal] => {
                ioctl_tiocsctty(terminal).step("take the terminal")?;
                (terminal, terminal, terminal)
            }
            [stdin, stdout, stderr] => (stdin, stdout, stderr),
            _ => return Err(Error::failed("take the streams", "there are none")),
        };
        rustix::stdio::dup2_stdin(stdin).step("take stdin")?;
        rustix::stdio::dup2_stdout(stdout).step("take stdout")?;
        rustix::stdio::dup2_stderr(stderr).step("take stderr")
    }

    fn load_filter(&self) -> Result<()> {
        let Some(seccomp) = self.spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()) else {
            return Ok(());
        };
        libcontainer::seccomp::initialize_seccomp(seccomp)
            .map(|_| ())
            .map_err(|error| Error::failed("linux.seccomp: load the filter", chain(&error)))
    }
}

/// Restricts the calling process to CPUs given as a list such as "0-3,7".
fn set_affinity(list: Option<&str>) -> Result<()> {
    let Some(list) = list.filter(|list| !list.is_empty()) else { return Ok(()) };
    let cpus = parse_cpus(list)
        .ok_or_else(|| Error::invalid("process.execCPUAffinity", format!("{list:?} is not a list of CPUs")))?;
    sched_setaffinity(None, &cpus).step("process.execCPUAffinity: set it")
}

fn parse_cpus(list: &str) -> Option<CpuSet> {
    let mut cpus = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= CpuSet::MAX_CPU {
            return None;
        }
        (first..=last).for_each(|cpu| cpus.set(cpu));
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_mapped_to_the_guests_numbers() {
        let mappings = "         0     100000      65536\n     65536          5          1\n";
        assert_eq!(map_uid(mappings, 0), Some(100_000));
        assert_eq!(map_uid(mappings, 33), Some(100_033));
        assert_eq!(map_uid(mappings, 65536), Some(5));
        assert_eq!(map_uid(mappings, 65537), None);
    }

    #[test]
    fn cpu_lists_are_understood() {
        let cpus = parse_cpus("0-2, 5").unwrap();
        assert_eq!((0..8).filter(|cpu| cpus.is_set(*cpu)).collect::<Vec<_>>(), [0, 1, 2, 5]);
        for list in ["", "x", "3-1", "1-", "0-99999"] {
            assert!(parse_cpus(list).is_none(), "{list}");
        }
    }
}
