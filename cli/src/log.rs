//! What a container printed, in the form that CRI gives to container logs:
//! `2026-01-02T03:04:05.000000006Z stdout F the line`, with `P` for a part of a line that goes on.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest part of a line in one record, as containerd has it.
const MAX_PART_BYTES: usize = 16 * 1024;
/// A log that grows beyond this is put aside, and one such is kept: a container cannot fill the host's disk by printing.
const MAX_LOG_BYTES: u64 = 16 * 1024 * 1024;

/// Which stream a record is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Writes a container's log.
#[derive(Debug)]
pub(crate) struct LogWriter {
    path: PathBuf,
    file: File,
    written_bytes: u64,
    /// The beginning of a line that has not ended, per stream.
    open_lines: [Vec<u8>; 2],
}

impl LogWriter {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: open(path)?, written_bytes: 0, open_lines: Default::default() })
    }

    /// Takes what came through a stream. Failures are dropped: a full disk must not stop the container.
    pub(crate) fn write(&mut self, stream: Stream, mut bytes: &[u8]) {
        let mut line = std::mem::take(&mut self.open_lines[stream as usize]);
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            line.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            self.record(stream, "F", &line);
            line.clear();
        }
        line.extend_from_slice(bytes);
        if line.len() >= MAX_PART_BYTES {
            self.record(stream, "P", &line);
            line.clear();
        }
        self.open_lines[stream as usize] = line;
    }

    fn record(&mut self, stream: Stream, tag: &str, line: &[u8]) {
        let mut record = format!("{} {} {tag} ", timestamp(SystemTime::now()), stream.name()).into_bytes();
        record.extend_from_slice(line);
        record.push(b'\n');
        if self.file.write_all(&record).is_ok() {
            self.written_bytes += record.len() as u64;
        }
        if self.written_bytes > MAX_LOG_BYTES {
            let _ = std::fs::rename(&self.path, aside(&self.path));
            if let Ok(file) = open(&self.path) {
                self.file = file;
                self.written_bytes = 0;
            }
        }
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let rest = std::mem::take(&mut self.open_lines[stream as usize]);
            if !rest.is_empty() {
                self.record(stream, "P", &rest);
            }
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(true).write(true).open(path)
}

fn aside(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

/// Prints the log at `path`, and what was put aside before it, to the streams that it came from.
pub(crate) fn print(path: &Path, timestamps: bool, stdout: &mut dyn Write, stderr: &mut dyn Write) -> io::Result<()> {
    for path in [aside(path), path.to_owned()] {
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for record in BufReader::new(file).split(b'\n') {
            let record = record?;
            let mut fields = record.splitn(4, |&byte| byte == b' ');
            let (Some(time), Some(stream), Some(tag), Some(line)) =
                (fields.next(), fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let out: &mut dyn Write = if stream == b"stderr" { &mut *stderr } else { &mut *stdout };
            if timestamps {
                out.write_all(time)?;
                out.write_all(b" ")?;
            }
            out.write_all(line)?;
            if tag == b"F" {
                out.write_all(b"\n")?;
            }
        }
    }
    stdout.flush()?;
    stderr.flush()
}

/// `time` as RFC 3339 in UTC with nanoseconds.
pub(crate) fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

/// Year, month and day of a day counted from 1970-01-01, in the proleptic Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years that start in March end with the leap day, which makes the months regular.
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_was_written_is_printed_to_its_stream() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        let mut log = LogWriter::create(&path).unwrap();
        log.write(Stream::Stdout, b"one\ntw");
        log.write(Stream::Stderr, b"bad\n");
        log.write(Stream::Stdout, b"o\nend");
        drop(log);
        let (mut out, mut err) = (Vec::new(), Vec::new());
        print(&path, false, &mut out, &mut err).unwrap();
        assert_eq!((&out[..], &err[..]), (&b"one\ntwo\nend"[..], &b"bad\n"[..]));
    }

    #[test]
    fn a_long_line_is_cut_and_comes_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        let line = [b'x'; 3 * MAX_PART_BYTES];
        let mut log = LogWriter::create(&path).unwrap();
        line.chunks(1000).for_each(|chunk| log.write(Stream::Stdout, chunk));
        drop(log);
        let mut out = Vec::new();
        print(&path, false, &mut out, &mut io::sink()).unwrap();
        assert_eq!(out, line);
    }

    #[test]
    fn writes_times_as_rfc_3339() {
        let time = |seconds, nanoseconds| timestamp(UNIX_EPOCH + Duration::new(seconds, nanoseconds));
        assert_eq!(time(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(time(951_782_400, 1), "2000-02-29T00:00:00.000000001Z");
        assert_eq!(time(1_767_323_045, 6), "2026-01-02T03:04:05.000000006Z");
        assert_eq!(time(4_107_542_399, 0), "2100-02-28T23:59:59.000000000Z");
    }
}
