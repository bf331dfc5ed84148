//! A cgroup's statistics, parsed from its files. Formats: cgroup-v2.rst and psi.rst of the kernel's documentation.

use std::io;

use super::Cgroup;

/// What a limit's file says where there is none.
const NO_LIMIT: &str = "max";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PressureLine {
    /// Averages in hundredths of a percent.
    pub(crate) avg10: u32,
    pub(crate) avg60: u32,
    pub(crate) avg300: u32,
    pub(crate) total_usec: u64,
}

/// Pressure stall information; a line that the file does not have is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pressure {
    pub(crate) some: Option<PressureLine>,
    pub(crate) full: Option<PressureLine>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Io {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) read_bytes: u64,
    pub(crate) write_bytes: u64,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
}

/// Everything there is to know of a cgroup's use. Limits are 2^64 - 1 where there is none.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stats {
    /// cpu.stat.
    pub(crate) cpu: Vec<(String, u64)>,
    pub(crate) cpu_pressure: Option<Pressure>,
    pub(crate) memory_usage_bytes: u64,
    pub(crate) memory_limit_bytes: u64,
    pub(crate) swap_usage_bytes: u64,
    pub(crate) swap_limit_bytes: u64,
    pub(crate) memory_peak_bytes: u64,
    pub(crate) memory_stat: Vec<(String, u64)>,
    pub(crate) memory_events: Vec<(String, u64)>,
    pub(crate) memory_pressure: Option<Pressure>,
    pub(crate) pids_current: u64,
    pub(crate) pids_limit: u64,
    pub(crate) io: Vec<Io>,
}

impl Stats {
    /// Reads the files. Those that a kernel without the option lacks count as zero.
    pub(crate) fn read(cgroup: &Cgroup) -> io::Result<Self> {
        let optional = |name: &str| match cgroup.read(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            // Pressure that the boot command line has turned off.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
            result => result.map(Some),
        };
        let keyed = |name: &str| Ok(optional(name)?.map(|content| owned(&content)).unwrap_or_default());
        let number = |name: &str| Ok::<_, io::Error>(optional(name)?.and_then(|text| limit(&text)).unwrap_or(0));
        let pressure = |name: &str| Ok::<_, io::Error>(optional(name)?.map(|content| parse_pressure(&content)));
        Ok(Self {
            // The one file that every cgroup has: its absence is that of the cgroup.
            cpu: owned(&cgroup.read("cpu.stat")?),
            cpu_pressure: pressure("cpu.pressure")?,
            memory_usage_bytes: number("memory.current")?,
            memory_limit_bytes: number("memory.max")?,
            swap_usage_bytes: number("memory.swap.current")?,
            swap_limit_bytes: number("memory.swap.max")?,
            memory_peak_bytes: number("memory.peak")?,
            memory_stat: keyed("memory.stat").map_err(|error: io::Error| error)?,
            memory_events: keyed("memory.events").map_err(|error: io::Error| error)?,
            memory_pressure: pressure("memory.pressure")?,
            pids_current: number("pids.current")?,
            pids_limit: number("pids.max")?,
            io: optional("io.stat")?.map(|content| parse_io(&content)).unwrap_or_default(),
        })
    }

    /// A value of cpu.stat.
    pub(crate) fn cpu(&self, key: &str) -> u64 {
        self.cpu.iter().find(|(found, _)| found == key).map_or(0, |(_, value)| *value)
    }
}

fn owned(content: &str) -> Vec<(String, u64)> {
    flat_keyed(content).map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The lines "KEY VALUE" of a flat keyed file; others are passed over.
pub(crate) fn flat_keyed(content: &str) -> impl Iterator<Item = (&str, u64)> {
    content.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// How many processes of the cgroup and those below it the kernel has killed for want of memory, by memory.events.
pub(crate) fn oom_kills(memory_events: &str) -> u64 {
    flat_keyed(memory_events).find(|(key, _)| *key == "oom_kill").map_or(0, |(_, value)| value)
}

/// A number, or "max" for no limit.
fn limit(text: &str) -> Option<u64> {
    match text.trim() {
        NO_LIMIT => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

/// The lines "some avg10=0.00 avg60=0.00 avg300=0.00 total=0" of a pressure file.
pub(crate) fn parse_pressure(content: &str) -> Pressure {
    let mut pressure = Pressure::default();
    for line in content.lines() {
        let mut words = line.split_whitespace();
        let slot = match words.next() {
            Some("some") => &mut pressure.some,
            Some("full") => &mut pressure.full,
            _ => continue,
        };
        let mut parsed = PressureLine::default();
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => parsed.avg10 = hundredths(value).unwrap_or(0),
                "avg60" => parsed.avg60 = hundredths(value).unwrap_or(0),
                "avg300" => parsed.avg300 = hundredths(value).unwrap_or(0),
                "total" => parsed.total_usec = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        *slot = Some(parsed);
    }
    pressure
}

/// A decimal with two places, such as "12.34", in hundredths.
fn hundredths(text: &str) -> Option<u32> {
    let (whole, fraction) = text.split_once('.')?;
    if fraction.len() != 2 {
        return None;
    }
    whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(fraction.parse().ok()?)
}

/// The lines "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6" of io.stat.
pub(crate) fn parse_io(content: &str) -> Vec<Io> {
    content
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            let mut parsed = Io { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Io::default() };
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                let value = value.parse().unwrap_or(0);
                match key {
                    "rbytes" => parsed.read_bytes = value,
                    "wbytes" => parsed.write_bytes = value,
                    "rios" => parsed.reads = value,
                    "wios" => parsed.writes = value,
                    _ => {}
                }
            }
            Some(parsed)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pressure_is_read_in_hundredths_of_a_percent() {
        let content =
            "some avg10=1.25 avg60=0.07 avg300=100.00 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=9\n";
        let pressure = parse_pressure(content);
        assert_eq!(pressure.some, Some(PressureLine { avg10: 125, avg60: 7, avg300: 10_000, total_usec: 1234 }));
        assert_eq!(pressure.full, Some(PressureLine { total_usec: 9, ..PressureLine::default() }));
        assert_eq!(parse_pressure("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n").full, None);
    }

    #[test]
    fn io_statistics_are_read_by_device() {
        let content = "253:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n7:1\n";
        let expected = Io { major: 253, minor: 0, read_bytes: 4096, write_bytes: 8192, reads: 1, writes: 2 };
        assert_eq!(parse_io(content), [expected, Io { major: 7, minor: 1, ..Io::default() }]);
    }

    #[test]
    fn oom_kills_are_not_ooms() {
        assert_eq!(oom_kills("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n"), 2);
        assert_eq!(oom_kills(""), 0);
    }

    #[test]
    fn no_limit_is_the_largest_number() {
        assert_eq!(limit("max\n"), Some(u64::MAX));
        assert_eq!(limit("1024\n"), Some(1024));
        assert_eq!(limit("?"), None);
    }

    proptest! {
        #[test]
        fn flat_keyed_files_are_read_back(
            pairs in proptest::collection::vec(("[a-z_]{1,12}", any::<u64>()), 0..20)
        ) {
            let content: String = pairs.iter().map(|(key, value)| format!("{key} {value}\n")).collect();
            prop_assert_eq!(owned(&content), pairs);
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in "\\PC*") {
            parse_pressure(&text);
            parse_io(&text);
            owned(&text);
            limit(&text);
        }

        #[test]
        fn percentages_are_exact(whole in 0_u32..1000, fraction in 0_u32..100) {
            prop_assert_eq!(hundredths(&format!("{whole}.{fraction:02}")), Some(whole * 100 + fraction));
        }
    }
}
