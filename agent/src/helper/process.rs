//! What a container's first process and an exec have in common: finding and executing the program.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use oci_spec::runtime::Process;
use rustix::fs::{Access, AtFlags, CWD, Gid, Uid, accessat, fchown, fstat};
use rustix::io::Errno;

use crate::error::{Error, Result, Step};

/// Where programs are looked for in a container whose environment does not say (execvp(3)).
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// The program that a process is to run, looked up in its own environment's PATH.
pub(super) fn find_program(process: &Process) -> Result<PathBuf> {
    let name = process.args().as_ref().and_then(|args| args.first()).map_or("", String::as_str);
    let refuse = |reason: &str| Err(Error::invalid("process.args", format!("{name:?}: {reason}")));
    if name.contains('/') {
        return match usable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(error) => refuse(&error.to_string()),
        };
    }
    let env = process.env().as_deref().unwrap_or_default();
    let path = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let mut reason = "executable file not found in $PATH".to_owned();
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let program = Path::new(directory).join(name);
        match usable(&program) {
            Ok(()) => return Ok(program),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => reason = error.to_string(),
            Err(_) => {}
        }
    }
    refuse(&reason)
}

/// Whether the present user may execute a file.
fn usable(program: &Path) -> io::Result<()> {
    if std::fs::metadata(program)?.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    match accessat(CWD, program, Access::EXEC_OK, AtFlags::EACCESS) {
        // The container's seccomp filter does not know the call. Then executing has to tell.
        Err(Errno::NOSYS | Errno::PERM) => Ok(()),
        result => Ok(result?),
    }
}

/// Becomes the program. Returns only if that fails.
pub(super) fn execute(process: &Process) -> Error {
    let program = match find_program(process) {
        Ok(program) => program,
        Err(error) => return error,
    };
    let args = process.args().as_deref().unwrap_or_default();
    let env = process.env().as_deref().unwrap_or_default();
    let error = Command::new(&program)
        .arg0(args.first().map_or("", String::as_str))
        .args(args.iter().skip(1))
        .env_clear()
        .envs(env.iter().filter_map(|variable| variable.split_once('=')))
        .exec();
    Error::invalid("process.args", format!("execute {}: {error}", program.display()))
}

/// Gives a stream to the process's user, so that opening /dev/stdout works. Devices such as /dev/null stay root's.
pub(super) fn give_stream(stream: impl AsFd, uid: u32) -> io::Result<()> {
    let kind = rustix::fs::FileType::from_raw_mode(fstat(&stream)?.st_mode);
    if kind == rustix::fs::FileType::Fifo {
        fchown(stream, Some(Uid::from_raw(uid)), None::<Gid>)?;
    }
    Ok(())
}

/// Sets the calling process's readiness to be killed for want of memory. Without a wish it is the usual one, not the
/// agent's.
pub(super) fn set_oom_score(process: &Process) -> Result<()> {
    let score = process.oom_score_adj().unwrap_or(0);
    File::options()
        .write(true)
        .open("/proc/self/oom_score_adj")
        .and_then(|mut file| file.write_all(score.to_string().as_bytes()))
        .step("process.oomScoreAdj: set it")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use serde_json::json;

    use super::*;

    fn process(args: &[&str], env: &[&str]) -> Process {
        serde_json::from_value(json!({ "args": args, "env": env, "cwd": "/", "user": { "uid": 0, "gid": 0 } })).unwrap()
    }

    #[test]
    fn programs_are_found_in_the_environments_path() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        std::fs::write(&program, "").unwrap();
        let path = format!("PATH=/nowhere:{}", directory.path().display());

        let refused = find_program(&process(&["program"], &[&path])).unwrap_err();
        assert!(refused.to_string().contains("denied"), "{refused}");

        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(find_program(&process(&["program"], &[&path])).unwrap(), program);
        assert_eq!(find_program(&process(&[program.to_str().unwrap()], &[])).unwrap(), program);
        assert!(find_program(&process(&["program"], &["PATH=/nowhere"])).unwrap_err().to_string().contains("$PATH"));
        assert!(find_program(&process(&["/nowhere/x"], &[&path])).is_err());
        assert!(find_program(&process(&["sh"], &[])).is_ok());
    }
}
