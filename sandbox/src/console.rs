//! What guest and VMM print, kept within bounds.
//!
//! The guest's console and the VMM's standard error each come through a pipe. A hostile guest can print without end, so only the
//! last lines are kept, in memory.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes kept of each: enough for a kernel panic with its call trace.
const KEPT_BYTES: usize = 16 * 1024;

/// The end of what came through a pipe.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
}

impl Tail {
    /// Reads `pipe` until its end on a thread of its own.
    pub(crate) fn follow(pipe: OwnedFd, name: &str) -> std::io::Result<(Self, std::thread::JoinHandle<()>)> {
        let tail = Self::default();
        let kept = tail.clone();
        let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(64 * 1024).spawn(move || {
            let mut pipe = File::from(pipe);
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                kept.push(&buffer[..count]);
            }
        })?;
        Ok((tail, thread))
    }

    fn push(&self, bytes: &[u8]) {
        let mut kept = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEPT_BYTES);
        kept.drain(..excess);
    }

    /// The last `count` lines that are not empty, fit to be shown to a person.
    pub(crate) fn last_lines(&self, count: usize) -> Vec<String> {
        let kept = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<String> = text.lines().map(printable).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }
}

/// `text` without what a terminal would act on, and no longer than a person reads.
pub(crate) fn printable(text: &str) -> String {
    const MAX_CHARS: usize = 512;
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_CHARS).collect::<String>().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_end_within_bounds() {
        let tail = Tail::default();
        for number in 0..10_000 {
            tail.push(format!("line {number}\n").as_bytes());
        }
        assert_eq!(tail.last_lines(2), ["line 9998", "line 9999"]);
        assert!(tail.bytes.lock().unwrap().len() <= KEPT_BYTES);
    }

    #[test]
    fn shows_nothing_that_a_terminal_acts_on() {
        let tail = Tail::default();
        tail.push(b"\x1b[2Jhello\x07\xff\n");
        assert_eq!(tail.last_lines(1), [" [2Jhello \u{fffd}"]);
    }
}
