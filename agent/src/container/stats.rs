//! What a container uses.

use std::io;

use super::{Container, Containers, Phase};
use crate::cgroup::stats::Stats;
use crate::error::{Error, Result, Step};

impl Containers {
    /// What all of them have used together. Of processor time the kernel adds what a removed cgroup has used to the one above, so that
    /// this never falls.
    pub(crate) fn total(&self) -> Result<Stats> {
        Stats::read(&self.cgroup).step("read the statistics of all containers")
    }
}

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
