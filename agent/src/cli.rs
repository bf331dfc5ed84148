//! The agent's own command line, for tests outside a guest. PID 1 has none: the kernel hands it whatever words of its
//! command line it does not know itself.

use std::path::PathBuf;

/// How to serve where there is no VMM.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) listen: PathBuf,
    pub(crate) streams: PathBuf,
    /// Where containers have their directories.
    pub(crate) state: PathBuf,
    /// The cgroup above the containers', by its path in the hierarchy.
    pub(crate) cgroup: String,
}

pub(crate) const USAGE: &str = "usage: hull-agent --no-init --listen unix:PATH --streams unix:PATH \
                                [--state DIRECTORY] [--cgroup PATH]";

pub(crate) fn parse(mut words: impl Iterator<Item = String>) -> Result<Options, String> {
    let (mut listen, mut streams, mut no_init) = (None, None, false);
    let mut state = PathBuf::from("/run/hull/containers");
    let mut cgroup = crate::init::CONTAINERS_CGROUP.to_owned();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        let socket = |value: String| {
            value
                .strip_prefix("unix:")
                .map(PathBuf::from)
                .ok_or_else(|| format!("{value} is not of the form unix:PATH"))
        };
        match word.as_str() {
            "--listen" => listen = Some(socket(value()?)?),
            "--streams" => streams = Some(socket(value()?)?),
            "--state" => state = value()?.into(),
            "--cgroup" => cgroup = value()?,
            "--no-init" => no_init = true,
            _ => return Err(format!("{word} is not an option")),
        }
    }
    match (listen, streams, no_init) {
        (Some(listen), Some(streams), true) => Ok(Options { listen, streams, state, cgroup }),
        _ => Err("this is not the first process of a guest".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Options, String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn outside_a_guest_both_sockets_are_needed() {
        let options = parsed("--no-init --listen unix:/a --streams unix:/b").unwrap();
        assert_eq!((options.listen, options.streams), ("/a".into(), "/b".into()));
        for bad in ["", "--listen unix:/a --streams unix:/b", "--no-init --listen /a", "--no-init --listen", "--other"]
        {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
