//! `delete`: clears what a dead shim has left. Everything here may have been done before.

use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use hull_sandbox::cgroup::Cgroup;
use hull_sandbox::host::Host;
use protobuf::{Message, MessageField};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::events::timestamp;
use crate::flags::Flags;
use crate::process::Exit;
use crate::{Trouble, launch, spec, vm};

/// How long a shim may take to end by itself, of the 5 s that containerd gives for all of this.
const EXIT_GRACE_SECONDS: i64 = 2;

/// How long its processes may take to be gone after that.
const CGROUP_GRACE: Duration = Duration::from_secs(2);

/// Clears up after a container's shim and returns what is to be printed.
pub(crate) fn delete(flags: &Flags) -> Result<Vec<u8>, Trouble> {
    // By this name, since the directory itself may go meanwhile: containerd calls this beside an orderly end, too, and is the
    // faster of the two on a busy host.
    clear(Path::new("."), flags)
}

fn clear(bundle: &Path, flags: &Flags) -> Result<Vec<u8>, Trouble> {
    // Only the container that the shim was started for has its number: any other's end is not the pod's.
    if let Ok(number) = std::fs::read_to_string(bundle.join(launch::PID_FILE)) {
        end_shim(&number, &flags.id)?;
        let host = Host::discover()?;
        vm::wait_for_owner(&host, &vm::sandbox_name(&flags.namespace, &flags.id))?;
        if let Ok(socket) = std::fs::read_to_string(bundle.join(launch::SOCKET_FILE)) {
            // Gone already, as after an orderly end.
            let _ = std::fs::remove_file(socket);
        }
        vm::sweep(&host)?;
        // The shim of an older release has not written it down.
        let noted = std::fs::read_to_string(bundle.join(launch::CGROUP_FILE)).ok();
        let cgroup = noted.or_else(|| spec::cgroup(&spec::read(bundle).ok()?));
        if let Some(Ok(cgroup)) = cgroup.map(|path| Cgroup::at(&path)) {
            cgroup.remove_killed(CGROUP_GRACE);
        }
    }
    // Hull mounts in namespaces of its own; this is for what others may have mounted for it.
    let _ = rustix::mount::unmount(bundle.join("rootfs"), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    let exit = Exit::killed();
    let response = DeleteResponse {
        exit_status: exit.code,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    };
    Ok(response.write_to_bytes()?)
}

/// Kills the shim if it still runs, and it is the one: a number can have been given to another process since.
fn end_shim(number: &str, id: &str) -> Result<(), Trouble> {
    let Some(pid) = number.trim().parse().ok().and_then(Pid::from_raw) else { return Ok(()) };
    let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    if !is_shim_of(pid, id) {
        return Ok(());
    }
    // An orderly end is on its way where containerd has just deleted the last container: events still go out.
    let limit = Timespec { tv_sec: EXIT_GRACE_SECONDS, tv_nsec: 0 };
    if poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit))? == 0 {
        pidfd_send_signal(&fd, Signal::KILL)?;
    }
    Ok(())
}

fn is_shim_of(pid: Pid, id: &str) -> bool {
    let process = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
    let command = std::fs::read(process.join("cmdline")).unwrap_or_default();
    let words: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
    words.windows(2).any(|pair| pair == [b"-pod".as_slice(), id.as_bytes()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_that_is_gone_has_nothing_to_clear() {
        let bundle = std::env::temp_dir().join("hull-no-such-bundle");
        let answer = clear(&bundle, &Flags::default()).unwrap();
        assert_eq!(DeleteResponse::parse_from_bytes(&answer).unwrap().exit_status, Exit::killed().code);
    }

    #[test]
    fn a_number_that_is_another_process_by_now_is_left_alone() {
        let own = std::process::id().to_string();
        end_shim(&own, "some-pod").unwrap();
        end_shim("no number", "some-pod").unwrap();
        end_shim("0", "some-pod").unwrap();
    }
}
