//! Changes a container's limits.

use oci_spec::runtime::LinuxResources;

use super::{Container, Phase};
use crate::cgroup::{devices, resources};
use crate::error::{Error, Result};

impl Container {
    /// Changes what the given `linux.resources` name, and leaves everything else as it is.
    pub(crate) async fn update(&self, json: &[u8]) -> Result<()> {
        let wanted: LinuxResources =
            serde_json::from_slice(json).map_err(|error| Error::invalid("resources", error.to_string()))?;
        let _operation = self.operation.lock().await;
        let mut state = self.lock();
        state.require("update", &[Phase::Created, Phase::Running, Phase::Paused])?;
        resources::apply(&self.cgroup, &wanted)?;
        if let Some(rules) = wanted.devices().as_ref().filter(|rules| !rules.is_empty()) {
            state.device_policy = devices::apply(&self.cgroup, rules, state.device_policy.as_ref())?;
        }
        Ok(())
    }
}
