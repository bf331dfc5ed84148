//! containerd is stopped, orderly or not, and comes back: under pods that run, and in the middle of calls.

use std::fs;
use std::path::PathBuf;

use fixture::containerd::{processes, stop};
use fixture::cri::{
    CGROUP, Container, Pod, STDIN, STDOUT, Streams, Traces, cgroup_below, cri, eventually, handlers, handlers_and_runc,
    is_hull,
};
use nix::sys::signal::Signal;

/// A pod under which containerd goes.
struct Running {
    handler: &'static str,
    pod: Pod,
    counter: Container,
    /// Ends when it is told to, through the volume.
    ender: Container,
    volume: PathBuf,
    streams: Streams,
    terminal: Streams,
    /// Containers that answer what they are told, without a terminal and with one, and a client that is attached to each.
    told: [(bool, Container, Streams); 2],
}

impl Running {
    fn start(handler: &'static str) -> Self {
        let pod = Pod::start(handler, |_| {});
        let volume = pod.volume("kubernetes.io~empty-dir", "shared");
        let counter = pod.run("counter", "i=0; while sleep 0.1; do i=$((i+1)); echo line $i; done", |_| {});
        let script = "until [ -e /volume/end ]; do sleep 0.1; done; echo ended; touch /volume/ended; exit 7";
        let ender = pod.run("ender", script, |config| config.mount(&volume, "/volume", false));
        let mut streams = counter.stream("while read line; do echo got $line; done", false);
        streams.send(STDIN, b"word\n");
        streams.expect(STDOUT, b"got word\n");
        let mut terminal = counter.stream("tty; sleep 1000", true);
        terminal.expect(STDOUT, b"/dev/pts/");
        let told = [(false, "piped"), (true, "typed")].map(|(tty, name)| {
            let script = "while read line; do echo got $line; done";
            let container = pod.run(name, script, |config| (config.stdin, config.tty) = (true, tty));
            let mut attached = container.attach(tty);
            attached.send(STDIN, b"word\n");
            attached.expect(STDOUT, b"got word");
            (tty, container, attached)
        });
        counter.logs("stdout F line 1");
        Self { handler, pod, counter, ender, volume, streams, terminal, told }
    }

    /// What its client finds when containerd has come back.
    fn check(mut self) {
        let handler = self.handler;
        println!("with {handler}");
        // The streams went with containerd, and whoever reads them is told.
        self.streams.rest(STDOUT);
        self.terminal.rest(STDOUT);
        assert_eq!(self.pod.status().state, 0, "{handler}: the pod is ready");
        assert_eq!(self.counter.status().state, 1, "{handler}: the container runs");
        let ended = self.ender.ended();
        if is_hull(handler) {
            assert_eq!((ended.exit_code, ended.reason.as_str()), (7, "Error"), "{handler}");
            // What it said last waited for somebody to read it.
            self.ender.logs("stdout F ended");
        } else {
            // Of runc's containers containerd knows by then that they have ended, and at times not how.
            assert!(matches!(ended.exit_code, 7 | 255), "{handler}: {ended}");
        }
        // Not a line of the log is missing, and more come.
        let written = self.counter.log_lines().len();
        let lines = eventually("the log goes on", || match self.counter.log_lines() {
            lines if lines.len() > written + 3 => Ok(lines),
            lines => Err(format!("{} lines", lines.len())),
        });
        for (line, number) in lines.iter().zip(1..) {
            assert_eq!(*line, format!("stdout F line {number}"), "{handler}");
        }
        assert_eq!(self.counter.exec("echo alive"), "alive", "{handler}");
        let mut streams = self.counter.stream("read line; echo got $line; exit 3", false);
        streams.send(STDIN, b"more\n");
        streams.expect(STDOUT, b"got more\n");
        assert_eq!(streams.exit_code(), 3, "{handler}");
        let mut attached = self.counter.attach(false);
        attached.expect(STDOUT, b"line ");
        drop(attached);
        // The input of a container is not at its end because its client was away.
        for (tty, container, mut attached) in self.told {
            attached.rest(STDOUT);
            let mut again = container.attach(tty);
            again.send(STDIN, b"more\n");
            again.expect(STDOUT, b"got more");
        }
        assert!(self.counter.stats().memory.working_set_bytes.value > 0, "{handler}");
        self.ender.remove();
        self.counter.stop(0);
        assert_eq!(self.counter.ended().exit_code, 137, "{handler}");
        self.counter.remove();
        self.pod.end();
    }
}

