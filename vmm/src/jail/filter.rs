//! What the process may ask of the kernel while its guest runs.
//!
//! One filter holds for all threads: a virtual CPU's thread starts the threads of the devices that its guest activates, and a thread
//! passes its filter on, so a narrower one for virtual CPUs would bind the devices too. System calls that would let the
//! process out of its bounds in spite of the jail, such as executing a program, opening a socket or tracing another
//! process, are not in the list; of calls with many faces only the faces in use are.
//!
//! A call that is not allowed kills the process with `SIGSYS`.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::arch::filter::IOCTLS;

/// Why the filter could not be set.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The list cannot be made into a filter.
    #[error("cannot make the system call filter: {0}")]
    Compile(#[from] seccompiler::BackendError),
    /// The kernel refused it.
    #[error("cannot set the system call filter: {0}; the kernel needs CONFIG_SECCOMP_FILTER")]
    Apply(#[from] seccompiler::Error),
}

/// Allowed whatever their arguments, in groups by who needs them.
const ALLOWED: [&[libc::c_long]; 6] = [
    // Threads, memory and time: the language's runtime and the C library.
    &[
        libc::SYS_brk,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_futex,
        libc::SYS_getpid,
        libc::SYS_getrandom,
        libc::SYS_gettid,
        libc::SYS_madvise,
        libc::SYS_membarrier,
        libc::SYS_mincore,
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_mremap,
        libc::SYS_munmap,
        libc::SYS_restart_syscall,
        libc::SYS_rseq,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_yield,
        libc::SYS_set_robust_list,
        libc::SYS_sigaltstack,
        libc::SYS_tgkill,
    ],
    // Descriptors and waiting for them.
    &[
        libc::SYS_close,
        libc::SYS_dup,
        libc::SYS_dup3,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_epoll_pwait,
        libc::SYS_eventfd2,
        libc::SYS_fcntl,
        libc::SYS_ppoll,
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_write,
        libc::SYS_writev,
    ],
    // Connections on sockets that exist: the socket device and the control protocol. No new ones are made.
    &[
        libc::SYS_accept4,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_sendto,
        libc::SYS_shutdown,
    ],
    // Disks.
    &[
        libc::SYS_fallocate,
        libc::SYS_fdatasync,
        libc::SYS_fstat,
        libc::SYS_fsync,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_io_uring_setup,
        libc::SYS_lseek,
        libc::SYS_pread64,
        libc::SYS_preadv,
        libc::SYS_preadv2,
        libc::SYS_pwrite64,
        libc::SYS_pwritev,
        libc::SYS_pwritev2,
    ],
    // The file server: files below the root, and whom they are made as.
    &[
        libc::SYS_capget,
        libc::SYS_capset,
        libc::SYS_copy_file_range,
        libc::SYS_fadvise64,
        libc::SYS_fanotify_init,
        libc::SYS_fanotify_mark,
        libc::SYS_fchdir,
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        libc::SYS_fchown,
        libc::SYS_fchownat,
        libc::SYS_flock,
        libc::SYS_fstatfs,
        libc::SYS_ftruncate,
        libc::SYS_getdents64,
        libc::SYS_getegid,
        libc::SYS_geteuid,
        libc::SYS_getxattr,
        libc::SYS_linkat,
        libc::SYS_listxattr,
        libc::SYS_mkdirat,
        libc::SYS_mknodat,
        libc::SYS_name_to_handle_at,
        libc::SYS_newfstatat,
        libc::SYS_openat,
        libc::SYS_readlinkat,
        libc::SYS_removexattr,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_setfsgid,
        libc::SYS_setfsuid,
        libc::SYS_setxattr,
        libc::SYS_statx,
        libc::SYS_symlinkat,
        libc::SYS_syncfs,
        libc::SYS_umask,
        libc::SYS_unlinkat,
        libc::SYS_utimensat,
    ],
    crate::arch::filter::ALLOWED,
];

/// Requests of ioctl(2) that are not KVM's: disks that are block devices (linux/fs.h), sockets that do not block, and
/// settings of taps that exist (linux/if_tun.h).
const DEVICE_IOCTLS: [u32; 13] = [
    0x8008_1272, // BLKGETSIZE64
    0x1268,      // BLKSSZGET
    0x127b,      // BLKPBSZGET
    0x1278,      // BLKIOMIN
    0x1279,      // BLKIOOPT
    0x127a,      // BLKALIGNOFF
    0x1277,      // BLKDISCARD
    0x5421,      // FIONBIO
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x4004_54d9, // TUNSETQUEUE
    0x4004_54dc, // TUNSETVNETLE
    0x8004_54d2, // TUNGETIFF
];

/// Limits all threads of the process, present and future, to what a running VM needs.
///
/// # Errors
///
/// When the kernel has no such filters.
pub fn apply() -> Result<(), FilterError> {
    // The C library asks for threads by clone3 first, whose flags no filter can see, and takes "unknown" for an answer.
    let no_clone3 = [(libc::SYS_clone3, Vec::new())].into_iter().collect();
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    for program in [
        compile(no_clone3, SeccompAction::Allow, unknown)?,
        compile(rules()?, SeccompAction::KillProcess, SeccompAction::Allow)?,
    ] {
        seccompiler::apply_filter_all_threads(&program)?;
    }
    Ok(())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn compile(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> Result<BpfProgram, FilterError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    Ok(SeccompFilter::new(rules, otherwise, matched, arch)?.try_into()?)
}

fn rules() -> Result<Rules, FilterError> {
    let mut rules: Rules = ALLOWED.into_iter().flatten().map(|number| (*number, Vec::new())).collect();
    // The other filter answers.
    rules.insert(libc::SYS_clone3, Vec::new());
    let ioctls = IOCTLS.iter().chain(&DEVICE_IOCTLS);
    rules.insert(libc::SYS_ioctl, ioctls.map(|request| equal(1, *request)).collect::<Result<_, _>>()?);
    // Threads, not processes.
    let thread = libc::CLONE_THREAD as u64;
    let same_bits = SeccompCmpOp::MaskedEq(thread);
    rules.insert(libc::SYS_clone, vec![rule(0, same_bits, thread)?]);
    // A working directory of the thread's own, and no namespaces.
    rules.insert(libc::SYS_unshare, vec![equal(0, libc::CLONE_FS as u32)?]);
    let options = [libc::PR_SET_NAME, libc::PR_GET_SECUREBITS, libc::PR_SET_SECUREBITS, libc::PR_SET_VMA];
    rules.insert(libc::SYS_prctl, options.map(|option| equal(0, option as u32)).into_iter().collect::<Result<_, _>>()?);
    // Time limits of control connections.
    rules.insert(libc::SYS_setsockopt, vec![equal(1, libc::SOL_SOCKET as u32)?]);
    // What there is may be read, but not changed.
    rules.insert(libc::SYS_prlimit64, vec![rule64(2, 0)?]);
    Ok(rules)
}

fn equal(argument: u8, value: u32) -> Result<SeccompRule, FilterError> {
    rule(argument, SeccompCmpOp::Eq, u64::from(value))
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, FilterError> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn rule64(argument: u8, value: u64) -> Result<SeccompRule, FilterError> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::sys;

    /// How a process ended that set the filter and then did `work`.
    fn filtered(work: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
        sys::in_a_fork(|| {
            sys::forbid_new_privileges()?;
            apply().map_err(std::io::Error::other)?;
            work()
        })
    }

    #[test]
    fn a_thread_can_be_started_and_files_be_opened() {
        let outcome = filtered(|| {
            let thread = std::thread::Builder::new().spawn(|| std::fs::read("/dev/null").map(drop))?;
            thread.join().map_err(|_| std::io::Error::other("it panicked"))?
        });
        assert!(outcome.is_ok(), "{outcome:?}");
    }

    #[test]
    fn what_leads_out_kills_the_process() {
        let attempts: [fn(); 4] = [
            || drop(std::process::Command::new("/bin/true").status()),
            || drop(std::net::UdpSocket::bind("127.0.0.1:0")),
            || drop(sys::unshare(libc::CLONE_NEWNS)),
            || drop(sys::fork(|| Ok(()))),
        ];
        for attempt in attempts {
            let outcome = filtered(move || {
                attempt();
                Ok(())
            });
            assert_eq!(outcome.unwrap_err().to_string(), "the helper was killed");
        }
    }
}
