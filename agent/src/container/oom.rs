//! Notices that the kernel has killed a process of a container for want of memory.

use std::sync::{Arc, Weak};

use super::Container;
use crate::cgroup::Watched;
use crate::cgroup::stats::oom_kills;
use crate::events::What;

const EVENTS_FILE: &str = "memory.events";

impl Container {
    /// Watches in the background, until the container is removed.
    pub(super) fn watch_memory(self: &Arc<Self>) {
        let watched = match Watched::open(&self.cgroup.file(EVENTS_FILE)) {
            Ok(watched) => watched,
            Err(error) => return tracing::warn!("container {}: watch {EVENTS_FILE}: {error}", self.id),
        };
        let container: Weak<Self> = Arc::downgrade(self);
        let task = tokio::spawn(async move {
            // Reading arms the watch.
            while watched.read().is_ok() {
                match container.upgrade() {
                    Some(container) => container.tell_oom_kills(),
                    None => return,
                };
                if watched.changed().await.is_err() {
                    return;
                }
            }
        });
        self.lock().oom_watch = Some(task.abort_handle());
    }

    /// Makes new kills an event; answers how many there have been in all.
    pub(super) fn tell_oom_kills(&self) -> u64 {
        let kills = self.cgroup.read(EVENTS_FILE).map_or(0, |content| oom_kills(&content));
        let mut state = self.lock();
        if kills > state.oom_kills {
            state.oom_kills = kills;
            self.events.publish(&self.id, What::OutOfMemory { kills });
        }
        state.oom_kills
    }
}
