//! Limits of processes, as podman's `--ulimit` spells them.

use serde_json::{Value, json};

/// A limit of setrlimit(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    name: &'static str,
    soft: u64,
    hard: u64,
}

const NAMES: [&str; 15] = [
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];
/// What every program gets unless told otherwise.
const NOFILE: Limit = Limit { name: "nofile", soft: 1024, hard: 1_048_576 };

/// Reads `NAME=SOFT[:HARD]`; without a hard limit it is the soft one.
pub(crate) fn parse(text: &str) -> Result<Limit, String> {
    let wrong = || format!("{text} is no limit; write NAME=SOFT or NAME=SOFT:HARD, such as nofile=1024:4096");
    let (name, values) = text.split_once('=').ok_or_else(wrong)?;
    let known = NAMES.iter().find(|known| **known == name);
    let name = known.ok_or_else(|| format!("{name} is no limit; use one of {}", NAMES.join(", ")))?;
    let number = |text: &str| match text {
        "-1" | "unlimited" => Some(u64::MAX),
        text => text.parse().ok(),
    };
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let (soft, hard) = (number(soft).ok_or_else(wrong)?, number(hard).ok_or_else(wrong)?);
    match soft <= hard {
        true => Ok(Limit { name, soft, hard }),
        false => Err(format!("{text}: the soft limit is above the hard one; make it smaller")),
    }
}

/// The `rlimits` of the runtime specification: these, the last of a name, and what is usual.
pub(crate) fn rlimits(limits: &[Limit]) -> Vec<Value> {
    let mut all: Vec<&Limit> = Vec::new();
    for limit in std::iter::once(&NOFILE).chain(limits) {
        all.retain(|other| other.name != limit.name);
        all.push(limit);
    }
    let shown = all.iter().map(|limit| {
        let name = format!("RLIMIT_{}", limit.name.to_ascii_uppercase());
        json!({ "type": name, "soft": limit.soft, "hard": limit.hard })
    });
    shown.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_a_name_and_one_or_two_numbers() {
        assert_eq!(parse("nproc=5").unwrap(), Limit { name: "nproc", soft: 5, hard: 5 });
        assert_eq!(parse("core=0:-1").unwrap(), Limit { name: "core", soft: 0, hard: u64::MAX });
        for text in ["", "nofile", "nofile=", "nofile=a", "nofile=5:4", "nofile=-2", "files=3", "host", "nofile=-1:5"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_last_of_a_name_counts() {
        let limits = ["nofile=1", "stack=2", "nofile=3:4"].map(|text| parse(text).unwrap());
        let all = rlimits(&limits);
        assert_eq!(all.len(), 2);
        assert_eq!(all[1], json!({ "type": "RLIMIT_NOFILE", "soft": 3, "hard": 4 }));
        assert_eq!(rlimits(&[]).len(), 1);
    }
}
