//! Stops all processes of a container where they are, and lets them go on.

use super::{Container, Phase};
use crate::error::Result;

impl Container {
    pub(crate) async fn pause(&self) -> Result<()> {
        let _operation = self.operation.lock().await;
        self.lock().require("pause", &[Phase::Running])?;
        if let Err(error) = self.cgroup.set_frozen(true).await {
            // Half a pause is none.
            let _ = self.cgroup.set_frozen(false).await;
            return Err(error);
        }
        self.change(Phase::Running, Phase::Paused);
        Ok(())
    }

    pub(crate) async fn resume(&self) -> Result<()> {
        let _operation = self.operation.lock().await;
        self.lock().require("resume", &[Phase::Paused])?;
        self.cgroup.set_frozen(false).await?;
        self.change(Phase::Paused, Phase::Running);
        Ok(())
    }

    /// A container that was killed meanwhile stays stopped.
    fn change(&self, from: Phase, to: Phase) {
        let mut state = self.lock();
        if state.phase == from {
            state.phase = to;
        }
    }
}
