//! Programs in containers that tests talk to, line by line.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout};

use fixture::Detached;

/// A program in a container that one can talk to.
pub(crate) struct Program {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    /// Runs `program`, in Python.
    pub(crate) fn start(container: &Detached, program: &str) -> Self {
        let exec = fixture::Hull::new(["exec", "-i", &container.id, "python3", "-c", program]);
        let mut child = exec.spawn();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, input, output }
    }

    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// The next line.
    pub(crate) fn hear(&mut self) -> String {
        let mut said = String::new();
        self.output.read_line(&mut said).unwrap();
        said.trim_end().to_owned()
    }

    #[track_caller]
    pub(crate) fn expect(&mut self, line: &str) {
        assert_eq!(self.hear(), line);
    }

    pub(crate) fn end(mut self) {
        drop(self.input);
        self.child.wait().unwrap();
    }
}
