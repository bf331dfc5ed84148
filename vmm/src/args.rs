//! The command line of `hull-vmm`.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::jail::Root;

/// What `--help` prints.
pub const USAGE: &str = "\
Runs one virtual machine; ends when it does.

Usage: hull-vmm (--config FILE | --config-fd N) [options]

  --config FILE     read the configuration (JSON) from a file
  --config-fd N     read it from an inherited descriptor
  --control-fd N    serve the control protocol on this listening Unix socket
  --broker-fd N     on this socket, ask the caller for what shares need capabilities of the host for
  --lifeline-fd N   end at once when the other end of this pipe is closed
  --kvm-fd N        use this open /dev/kvm instead of opening it
  --jail DIR        see nothing of the host but DIR, a mount point, as the root directory, and be nobody; takes root,
                    and to be the first process of a PID namespace
  --jail-empty      likewise, with an empty root directory
  --no-filter       do not limit the process's system calls; for debugging
  --help            print this
  --version         print the version
  --probe           print as JSON what this host offers: what kind of KVM, whether io_uring

Exit status: 0 stopped, 1 VMM or host error, 2 bad configuration, 3 no KVM, 4 bad kernel or initrd,
10 guest reset, 11 guest panic, 12 guest triple fault, 13 KVM error.
";

/// Where the configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigSource {
    /// A file.
    File(PathBuf),
    /// An inherited descriptor, read to its end.
    Fd(RawFd),
}

/// A parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run a VM.
    Run(RunArgs),
    /// Print how to.
    Help,
    /// Print the version.
    Version,
    /// Print what this host offers.
    Probe,
}

/// How to run a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunArgs {
    /// Its configuration.
    pub config: ConfigSource,
    /// Listening control socket.
    pub control_fd: Option<RawFd>,
    /// Whom shares ask for what takes capabilities of the host.
    pub broker_fd: Option<RawFd>,
    /// The caller's lifeline.
    pub lifeline_fd: Option<RawFd>,
    /// An open `/dev/kvm`.
    pub kvm_fd: Option<RawFd>,
    /// The jail to enter, if any.
    pub jail: Option<Root>,
    /// Whether system calls are limited while the guest runs.
    pub filter: bool,
}

/// Why a command line was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// An option that does not exist.
    #[error("unknown argument {0:?}; see hull-vmm --help")]
    Unknown(OsString),
    /// An option without its value.
    #[error("{0} needs a value; see hull-vmm --help")]
    MissingValue(&'static str),
    /// A value that is no descriptor.
    #[error("{option} {value:?} is not a file descriptor number")]
    NotAnFd {
        /// The option.
        option: &'static str,
        /// Its value.
        value: OsString,
    },
    /// An option given twice.
    #[error("{0} was given twice")]
    Twice(&'static str),
    /// Neither or both of the two sources.
    #[error("exactly one of --config and --config-fd is needed; see hull-vmm --help")]
    Config,
}

/// Parses a command line, without the program's name.
///
/// # Errors
///
/// When it cannot be understood.
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Command, ArgsError> {
    let mut arguments = arguments;
    let (mut file, mut config_fd, mut control_fd, mut lifeline_fd, mut kvm_fd) = (None, None, None, None, None);
    let (mut broker_fd, mut jail, mut filter) = (None, None, true);
    while let Some(argument) = arguments.next() {
        let Some(option) = OPTIONS.into_iter().find(|option| argument == *option) else {
            return match argument.to_str() {
                Some("--help" | "-h") => Ok(Command::Help),
                Some("--version" | "-V") => Ok(Command::Version),
                Some("--probe") => Ok(Command::Probe),
                Some("--jail-empty") if jail.is_none() => {
                    jail = Some(Root::Empty);
                    continue;
                }
                Some("--jail-empty") => Err(ArgsError::Twice("--jail")),
                Some("--no-filter") => {
                    filter = false;
                    continue;
                }
                _ => Err(ArgsError::Unknown(argument)),
            };
        };
        let value = arguments.next().ok_or(ArgsError::MissingValue(option))?;
        let twice = match option {
            "--broker-fd" => broker_fd.replace(descriptor(option, value)?).is_some(),
            "--config" => file.replace(PathBuf::from(value)).is_some(),
            "--config-fd" => config_fd.replace(descriptor(option, value)?).is_some(),
            "--control-fd" => control_fd.replace(descriptor(option, value)?).is_some(),
            "--jail" => jail.replace(Root::Directory(PathBuf::from(value))).is_some(),
            "--lifeline-fd" => lifeline_fd.replace(descriptor(option, value)?).is_some(),
            _ => kvm_fd.replace(descriptor(option, value)?).is_some(),
        };
        if twice {
            return Err(ArgsError::Twice(option));
        }
    }
    let config = match (file, config_fd) {
        (Some(file), None) => ConfigSource::File(file),
        (None, Some(fd)) => ConfigSource::Fd(fd),
        _ => return Err(ArgsError::Config),
    };
    Ok(Command::Run(RunArgs { config, control_fd, broker_fd, lifeline_fd, kvm_fd, jail, filter }))
}

/// Options that take a value.
const OPTIONS: [&str; 7] =
    ["--broker-fd", "--config", "--config-fd", "--control-fd", "--jail", "--lifeline-fd", "--kvm-fd"];

fn descriptor(option: &'static str, value: OsString) -> Result<RawFd, ArgsError> {
    let number = value.to_str().and_then(|text| text.parse().ok()).filter(|fd| *fd >= 0);
    number.ok_or(ArgsError::NotAnFd { option, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, ArgsError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn all_options_are_understood() {
        assert_eq!(
            parsed("--config-fd 3 --control-fd 4 --lifeline-fd 5 --kvm-fd 6 --broker-fd 7"),
            Ok(Command::Run(RunArgs {
                config: ConfigSource::Fd(3),
                control_fd: Some(4),
                broker_fd: Some(7),
                lifeline_fd: Some(5),
                kvm_fd: Some(6),
                jail: None,
                filter: true
            }))
        );
        assert_eq!(parsed("--help"), Ok(Command::Help));
    }

    #[test]
    fn there_is_one_jail_at_most() {
        let run = |line: &str| match parsed(line) {
            Ok(Command::Run(arguments)) => Ok((arguments.jail, arguments.filter)),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        };
        assert_eq!(run("--config a --jail /r"), Ok((Some(Root::Directory("/r".into())), true)));
        assert_eq!(run("--config a --jail-empty --no-filter"), Ok((Some(Root::Empty), false)));
        assert_eq!(run("--config a --jail /r --jail-empty"), Err(ArgsError::Twice("--jail")));
        assert_eq!(run("--config a --jail-empty --jail /r"), Err(ArgsError::Twice("--jail")));
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(parsed(""), Err(ArgsError::Config));
        assert_eq!(parsed("--config a --config-fd 3"), Err(ArgsError::Config));
        assert_eq!(parsed("--config"), Err(ArgsError::MissingValue("--config")));
        assert_eq!(parsed("--config a --config b"), Err(ArgsError::Twice("--config")));
        assert_eq!(parsed("--frobnicate"), Err(ArgsError::Unknown("--frobnicate".into())));
        assert!(matches!(parsed("--kvm-fd -1"), Err(ArgsError::NotAnFd { .. })));
    }
}
