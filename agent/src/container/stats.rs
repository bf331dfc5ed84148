//! What a container uses.

use std::io;

use super::{Container, Phase};
use crate::cgroup::stats::Stats;
use crate::error::{Error, Result};

impl Container {
    /// The statistics, also of a container that has stopped, until it is removed.
    pub(crate) fn stats(&self) -> Result<Stats> {
        if self.lock().phase == Phase::Creating {
            return Err(Error::State("cannot read statistics: the container is creating".into()));
        }
        Stats::read(&self.cgroup).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::NotFound(format!("container {}", self.id)),
            _ => Error::failed("read the statistics", error.to_string()),
        })
    }
}
