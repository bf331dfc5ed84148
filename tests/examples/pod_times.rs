//! How long pods take to come up, with Hull and with runc: `pod_times [AT_ONCE]`, where `lab/run --containerd` has containerd.
//!
//! Without a number: a pod with one container, from RunPodSandbox until the container runs, the median of five after one that
//! warms up. With a number: that many such pods, begun at the same moment; what fails is begun again, as the kubelet does, and counted.
//! Prints figures as JSON, for `bench/run`.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use fixture::cri::{Pod, RUNC, handlers};
use serde_json::{Map, Value, json};

const RUNS: usize = 5;
/// What fails this often is an error.
const MOST_ATTEMPTS: usize = 10;
/// ContainerState of the CRI.
const CONTAINER_RUNNING: i32 = 1;

fn main() {
    let at_once = std::env::args().nth(1).map(|number| number.parse().expect("a number of pods"));
    let mut figures = Map::new();
    for (name, handler) in [("runc", RUNC), ("hull", handlers()[0])] {
        match at_once {
            None => {
                start(handler);
                let times = (0..RUNS).map(|_| start(handler).0).collect();
                add(&mut figures, format!("cri_pod_{name}_ms"), percentile(times, 50));
            }
            Some(count) => {
                start(handler);
                let (times, again) = start_together(handler, count);
                eprintln!("{name}: begun again {again} times");
                figures.insert(format!("cri_{count}_pods_{name}_again"), json!({ "value": again, "unit": "" }));
                for percent in [50, 99] {
                    let figure = format!("cri_{count}_pods_{name}_p{percent}_ms");
                    add(&mut figures, figure, percentile(times.clone(), percent));
                }
            }
        }
    }
    println!("{}", json!({ "figures": figures }));
}

/// Starts a pod and says how long it took; the pod is removed when it is dropped.
fn start(handler: &str) -> (Duration, Pod) {
    let began = Instant::now();
    let pod = Pod::start(handler, |_| {});
    let container = pod.run("main", "sleep 100000", |_| {});
    let took = began.elapsed();
    assert_eq!(container.status().state, CONTAINER_RUNNING, "it runs once StartContainer has answered");
    (took, pod)
}

/// The same, and how often it was begun again.
fn start_at_last(handler: &str) -> (Duration, Pod, usize) {
    let began = Instant::now();
    for again in 0..MOST_ATTEMPTS {
        let pod = Pod::try_start(handler, |_| {}).and_then(|pod| {
            pod.try_run("main", "sleep 100000", |_| {})?;
            Ok(pod)
        });
        match pod {
            Ok(pod) => return (began.elapsed(), pod, again),
            Err(status) => eprintln!("with {handler}: {status}"),
        }
    }
    panic!("with {handler} a pod did not come up in {MOST_ATTEMPTS} attempts");
}

/// The time that each of `count` pods took, all of which were there at the end, and how many were begun again.
fn start_together(handler: &str, count: usize) -> (Vec<Duration>, usize) {
    let barrier = Barrier::new(count);
    let started: Vec<_> = thread::scope(|scope| {
        let starting: Vec<_> = (0..count)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    start_at_last(handler)
                })
            })
            .collect();
        starting.into_iter().map(|thread| thread.join().expect("every pod comes up")).collect()
    });
    let again = started.iter().map(|(_, _, again)| again).sum();
    (started.iter().map(|(took, _, _)| *took).collect(), again)
}

/// The nearest rank: the least of the times that `percent` of them do not exceed.
fn percentile(mut times: Vec<Duration>, percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * percent).div_ceil(100).max(1) - 1]
}

fn add(figures: &mut Map<String, Value>, name: String, time: Duration) {
    let milliseconds = (time.as_secs_f64() * 10_000.0).round() / 10.0;
    eprintln!("{name}: {milliseconds} ms");
    figures.insert(name, json!({ "value": milliseconds, "unit": "ms" }));
}
