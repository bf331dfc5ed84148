//! What the VMM has to say to people, on standard error, one line each. A guest can cause some of it, so the rate is
//! limited.

use std::fmt;
use std::io::Write;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// Lines allowed per [`PERIOD`]; a guest must not fill its owner's log.
const BURST: u32 = 20;
/// See [`BURST`].
const PERIOD: Duration = Duration::from_secs(60);

struct Budget {
    since: Option<Instant>,
    used: u32,
}

static BUDGET: Mutex<Budget> = Mutex::new(Budget { since: None, used: 0 });

impl Budget {
    /// Whether one more line may be written at `now`.
    fn take(&mut self, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.duration_since(since) >= PERIOD) {
            (self.since, self.used) = (Some(now), 0);
        }
        self.used += 1;
        self.used <= BURST
    }
}

/// Reports what went wrong without ending the VM, at a limited rate.
pub fn warn(message: fmt::Arguments<'_>) {
    if BUDGET.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now()) {
        say(message);
    }
}

/// Reports why the VM ended or could not start.
pub fn say(message: fmt::Arguments<'_>) {
    // One write, so that lines of several processes do not mix. Nobody to tell if it fails.
    let line = format!("hull-vmm: {message}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_limited_in_each_period() {
        let mut budget = Budget { since: None, used: 0 };
        let start = Instant::now();
        assert_eq!((0..100).filter(|_| budget.take(start)).count(), BURST as usize);
        assert!(!budget.take(start + PERIOD / 2));
        assert!(budget.take(start + PERIOD));
    }
}
