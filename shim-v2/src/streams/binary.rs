//! A program that takes a process's output: `binary:///path?key=value`, or `binary-v2:`.
//!
//! It is started with the words of the query as arguments and three descriptors: 3 and 4 are the reading ends of standard output
//! and error, and 5 is what it closes once it reads. In the second version it writes a byte there before: without one, closing may as
//! well be its death.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use command_fds::CommandFdExt;
use command_fds::FdMapping;
use hull_sandbox_sys::children;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

/// How long the program may take until it reads.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// How the program says that it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// By closing descriptor 5.
    One,
    /// By a byte.
    Two,
}

/// The version of a program that a stream's URI names, and the rest of the URI; `None` of other streams.
pub(super) fn version(uri: &str) -> Option<(Version, &str)> {
    let (scheme, rest) = uri.split_once("://")?;
    match scheme {
        "binary" => Some((Version::One, rest)),
        "binary-v2" => Some((Version::Two, rest)),
        _ => None,
    }
}

/// Starts the program behind `uri` (without its scheme) and returns the writing ends of output and error.
pub(super) async fn start(
    version: Version,
    uri: &str,
    namespace: &str,
    id: &str,
) -> Result<(pipe::Sender, pipe::Sender)> {
    let (path, arguments) =
        parse(uri).ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the URI names no program"))?;
    let (stdout_read, stdout) = std::io::pipe()?;
    let (stderr_read, stderr) = std::io::pipe()?;
    let (ready, ready_write) = std::io::pipe()?;
    let ends: [OwnedFd; 3] = [stdout_read.into(), stderr_read.into(), ready_write.into()];
    let mappings = ends.into_iter().zip(3..).map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
    let mut command = Command::new(path);
    command
        .args(arguments)
        .env("CONTAINER_ID", id)
        .env("CONTAINER_NAMESPACE", namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .fd_mappings(mappings.collect())
        .map_err(Error::other)?;
    let (mut child, started) = children::start(|| command.spawn(), Child::id)?;
    // It holds the program's ends, and with them open here no pipe would ever end.
    drop(command);
    let mut ready = pipe::Receiver::from_owned_fd(ready.into())?;
    let why_not = match tokio::time::timeout(READY_TIMEOUT, ready.read(&mut [0])).await {
        Ok(Ok(0)) if version == Version::Two => Some(Error::new(
            ErrorKind::BrokenPipe,
            "the program has ended, or closed descriptor 5, before it said that it reads",
        )),
        Ok(Ok(_)) => None,
        Ok(Err(error)) => Some(error),
        Err(_) => Some(Error::new(ErrorKind::TimedOut, "the program does not say that it reads")),
    };
    if let Some(error) = why_not {
        // Gone already, it may be.
        let _ = child.kill().await;
        return Err(error);
    }
    // The program ends with its input; somebody has to wait for it.
    tokio::spawn(async move {
        // Its exit status is of no interest.
        let _ = child.wait().await;
        drop(started);
    });
    Ok((pipe::Sender::from_owned_fd(stdout.into())?, pipe::Sender::from_owned_fd(stderr.into())?))
}

/// The program's path, and the query's keys and values one after the other.
fn parse(uri: &str) -> Option<(String, Vec<String>)> {
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(decode(key, true)?);
        if !value.is_empty() {
            arguments.push(decode(value, true)?);
        }
    }
    let path = decode(path, false)?;
    path.starts_with('/').then_some((path, arguments))
}

/// Undoes the escapes of a URI; in a query a plus stands for a space.
pub(super) fn decode(text: &str, in_query: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            b'+' if in_query => b' ',
            0 => return None,
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::{Path, PathBuf};

    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[test]
    fn the_query_becomes_arguments() {
        let (path, arguments) = parse("/usr/bin/log%20it?--file=%2Ftmp%2Fa+b&-v").unwrap();
        assert_eq!(path, "/usr/bin/log it");
        assert_eq!(arguments, ["--file", "/tmp/a b", "-v"]);
        for wrong in ["", "relative", "/a%", "/a%zz", "/a%00"] {
            assert!(parse(wrong).is_none(), "{wrong}");
        }
    }

    fn program(dir: &Path, script: &str) -> PathBuf {
        let program = dir.join("log.sh");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
        program
    }

    #[tokio::test]
    async fn in_the_second_version_only_a_byte_says_that_the_program_reads() {
        let dir = tempfile::tempdir().unwrap();
        for (script, versions) in [
            ("exit 1", &[Version::One][..]),
            ("exec 5>&-; cat <&3", &[Version::One]),
            ("printf x >&5; exec 5>&-; cat <&3", &[Version::One, Version::Two]),
        ] {
            for version in [Version::One, Version::Two] {
                let started = start(version, &program(dir.path(), script).display().to_string(), "ns", "c").await;
                assert_eq!(started.is_ok(), versions.contains(&version), "{script} {version:?}: {started:?}");
            }
        }
    }

    #[tokio::test]
    async fn the_program_gets_the_output_and_the_names() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = "exec 5>&-\n{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID\"; cat <&3; cat <&4; } >\"$1\"";
        let program = program(dir.path(), script);
        let uri = format!("{}?{}", program.display(), log.display());
        let (mut stdout, mut stderr) = start(Version::One, &uri, "ns", "c").await.unwrap();
        stdout.write_all(b"out\n").await.unwrap();
        stderr.write_all(b"err\n").await.unwrap();
        drop((stdout, stderr));
        let complete = "ns/c\nout\nerr\n";
        while std::fs::read_to_string(&log).unwrap_or_default() != complete {
            tokio::task::yield_now().await;
        }
    }

    proptest! {
        #[test]
        fn no_uri_makes_the_parser_panic(uri in "\\PC*") {
            let _ = parse(&uri);
        }
    }
}
