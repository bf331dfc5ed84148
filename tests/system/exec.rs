//! More programs in a running container.

use std::io::Read;

use fixture::{Detached, hull};

#[test]
fn a_second_program_sees_the_container_of_the_first() {
    let container = Detached::sleeping();
    container.exec(["sh", "-c", "echo shared >/file"]).run().ok();
    assert_eq!(container.exec(["cat", "/file"]).run().ok(), "shared");
    let ps = container.exec(["ps"]).run().ok();
    assert!(ps.contains("sleep 1000"), "{ps}");
}

#[test]
fn exits_as_the_program_does() {
    let container = Detached::sleeping();
    for code in [0, 7, 255] {
        assert_eq!(container.exec(["sh", "-c", &format!("exit {code}")]).run().code, code);
    }
    assert_eq!(container.exec(["sh", "-c", "kill -TERM $$"]).run().code, 128 + 15);
}

#[test]
fn input_is_passed_on_to_its_end() {
    let container = Detached::sleeping();
    let said = hull(["exec", "-i", &container.id, "wc", "-c"]).stdin(vec![b'x'; 100_000]).run();
    assert_eq!(said.ok(), "100000");
}

#[test]
fn environment_directory_and_user_can_differ() {
    let container = Detached::sleeping();
    let said = hull([
        "exec",
        "-e",
        "A=b",
        "-w",
        "/tmp",
        "-u",
        "12:34",
        &container.id,
        "sh",
        "-c",
        "echo $A; pwd; id -u; id -g",
    ]);
    assert_eq!(said.run().ok(), "b\n/tmp\n12\n34");
}

#[test]
fn users_and_groups_are_those_that_the_container_has_by_now() {
    let container = Detached::sleeping();
    let script = "echo web:x:33:44::/srv:/bin/sh >>/etc/passwd; echo log:x:4:web >>/etc/group";
    container.exec(["sh", "-c", script]).run().ok();
    let ids = |user: &str| hull(["exec", "-u", user, &container.id, "sh", "-c", "id -u; id -g; id -G"]).run();
    assert_eq!(ids("web").ok(), "33\n44\n44 4");
    assert_eq!(ids("web:log").ok(), "33\n4\n4");
    ids("nobody-here").failed(&["nobody-here", "/etc/passwd"]);
    // The lab and most hosts have a user `daemon`; the container's link is not to lead there.
    let link = "rm -f /etc/passwd; ln -s ../../../../../../etc/passwd /etc/passwd; ln -sf /etc/passwd /etc/group";
    container.exec(["sh", "-c", link]).run().ok();
    ids("daemon").failed(&["daemon"]);
}

#[test]
fn many_run_at_once() {
    let container = Detached::sleeping();
    let mut children: Vec<_> =
        (0..16).map(|number| (number, container.exec(["sh", "-c", &format!("echo {number}")]).spawn())).collect();
    for (number, child) in &mut children {
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text.trim(), number.to_string());
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn a_missing_command_or_container_is_named() {
    let container = Detached::sleeping();
    container.exec(["no-such-command"]).run().failed(&["no-such-command"]);
    hull(["exec", "no-such-container", "true"]).run().failed(&["no-such-container", "hull ps"]);
}
