//! Runs one virtual machine, as its caller describes it; see `vmm/README.md`.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode as ProcessExit;

use hull_vmm::args::{self, Command, ConfigSource, RunArgs};
use hull_vmm::config::Settings;
use hull_vmm::virtio::fs;
use hull_vmm::vm::{build, driver};
use hull_vmm::{jail, kvm, log, probe};
use hull_vmm_api::exit::ExitCode;

/// Largest configuration, in bytes, that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Descriptors that the table has room for from the start. The kernel makes it larger by waiting for all processors,
/// once there is more than one thread.
const DESCRIPTOR_TABLE: libc::c_int = 512;

fn main() -> ProcessExit {
    let code = match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(arguments)) => run(&arguments).unwrap_or_else(|failure| {
            log::say(format_args!("{}", failure.message));
            failure.code
        }),
        Ok(Command::Help) => {
            print!("{}", args::USAGE);
            ExitCode::Stopped
        }
        Ok(Command::Version) => {
            println!("hull-vmm {}", env!("CARGO_PKG_VERSION"));
            ExitCode::Stopped
        }
        Ok(Command::Probe) => {
            println!("{}", probe::probe());
            ExitCode::Stopped
        }
        Err(error) => {
            log::say(format_args!("{error}"));
            ExitCode::BadConfig
        }
    };
    ProcessExit::from(code as u8)
}

/// Why there is no VM: what to tell the caller's program, and what its people.
struct Failure {
    code: ExitCode,
    message: String,
}

fn failure(code: ExitCode) -> impl Fn(&dyn std::fmt::Display) -> Failure {
    move |message| Failure { code, message: message.to_string() }
}

fn run(arguments: &RunArgs) -> Result<ExitCode, Failure> {
    let bad_config = failure(ExitCode::BadConfig);
    let host = failure(ExitCode::Failed);
    let signals = driver::block_signals().map_err(|error| host(&format_args!("cannot block signals: {error}")))?;
    prepare_descriptors();
    let take = |fd: Option<RawFd>, option: &str| fd.map(|fd| inherit(fd, option)).transpose();
    let tethers = driver::Tethers {
        control: take(arguments.control_fd, "--control-fd")?.map(UnixListener::from),
        lifeline: take(arguments.lifeline_fd, "--lifeline-fd")?.map(File::from),
    };
    let kvm = kvm::open(take(arguments.kvm_fd, "--kvm-fd")?).map_err(|error| failure(ExitCode::NoKvm)(&error))?;
    let json = read_config(&arguments.config)?;
    if let Some(socket) = take(arguments.broker_fd, "--broker-fd")? {
        fs::use_broker(socket);
    }
    if let Some(root) = &arguments.jail {
        let descriptors = jail::enter(root).map_err(|error| host(&error))?;
        fs::use_descriptors(descriptors);
    }
    // In the jail: what the configuration names by a path is looked for there.
    let settings = Settings::parse(&json).map_err(|error| bad_config(&error))?;
    let mut machine = build::build(settings, &kvm).map_err(|error| failure(error.exit_code())(&error))?;
    if arguments.filter {
        jail::filter::apply().map_err(|error| host(&error))?;
    }
    let outcome = driver::run(&mut machine, &signals, tethers)
        .map_err(|error| host(&format_args!("cannot wait for events: {error}")))?;
    let code = outcome.exit_code();
    if code != ExitCode::Stopped {
        log::say(format_args!("{outcome}"));
    }
    // The process ends here: taking the VM apart first would only take time.
    std::process::exit(code as i32)
}

fn read_config(source: &ConfigSource) -> Result<Vec<u8>, Failure> {
    let file = match source {
        ConfigSource::File(path) => File::open(path).map_err(|error| Failure {
            code: ExitCode::BadConfig,
            message: format!("cannot open {}: {error}", path.display()),
        })?,
        ConfigSource::Fd(fd) => File::from(inherit(*fd, "--config-fd")?),
    };
    let mut json = Vec::new();
    file.take(MAX_CONFIG_BYTES).read_to_end(&mut json).map_err(|error| Failure {
        code: ExitCode::BadConfig,
        message: format!("cannot read the configuration: {error}"),
    })?;
    Ok(json)
}

fn inherit(fd: RawFd, option: &str) -> Result<OwnedFd, Failure> {
    // SAFETY: any number may be asked about.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        let error = io::Error::last_os_error();
        return Err(Failure { code: ExitCode::BadConfig, message: format!("{option} {fd}: {error}") });
    }
    // SAFETY: the descriptor is open, and the caller made it for this process and this option.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets the process open as many files as it may, and makes room in its table while it has one thread.
fn prepare_descriptors() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid structure to write to and read from; descriptors are copied and closed by number, and
    // nobody else uses that number.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
        let copy = libc::fcntl(libc::STDERR_FILENO, libc::F_DUPFD_CLOEXEC, DESCRIPTOR_TABLE - 1);
        if copy >= 0 {
            libc::close(copy);
        }
    }
}
