//! The guest is a machine of its own, and what goes wrong there stays there.

use fixture::{Detached, busybox, hull, script};

#[test]
fn the_kernel_is_not_the_hosts() {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(script("uname -r").run().ok(), host.trim());
}

#[test]
fn the_program_is_the_first_of_its_namespace() {
    assert_eq!(script("echo $$").run().ok(), "1");
}

#[test]
fn a_fork_bomb_stays_inside() {
    let _bomb =
        Detached::start(["--memory", "128", &busybox(), "sh", "-c", "b() { b | b & }; b; while :; do sleep 1; done"]);
    // While it goes on, the host and other sandboxes do too; and it ends when it is told to, with this test.
    assert_eq!(script("echo still here").run().ok(), "still here");
}

#[test]
fn a_memory_hog_is_killed_inside() {
    let said = hull(["run", "--rm", "--memory", "128", &busybox(), "sh", "-c", "tail /dev/zero; echo after $?"]).run();
    assert!(said.text().contains("after 137"), "{} {}", said.text(), said.stderr);
}
