//! Containers in the background, signals, ends good and bad, and what is left.

use std::io::{BufRead, BufReader};

use fixture::{Detached, Said, busybox, debian, hull, traces_of, wait_gone};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn pid(value: &serde_json::Value) -> i32 {
    i32::try_from(value.as_i64().expect("a process identifier")).expect("a process identifier")
}

#[test]
fn a_detached_container_is_listed_logged_and_removed() {
    let container = Detached::start([
        "--name",
        "listed",
        "--memory",
        "128",
        &busybox(),
        "sh",
        "-c",
        "echo hi; echo oh >&2; exit 4",
    ]);
    wait_gone(pid(&container.inspect()["owner_pid"]));
    let listed = hull(["ps", "-a", "--json"]).run().ok();
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let record = listed.as_array().unwrap().iter().find(|record| record["id"] == container.id.as_str()).unwrap();
    assert_eq!((&record["name"], &record["exit_code"]), (&"listed".into(), &4.into()));
    let logs = hull(["logs", "listed"]).run();
    assert_eq!((logs.text().as_str(), logs.stderr.as_str()), ("hi\n", "oh\n"));
    hull(["rm", "listed"]).run().ok();
    assert!(traces_of(&container.id).is_empty());
}

#[test]
fn stop_asks_first() {
    let container = Detached::trapping("'exit 9' TERM");
    hull(["stop", &container.id]).run().ok();
    assert_eq!(container.inspect()["exit_code"], 9);
}

#[test]
fn stop_kills_what_does_not_listen() {
    let container = Detached::trapping("'' TERM");
    hull(["stop", "-t", "1", &container.id]).run().ok();
    assert_eq!(container.inspect()["exit_code"], 137);
}

#[test]
fn kill_sends_the_signal_that_it_is_told() {
    let container = Detached::trapping("'exit 10' USR1");
    let owner = pid(&container.inspect()["owner_pid"]);
    hull(["kill", "-s", "USR1", &container.id]).run().ok();
    wait_gone(owner);
    assert_eq!(container.inspect()["exit_code"], 10);
}

#[test]
fn a_signal_to_hull_is_passed_on() {
    let mut child = hull([
        "run",
        "--rm",
        "--memory",
        "128",
        &busybox(),
        "sh",
        "-c",
        "trap 'exit 11' TERM; echo ready; while :; do sleep 1; done",
    ])
    .spawn();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(Said::new(child.wait_with_output().unwrap()).code, 11);
}

#[test]
fn the_death_of_the_vmm_is_told_and_leaves_nothing() {
    let mut child =
        hull(["run", "--rm", "--memory", "128", "--name", "doomed", &busybox(), "sh", "-c", "echo ready; sleep 1000"])
            .spawn();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut String::new()).unwrap();
    let record = hull(["inspect", "doomed"]).run().ok();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    kill(Pid::from_raw(pid(&record[0]["vmm_pid"])), Signal::SIGKILL).unwrap();
    let said = Said::new(child.wait_with_output().unwrap());
    said.failed(&["virtual machine", "signal 9"]);
    assert!(traces_of(record[0]["id"].as_str().unwrap()).is_empty());
}

#[test]
fn the_death_of_hull_takes_the_vmm_along_and_is_swept() {
    let container = Detached::sleeping();
    let record = container.inspect();
    let (owner, vmm) = (pid(&record["owner_pid"]), pid(&record["vmm_pid"]));
    kill(Pid::from_raw(owner), Signal::SIGKILL).unwrap();
    wait_gone(owner);
    wait_gone(vmm);
    let listed = hull(["ps", "-a"]).run().ok();
    assert!(!listed.contains(&container.id), "{listed}");
    assert!(traces_of(&container.id).is_empty());
}

#[test]
fn stats_and_inspect_show_figures() {
    let container = Detached::sleeping();
    let stats: serde_json::Value = serde_json::from_str(&hull(["stats", "--json", &container.id]).run().ok()).unwrap();
    assert!(stats[0]["memory_usage_bytes"].as_u64().unwrap() > 0);
    assert!(stats[0]["pids"].as_u64().unwrap() >= 1);
    let vm = &container.inspect()["vm"];
    assert_eq!(vm["status"]["state"], "running");
    assert!(vm["counters"]["guest_resident_bytes"].as_u64().unwrap() > 1 << 20);
}

#[test]
fn an_image_is_loaded_listed_used_by_name_and_removed() {
    hull(["image", "load", "--name", "loaded:1", &debian()]).run().ok();
    let listed = hull(["image", "ls", "--json"]).run().ok();
    assert!(listed.contains("loaded:1"), "{listed}");
    assert_eq!(hull(["run", "--rm", "--memory", "256", "loaded:1", "echo", "by name"]).run().ok(), "by name");
    hull(["image", "rm", "loaded:1"]).run().ok();
    hull(["run", "--rm", "loaded:1", "true"]).run().failed(&["loaded:1"]);
}
