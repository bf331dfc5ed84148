//! Lets a created container's first process go on to its program.

use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};

use super::{Container, Phase};
use crate::error::{Error, Result, Step};
use crate::helper::{self, HookKind};

impl Container {
    pub(crate) async fn start(&self) -> Result<()> {
        let _operation = self.operation.lock().await;
        self.lock().require("start", &[Phase::Created])?;
        notify(&self.directory.join("state").join(&self.id))
            .map_err(|error| Error::State(format!("cannot start: the container's first process is gone: {error}")))?;
        let has_poststart = {
            let mut state = self.lock();
            // It may have ended already.
            if state.phase == Phase::Created {
                state.phase = Phase::Running;
            }
            state.has_poststart
        };
        if has_poststart {
            self.run_hooks(HookKind::Poststart).await?;
        }
        Ok(())
    }

    pub(super) async fn run_hooks(&self, kind: HookKind) -> Result<()> {
        let request = helper::HookRequest {
            container_id: self.id.clone(),
            bundle: self.directory.clone(),
            state: self.directory.join("state"),
            kind,
        };
        helper::run(helper::Request::Hooks(request), Vec::new()).await.map(|_| ())
    }
}

/// Tells libcontainer's process to go on. The socket's path, which can be longer than a socket address, is taken
/// through an open directory.
fn notify(directory: &Path) -> Result<()> {
    let directory = open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .step("open libcontainer's directory")?;
    let path = format!("/proc/self/fd/{}/notify.sock", directory.as_raw_fd());
    UnixStream::connect(path).and_then(|mut socket| socket.write_all(b"start container")).step("tell the first process")
}
