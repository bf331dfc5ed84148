//! The end of a process: told to those who wait, and as an event.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Container, INIT, Phase, State};
use crate::events::{ExitStatus, What};
use crate::reaper::Exit;

impl Container {
    /// Waits for the end of a process in the background.
    pub(super) fn supervise(self: &Arc<Self>, exec_id: String, exit: oneshot::Receiver<Exit>) {
        let container = self.clone();
        tokio::spawn(async move {
            if let Ok(exit) = exit.await {
                container.ended(&exec_id, exit);
            }
        });
    }

    pub(super) fn ended(&self, exec_id: &str, exit: Exit) {
        let oom_killed = self.tell_oom_kills() > 0;
        let status = ExitStatus { code: exit.code, signal: exit.signal, exited_at_ns: exit.at_ns, oom_killed };
        let mut state = self.lock();
        if exec_id != INIT {
            self.tell_exit(&mut state, exec_id, status);
            self.release_held_exit(&mut state);
            return;
        }
        state.phase = Phase::Stopped;
        // In a PID namespace of its own nothing has outlived the first process; in a shared one, nothing shall.
        if let Err(error) = self.cgroup.kill() {
            tracing::error!("container {}: {error}", self.id);
        }
        state.held_exit = Some(status);
        self.release_held_exit(&mut state);
    }

    /// Tells of the first process's end once all others have ended, so that it is the last.
    pub(super) fn release_held_exit(&self, state: &mut State) {
        if !state.others_run()
            && let Some(status) = state.held_exit.take()
        {
            self.tell_exit(state, INIT, status);
        }
    }

    fn tell_exit(&self, state: &mut State, exec_id: &str, status: ExitStatus) {
        if let Some(process) = state.processes.get(exec_id) {
            process.exit.send_replace(Some(status));
        }
        self.events.publish(&self.id, What::Exit { exec_id: exec_id.to_owned(), status });
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    fn exit(code: u32) -> Exit {
        Exit { code, signal: 0, at_ns: 5 }
    }

    #[tokio::test]
    async fn the_first_process_is_the_last_whose_end_is_told() {
        let (container, events) = testing::container();
        container.lock().processes.insert(INIT.into(), testing::process(1000));
        container.lock().processes.insert("e".into(), testing::process(1001));
        container.lock().starting.insert("late".into());

        container.ended(INIT, exit(3));
        assert_eq!(container.lock().phase, Phase::Stopped);
        container.ended("e", exit(4));
        assert!(container.lock().processes[INIT].exit.borrow().is_none());
        container.lock().starting.remove("late");
        container.release_held_exit(&mut container.lock());

        let (told, _) = events.after(0).await;
        let order: Vec<_> = told
            .iter()
            .map(|event| match &event.what {
                What::Exit { exec_id, status } => (exec_id.as_str(), status.code),
                What::OutOfMemory { .. } => panic!("{event:?}"),
            })
            .collect();
        assert_eq!(order, [("e", 4), (INIT, 3)]);
        assert_eq!(container.wait(INIT).await.unwrap().code, 3);
        assert_eq!(container.wait(INIT).await.unwrap().code, 3);
    }
}