#[test]
fn containerd_restarted_under_pods_with_open_streams_loses_nothing() {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        println!("by {signal}");
        // One after the other, so that each ends with all that came before it; the restart is for all of them.
        let mut pods: Vec<Running> = handlers_and_runc().map(Running::start).collect();
        let stopped = stop(signal);
        for pod in &pods {
            fs::write(pod.volume.join("end"), "").unwrap();
        }
        for pod in &pods {
            eventually("the container ends without containerd", || {
                if pod.volume.join("ended").exists() { Ok(()) } else { Err(pod.handler.to_owned()) }
            });
        }
        stopped.start();
        cri().await_ready();
        while let Some(pod) = pods.pop() {
            pod.check();
        }
    }
}

#[test]
fn containerd_restarted_in_the_middle_of_calls_hangs_nothing_and_leaves_nothing() {
    // Not with runc, whose shim of a pod that was being made has been seen to stay.
    for handler in handlers().iter().copied() {
        println!("with {handler}");
        let pod = Pod::start(handler, |_| {});
        let volume = pod.volume("kubernetes.io~empty-dir", "shared");
        let mount = |config: &mut fixture::cri::api::ContainerConfig| config.mount(&volume, "/volume", false);
        let stubborn = "trap 'touch /volume/asked' TERM; touch /volume/ready; while :; do sleep 0.1; done";
        let container = pod.run("stubborn", stubborn, mount);
        let appears = |name: &str| {
            eventually(name, || if volume.join(name).exists() { Ok(()) } else { Err(handler.to_owned()) });
        };
        appears("ready");
        let (before, known) = (Traces::now(), cri().pods());
        let shims = || processes("containerd-shim-hull-v2").len() + processes("containerd-shim-runc-v2").len();
        let shims_before = shims();
        let stopped = std::thread::scope(|scope| {
            let exec = scope.spawn(|| container.try_exec("touch /volume/executed; sleep 1000", 0));
            appears("executed");
            let stopping = scope.spawn(|| container.try_stop(1000));
            appears("asked");
            let starting = scope.spawn(|| Pod::try_start(handler, |_| {}));
            eventually("the second pod begins", || if shims() > shims_before { Ok(()) } else { Err(String::new()) });
            let stopped = stop(Signal::SIGKILL);
            // None of them waits for what does not come.
            assert!(exec.join().unwrap().is_err(), "{handler}");
            assert!(stopping.join().unwrap().is_err(), "{handler}");
            assert!(starting.join().unwrap().is_err(), "{handler}");
            stopped
        });
        stopped.start();
        cri().await_ready();
        // Of a pod that was being made the kubelet removes what it is told of.
        for id in cri().pods().iter().filter(|id| !known.contains(id)) {
            cri().remove_pod(id);
        }
        assert_eq!(container.status().state, 1, "{handler}: it runs");
        assert_eq!(container.exec("echo alive"), "alive", "{handler}");
        eventually("nothing of the second pod is left", || {
            // So it does with the cgroups that it made. Those of pods that are there have others below them.
            for pod in fs::read_dir(cgroup_below(CGROUP)).unwrap() {
                let _ = fs::remove_dir(pod.unwrap().path());
            }
            before.are_all()
        });
        container.stop(0);
        assert_eq!(container.ended().exit_code, 137, "{handler}");
        container.remove();
        pod.end();
    }
}
