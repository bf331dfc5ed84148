//! One call of a CNI plugin (specification 1.1.0, section 2): a program that reads JSON, does something to a network
//! namespace, and writes JSON.
//!
//! It has a process group of its own, which is killed with it where it takes too long. What it leaves running when it ends by
//! itself, such as a daemon, goes on: that is not waited for, or for a moment if it has the plugin's output open and the result is not there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde_json::Value;

use super::CniError;
use crate::console::printable;

/// How long a plugin may take. Those that wait for a daemon of theirs take seconds.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How long the output of one that has ended may stay open without a whole result in it.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Most output that is read.
const MAX_OUTPUT_BYTES: usize = 1 << 20;
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
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(io)?;
        let mut talk = Talk::new(&mut child, input.to_string().into_bytes()).map_err(io)?;
        if !self.wait(&child, &mut talk).map_err(io)? {
            // All that it has started, too.
            kill_process_group(Pid::from_child(&child), Signal::KILL).map_err(|errno| io(errno.into()))?;
            child.wait().map_err(io)?;
            return Err(failed(format!("it did not end within {} s and was killed", self.timeout.as_secs())));
        }
        let status = child.wait().map_err(io)?;
        let [stdout, stderr] = talk.outputs.map(|output| output.bytes);
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

    /// Talks to a plugin until it has ended and said what it has to; false where it has not ended in time.
    fn wait(&self, child: &Child, talk: &mut Talk) -> io::Result<bool> {
        let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
        let mut deadline = Instant::now() + self.timeout;
        let mut ended = false;
        while !(ended && talk.is_over()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            if talk.wait((!ended).then_some(pidfd.as_fd()), left)? {
                ended = true;
                deadline = deadline.min(Instant::now() + LAST_WORDS);
            }
        }
        Ok(ended)
    }
}

/// What passes between a plugin and Hull.
struct Talk {
    /// Gone when all is written, or nobody reads it.
    stdin: Option<OwnedFd>,
    input: Vec<u8>,
    /// How much of the input is written.
    written: usize,
    /// Standard output and error.
    outputs: [Output; 2],
}

struct Output {
    /// Gone at its end.
    stream: Option<OwnedFd>,
    bytes: Vec<u8>,
}

impl Talk {
    fn new(child: &mut Child, input: Vec<u8>) -> io::Result<Self> {
        let output = |stream| Output { stream, bytes: Vec::new() };
        let stdin = child.stdin.take().map(OwnedFd::from);
        let outputs = [child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from)];
        for end in outputs.iter().chain([&stdin]).flatten() {
            rustix::io::ioctl_fionbio(end, true)?;
        }
        Ok(Self { stdin, input, written: 0, outputs: outputs.map(output) })
    }

    /// Whether all that a plugin that has ended has to say is there: its output has ended, or, since somebody else may have
    /// that open, its result is whole.
    fn is_over(&self) -> bool {
        let is_whole = || serde_json::from_slice::<Value>(&self.outputs[0].bytes).is_ok();
        self.outputs.iter().all(|output| output.stream.is_none()) || is_whole()
    }

    /// Waits for up to this time, and passes on what there is. Whether `end`, which tells of the plugin's end, is readable.
    fn wait(&mut self, end: Option<BorrowedFd<'_>>, most: Duration) -> io::Result<bool> {
        let limit = Timespec { tv_sec: most.as_secs().cast_signed(), tv_nsec: most.subsec_nanos().into() };
        let readable = self.outputs.iter().filter_map(|output| output.stream.as_ref()).map(AsFd::as_fd);
        let mut set: Vec<_> =
            end.into_iter().chain(readable).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        set.extend(self.stdin.as_ref().map(|stdin| PollFd::new(stdin, PollFlags::OUT)));
        match poll(&mut set, Some(&limit)) {
            Err(rustix::io::Errno::INTR) => return Ok(false),
            count => count?,
        };
        let ended = end.is_some() && !set[0].revents().is_empty();
        // What it said before its end is there by now.
        self.outputs.iter_mut().for_each(Output::read);
        self.write();
        Ok(ended)
    }

    fn write(&mut self) {
        let Some(stdin) = &self.stdin else { return };
        match rustix::io::write(stdin, &self.input[self.written..]) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            // One that does not read all of it says why by its result.
            Err(_) => self.written = self.input.len(),
            Ok(count) => self.written += count,
        }
        if self.written == self.input.len() {
            self.stdin = None;
        }
    }
}

impl Output {
    /// Reads what is there.
    fn read(&mut self) {
        let Some(stream) = &self.stream else { return };
        let mut part = [0; 4096];
        loop {
            match rustix::io::read(stream, &mut part) {
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR) => {}
                Ok(count) if count > 0 && self.bytes.len() < MAX_OUTPUT_BYTES => {
                    self.bytes.extend_from_slice(&part[..count]);
                }
                // What was read before an error is what there is to show.
                _ => break,
            }
        }
        self.stream = None;
    }
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
        write_script(&dir.path().join("fake"), script);
        let mut caller = Caller::new("c1", "/ns".to_owned(), "eth0");
        caller.path = format!("/nowhere:{}", dir.path().display());
        (dir, caller)
    }

    fn write_script(program: &Path, script: &str) {
        std::fs::write(program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(program, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The process whose number a script has written down.
    fn noted(path: &Path) -> Option<Pid> {
        Pid::from_raw(std::fs::read_to_string(path).ok()?.trim().parse().ok()?)
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
        // More than a pipe holds, which none of these reads.
        let input = json!({"type": "fake", "padding": "x".repeat(100_000)});
        let (dir, mut caller) = caller("");
        caller.timeout = Duration::from_millis(200);
        let note = dir.path().join("pid");
        for script in ["exec sleep 1000".to_owned(), format!("sleep 1000 & echo $! >{}; wait", note.display())] {
            write_script(&dir.path().join("fake"), &script);
            let said = caller.call("ADD", &input).unwrap_err().to_string();
            assert!(said.contains("was killed"), "{said}");
        }
        // On a machine that is so slow that the second one has not come to it, there is nobody to look for.
        let Some(sleep) = noted(&note) else { return };
        match pidfd_open(sleep, PidfdFlags::empty()) {
            Err(errno) => assert_eq!(errno, rustix::io::Errno::SRCH),
            Ok(pidfd) => {
                let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
                let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit));
                assert_eq!(ended, Ok(1), "the plugin's own child lives on");
            }
        }
    }

    #[test]
    fn what_a_plugin_leaves_running_is_left_alone_and_not_waited_for() {
        let (dir, caller) = caller("");
        let note = dir.path().join("pid");
        let script = format!("cat >/dev/null; sleep 1000 & echo $! >{}; echo '{{\"a\": 1}}'", note.display());
        write_script(&dir.path().join("fake"), &script);
        assert_eq!(caller.call("ADD", &json!({"type": "fake"})).unwrap(), Some(json!({"a": 1})));
        // It goes on, as a daemon is meant to; not here.
        rustix::process::kill_process(noted(&note).unwrap(), Signal::KILL).unwrap();
    }

    #[test]
    fn a_plugin_is_a_name() {
        let (_dir, caller) = caller("");
        for kind in ["", "..", "../fake", "none"] {
            assert!(matches!(caller.call("ADD", &json!({"type": kind})), Err(CniError::Missing { .. })), "{kind}");
        }
    }
}
