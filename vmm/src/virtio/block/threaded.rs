//! The engine for hosts that forbid io_uring: one request after the other, by `preadv` and `pwritev2`.

use std::os::fd::AsRawFd;

use super::request::Request;
use super::worker::{Worker, status_of};

/// Serves until the worker is told to stop.
pub(super) fn run(worker: &mut Worker) {
    loop {
        while let Some((chain, request)) = worker.next() {
            let mut iovecs = request.iovecs(&chain);
            let takes = !iovecs.is_empty() && worker.shared.disk.geometry().takes(&iovecs);
            match request {
                Request::Read { offset, len } if takes => {
                    // SAFETY: the chain keeps its memory mapped, and it is the guest's, whom the read may disturb.
                    let result = unsafe { worker.shared.disk.read(&mut iovecs, offset) };
                    let written = if result.is_ok() { len } else { 0 };
                    worker.finish(&chain, written, status_of(result));
                }
                Request::Write { offset, .. } if takes => {
                    let durable = worker.write_through();
                    // SAFETY: the chain keeps its memory mapped.
                    let result = unsafe { worker.shared.disk.write(&mut iovecs, offset, durable) };
                    worker.finish(&chain, 0, status_of(result));
                }
                request => worker.perform(&chain, &request),
            }
            worker.queue.notify();
        }
        // For what was answered without an engine.
        worker.queue.notify();
        if !wait(worker) {
            return;
        }
    }
}

/// Waits for a kick; false when it is time to stop.
fn wait(worker: &Worker) -> bool {
    let mut fds = [worker.queue.kick().as_raw_fd(), worker.shared.stop.as_raw_fd()].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // SAFETY: `fds` is an array of that length. An interrupted call leaves no events, which does no harm.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
    worker.queue.clear_kick();
    fds[1].revents == 0
}
