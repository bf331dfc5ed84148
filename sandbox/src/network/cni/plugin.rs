//! One call of a CNI plugin (specification 1.1.0, section 2): a program that reads JSON, does something to a network
//! namespace, and writes JSON.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;

use super::CniError;
use crate::console::printable;

/// How long a plugin may take. Those that wait for a daemon of theirs take seconds.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Most output that is read.
const MAX_OUTPUT_BYTES: u64 = 1 << 20;
/// Where plugins are on the common distributions, unless `CNI_PATH` says otherwise.
const DIRECTORIES: &str = "/opt/cni/bin:/usr/lib/cni:/usr/libexec/cni";

/// What is the same for all plugins of a network.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) container_id: String,
    /// Empty at the end of a network whose namespace has gone.
    pub(super) namespace: String,
    pub(super) interface: String,
    /// Directories with plugins, separated by colons.
    path: String,
    timeout: Duration,
}

impl Caller {
    pub(super) fn new(container_id: &str, namespace: String, interface: &str) -> Self {
        Self {
            container_id: container_id.to_owned(),
            namespace,
            interface: interface.to_owned(),
            path: std::env::var("CNI_PATH").unwrap_or_else(|_| DIRECTORIES.to_owned()),
            timeout: TIMEOUT,
        }
    }

    /// Has a plugin carry out a command (`ADD`, `DEL`) and answers its result, if it has one.
    pub(super) fn call(&self, command: &'static str, input: &Value) -> Result<Option<Value>, CniError> {
        let kind = input["type"].as_str().unwrap_or_default();
        let failed = |reason: String| CniError::Plugin { plugin: printable(kind), command, reason };
        let program = self.program(kind)?;
        let io = |error: std::io::Error| failed(error.to_string());
        let mut child = Command::new(program)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_NETNS", &self.namespace)
            .env("CNI_IFNAME", &self.interface)
            .env("CNI_PATH", &self.path)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(io)?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read all of it says why by its result.
            let _ = stdin.write_all(input.to_string().as_bytes());
        }
        let (stdout, stderr) = (reader(child.stdout.take()), reader(child.stderr.take()));
        if !self.wait(&mut child).map_err(io)? {
            return Err(failed(format!("it did not end within {} s and was killed", self.timeout.as_secs())));
        }
        let status = child.wait().map_err(io)?;
        let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
        let answer: Option<Value> = serde_json::from_slice(&stdout).ok();
        if status.success() {
            return Ok(answer);
        }
        let said = answer.as_ref().and_then(message);
        let said = said.unwrap_or_else(|| String::from_utf8_lossy(&stderr).trim().to_owned());
        Err(failed(if said.is_empty() { status.to_string() } else { printable(&said) }))
    }

    /// A plugin's program. Its name is a name, not a path.
    pub(super) fn program(&self, kind: &str) -> Result<PathBuf, CniError> {
        let is_name = !kind.is_empty() && !kind.contains('/') && kind != "." && kind != "..";
        let mut places = self.path.split(':').map(|dir| Path::new(dir).join(kind));
        let program = if is_name { places.find(|path| path.is_file()) } else { None };
        program.ok_or_else(|| CniError::Missing { plugin: printable(kind), path: self.path.clone() })
    }

    /// Waits for a plugin's end; false where it had to be killed.
    fn wait(&self, child: &mut Child) -> std::io::Result<bool> {
        // Identifiers of processes fit, and this one is not reaped yet.
        let pid = Pid::from_child(child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let limit =
            Timespec { tv_sec: self.timeout.as_secs().cast_signed(), tv_nsec: self.timeout.subsec_nanos().into() };
        let ended = loop {
            match poll(&mut [PollFd::new(&pidfd.as_fd(), PollFlags::IN)], Some(&limit)) {
                Err(rustix::io::Errno::INTR) => {}
                count => break count? > 0,
            }
        };
        if !ended {
            child.kill()?;
            child.wait()?;
        }
        Ok(ended)
    }
}

/// Reads a stream to its end, beside the others.
fn reader(stream: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(stream) = stream {
            // What was read before an error is what there is to show.
            let _ = stream.take(MAX_OUTPUT_BYTES).read_to_end(&mut bytes);
        }
        bytes
    })
}

/// What an error result says (section 5).
fn message(answer: &Value) -> Option<String> {
    let message = answer["msg"].as_str()?;
    match answer["details"].as_str() {
        Some(details) if !details.is_empty() => Some(format!("{message}; {details}")),
        _ => Some(message.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use serde_json::json;

    use super::*;

    /// A caller whose one plugin is this shell script.
    fn caller(script: &str) -> (tempfile::TempDir, Caller) {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("fake");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut caller = Caller::new("c1", "/ns".to_owned(), "eth0");
        caller.path = format!("/nowhere:{}", dir.path().display());
        (dir, caller)
    }

    #[test]
    fn a_plugin_is_told_and_answers() {
        let (_dir, caller) =
            caller(r#"cat >/dev/null; echo "{\"a\": \"$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME\"}""#);
        let answer = caller.call("ADD", &json!({"type": "fake"})).unwrap();
        assert_eq!(answer, Some(json!({"a": "ADD c1 /ns eth0"})));
    }

    #[test]
    fn a_plugins_own_words_are_shown() {
        let (_dir, caller) = caller(r#"echo '{"code": 7, "msg": "no room", "details": "in 10.0.0.0/30"}'; exit 1"#);
        let said = caller.call("ADD", &json!({"type": "fake"})).unwrap_err().to_string();
        assert!(said.contains("fake") && said.contains("no room; in 10.0.0.0/30"), "{said}");
        let (_dir, caller) = self::caller("echo broken >&2; exit 3");
        assert!(caller.call("DEL", &json!({"type": "fake"})).unwrap_err().to_string().contains("broken"));
    }

    #[test]
    fn a_plugin_that_hangs_is_killed() {
        let (_dir, mut caller) = caller("exec sleep 1000");
        caller.timeout = Duration::from_millis(50);
        let said = caller.call("ADD", &json!({"type": "fake"})).unwrap_err().to_string();
        assert!(said.contains("was killed"), "{said}");
    }

    #[test]
    fn a_plugin_is_a_name() {
        let (_dir, caller) = caller("");
        for kind in ["", "..", "../fake", "none"] {
            assert!(matches!(caller.call("ADD", &json!({"type": kind})), Err(CniError::Missing { .. })), "{kind}");
        }
    }
}
