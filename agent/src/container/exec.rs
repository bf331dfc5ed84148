//! Starts another process in a running container.

use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::runtime::Process as SpecProcess;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::sync::watch;

use super::{Container, INIT, Phase, Process, spec};
use crate::error::{Error, Result, Step};
use crate::helper;
use crate::streams::parking::Parking;
use crate::streams::stdio::{Io, WindowSize};

impl Container {
    /// Starts a process, given as the `process` of an OCI specification in JSON, as its user or, unless that is empty, as this one.
    pub(crate) async fn exec(
        self: &Arc<Self>,
        exec_id: &str,
        (json, user): (&[u8], &str),
        io: &Io,
        parking: &Parking,
    ) -> Result<Pid> {
        let init_pid = self.reserve_exec(exec_id)?;
        let root = PathBuf::from(format!("/proc/{}/root", init_pid.as_raw_nonzero()));
        let result = match spec::exec_process(json, io, user, &root) {
            Ok((process, window)) => self.spawn(exec_id, init_pid, process, window, io, parking).await,
            Err(error) => Err(error),
        };
        let mut state = self.lock();
        state.starting.remove(exec_id);
        // The first process may have ended meanwhile, and its end waited for this.
        self.release_held_exit(&mut state);
        result
    }

    fn reserve_exec(&self, exec_id: &str) -> Result<Pid> {
        let mut state = self.lock();
        state.require("start a process", &[Phase::Running])?;
        if state.processes.contains_key(exec_id) || !state.starting.insert(exec_id.to_owned()) {
            return Err(Error::Exists(format!("process {exec_id} of container {}", self.id)));
        }
        Ok(state.process(&self.id, INIT)?.pid)
    }

    async fn spawn(
        self: &Arc<Self>,
        exec_id: &str,
        init_pid: Pid,
        process: SpecProcess,
        window: WindowSize,
        io: &Io,
        parking: &Parking,
    ) -> Result<Pid> {
        let (streams, descriptors) = io.prepare(parking).await?;
        let init = self
            .reaper
            .hold(init_pid, |pid| pidfd_open(pid, PidfdFlags::empty()))
            .ok_or_else(|| Error::State("cannot start a process: the container has stopped".into()))?
            .step("open the container's first process")?;
        let mut all = vec![init];
        all.extend(descriptors);
        let request = helper::Request::Exec(Box::new(helper::ExecRequest {
            bundle: self.directory.clone(),
            cgroup: self.cgroup.directory().to_owned(),
            init_pid: init_pid.as_raw_nonzero().get(),
            process,
            window,
        }));
        let birth = self.reaper.birth();
        let outcome = helper::run(request, all).await?;
        let pid = outcome.pid.ok_or_else(|| Error::failed("start the process", "there is none"))?;
        let exit = self.reaper.watch(&birth, pid);
        let controls = match streams.start(outcome.terminal) {
            Ok(controls) => controls,
            Err(error) => {
                self.reaper.kill(pid, libc::SIGKILL)?;
                return Err(error);
            }
        };
        let stopped = {
            let mut state = self.lock();
            state.processes.insert(exec_id.to_owned(), Process { pid, exit: watch::Sender::new(None), controls });
            state.phase == Phase::Stopped
        };
        self.supervise(exec_id.to_owned(), exit);
        if stopped {
            self.reaper.kill(pid, libc::SIGKILL)?;
        }
        Ok(pid)
    }
}
