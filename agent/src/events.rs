//! What happens in the guest without being asked for: processes that end, containers that run out of memory.
//!
//! Events are numbered from 1 and kept in a queue with a bound. The host polls for those after the last it has seen,
//! so a connection that breaks loses nothing as long as the host comes back within [`CAPACITY`] events.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Events that are kept. containerd's own shim holds as many, and a pod of a few hundred processes could end at once.
const CAPACITY: usize = 2048;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExitStatus {
    /// 128 + n where signal n ended it.
    pub(crate) code: u32,
    /// The signal, or 0.
    pub(crate) signal: u32,
    /// Nanoseconds since the epoch.
    pub(crate) exited_at_ns: u64,
    /// Whether the kernel killed a process of the container for want of memory before this.
    pub(crate) oom_killed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// The exec is empty for the container's first process.
    Exit {
        exec_id: String,
        status: ExitStatus,
    },
    OutOfMemory {
        kills: u64,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) number: u64,
    pub(crate) container_id: String,
    pub(crate) what: What,
}

/// The queue.
pub(crate) struct Events {
    state: Mutex<State>,
    published: Notify,
}

struct State {
    queue: VecDeque<Event>,
    last: u64,
}

impl Events {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(State { queue: VecDeque::new(), last: 0 }), published: Notify::new() }
    }

    /// Numbers an event and lets the host know.
    pub(crate) fn publish(&self, container_id: &str, what: What) {
        let mut state = self.lock();
        state.last += 1;
        let number = state.last;
        if state.queue.len() == CAPACITY {
            state.queue.pop_front();
        }
        state.queue.push_back(Event { number, container_id: container_id.to_owned(), what });
        drop(state);
        self.published.notify_waiters();
    }

    /// Waits until there are events after number `after`; answers them all, and how many between are lost.
    pub(crate) async fn after(&self, after: u64) -> (Vec<Event>, u64) {
        loop {
            let published = self.published.notified();
            tokio::pin!(published);
            // From here on no event is missed, even if it comes before the await.
            published.as_mut().enable();
            if let Some(answer) = self.lock().after(after) {
                return answer;
            }
            published.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn after(&self, after: u64) -> Option<(Vec<Event>, u64)> {
        if self.last <= after {
            return None;
        }
        let first = self.queue.front()?.number;
        let events = self.queue.iter().skip_while(|event| event.number <= after).cloned().collect();
        Some((events, first.saturating_sub(after + 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    fn oom(kills: u64) -> What {
        What::OutOfMemory { kills }
    }

    #[test]
    fn events_are_numbered_from_one_and_answered_after_the_last_seen() {
        let events = Events::new();
        (1..=3).for_each(|kills| events.publish("c", oom(kills)));
        let (answer, lost) = run(events.after(1));
        assert_eq!(answer.iter().map(|event| event.number).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(answer[0].what, oom(2));
        assert_eq!(lost, 0);
    }

    #[test]
    fn dropped_events_are_counted() {
        let events = Events::new();
        (0..CAPACITY as u64 + 5).for_each(|kills| events.publish("c", oom(kills)));
        let (answer, lost) = run(events.after(2));
        assert_eq!((answer.len(), lost), (CAPACITY, 3));
        assert_eq!(answer[0].number, 6);
        assert_eq!(run(events.after(5)).1, 0);
    }

    #[test]
    fn a_poll_waits_for_the_next_event() {
        let events = std::sync::Arc::new(Events::new());
        run(async {
            events.publish("c", oom(1));
            let waiting = tokio::spawn({
                let events = events.clone();
                async move { events.after(1).await }
            });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            events.publish("d", oom(2));
            let (answer, _) = waiting.await.unwrap();
            assert_eq!((answer[0].number, answer[0].container_id.as_str()), (2, "d"));
        });
    }
}
