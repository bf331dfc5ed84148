//! Where the agent's log goes: to the kernel's log as PID 1, to standard error otherwise.
//!
//! A subscriber of its own, because the usual one brings a regular expression engine and an environment parser for
//! what one level does here. Quiet unless something is wrong: every line on a guest's console costs boot time.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// The environment variable that has the level, for the helper processes and outside a guest.
pub(crate) const LEVEL_VARIABLE: &str = "HULL_LOG";
/// Bytes that are kept of what a helper's errors say.
const COLLECTED_BYTES: usize = 1024;

/// Bytes that the kernel takes as one record (`LOG_LINE_MAX` of printk, less its prefix).
const RECORD_BYTES: usize = 960;

struct Log {
    level: LevelFilter,
    /// Opened at the first line, so that a quiet agent opens nothing.
    kmsg: Option<OnceLock<Option<File>>>,
    /// Takes errors instead of the log.
    collector: Option<File>,
}

/// Starts logging up to `level`, into the kernel's log or to standard error.
pub(crate) fn start(level: LevelFilter, to_kernel: bool) {
    let kmsg = to_kernel.then(OnceLock::new);
    set(Log { level, kmsg, collector: None });
}

/// Starts logging into the kernel's log, but for errors, which go into a file that is shared with the processes
/// forked from this one; answers that file. libcontainer's errors name little more than themselves, and what
/// happened is in its log.
pub(crate) fn start_collecting(level: LevelFilter) -> std::io::Result<File> {
    use rustix::fs::{MemfdFlags, OFlags, fcntl_setfl, memfd_create};
    let file = File::from(memfd_create("errors", MemfdFlags::CLOEXEC)?);
    fcntl_setfl(&file, OFlags::APPEND)?;
    set(Log { level, kmsg: Some(OnceLock::new()), collector: Some(file.try_clone()?) });
    Ok(file)
}

/// What has been collected, up to a bound.
pub(crate) fn collected(file: &File) -> String {
    let mut text = vec![0; COLLECTED_BYTES];
    let length = file.read_at(&mut text, 0).unwrap_or(0);
    String::from_utf8_lossy(&text[..length]).trim_end().replace('\n', "; ")
}

fn set(log: Log) {
    LEVEL.get_or_init(|| log.level);
    // Fails only if there is a subscriber already, and then that one stays.
    let _ = tracing::subscriber::set_global_default(log);
}

static LEVEL: OnceLock<LevelFilter> = OnceLock::new();

/// The level that is being logged.
pub(crate) fn level() -> LevelFilter {
    LEVEL.get().copied().unwrap_or(LevelFilter::ERROR)
}

/// The level that the environment asks for, errors if it does not.
pub(crate) fn level_from_environment() -> LevelFilter {
    std::env::var(LEVEL_VARIABLE).ok().and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::ERROR)
}

/// A level's number in syslog(3).
fn priority(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::with_capacity(160));
        let level = event.metadata().level();
        if let Some(collector) = self.collector.as_ref().filter(|_| *level == Level::ERROR) {
            event.record(&mut line);
            line.0.push('\n');
            let _ = (&mut &*collector).write_all(line.0.trim_start().as_bytes());
            return;
        }
        let prefix = self.kmsg.is_some().then(|| priority(level));
        if let Some(priority) = prefix {
            let _ = write!(line.0, "<{priority}>");
        }
        let _ = write!(line.0, "hull-agent: {}:", event.metadata().target());
        event.record(&mut line);
        let mut text = line.0.replace('\n', " ");
        let mut end = text.len().min(RECORD_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('\n');
        // A line that cannot be written has no other place to go.
        let _ = match &self.kmsg {
            None => std::io::stderr().write_all(text.as_bytes()),
            Some(file) => match file.get_or_init(|| File::options().write(true).open("/dev/kmsg").ok()) {
                Some(file) => (&mut &*file).write_all(text.as_bytes()),
                None => Ok(()),
            },
        };
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// A line of the log as its fields come in.
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value}"),
            name => write!(self.0, " {name}={value}"),
        };
    }
}
