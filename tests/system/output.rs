//! What a program sees and how its end is told.

use fixture::{busybox, debian, hull, python, script};

#[test]
fn prints_what_the_program_prints() {
    assert_eq!(script("echo hello").run().ok(), "hello");
}

#[test]
fn runs_a_real_program_from_a_debian_image() {
    assert_eq!(python("print(6*7)").run().ok(), "42");
}

#[test]
fn exits_as_the_program_does() {
    for code in [0, 1, 3, 42, 255] {
        assert_eq!(script(&format!("exit {code}")).run().code, code);
    }
}

#[test]
fn a_signal_adds_128() {
    // As PID 1 of its namespace a program is spared its own signals, so another one is killed.
    assert_eq!(script("sh -c 'kill -9 $$'; exit $?").run().code, 128 + 9);
}

#[test]
fn keeps_the_two_outputs_apart() {
    let said = script("echo out; echo err >&2").run();
    assert_eq!((said.text().as_str(), said.stderr.as_str()), ("out\n", "err\n"));
}

#[test]
fn the_guest_has_the_size_that_was_asked_for() {
    let said = hull(["run", "--rm", "--cpus", "2", "--memory", "192", &busybox(), "sh", "-c", "nproc; free -m"]).run();
    let text = said.ok();
    let mut words = text.split_whitespace();
    assert_eq!(words.next(), Some("2"));
    let total: u64 = words.skip_while(|word| *word != "Mem:").nth(1).unwrap().parse().unwrap();
    // The kernel keeps some for itself.
    assert!((140..=192).contains(&total), "{total} MiB");
}

#[test]
fn environment_directory_user_and_host_name_are_those_asked_for() {
    let said = hull([
        "run",
        "--rm",
        "--memory",
        "128",
        "-e",
        "COLOUR=blue",
        "-w",
        "/tmp",
        "-u",
        "1234:5678",
        "--hostname",
        "box",
        &busybox(),
        "sh",
        "-c",
        "echo $COLOUR; pwd; id -u; id -g; hostname",
    ]);
    assert_eq!(said.run().ok(), "blue\n/tmp\n1234\n5678\nbox");
}

#[test]
fn users_are_found_by_name_in_the_image() {
    let said = hull(["run", "--rm", "--memory", "256", "-u", "www-data", &debian(), "id"]).run().ok();
    assert_eq!(said, "uid=33(www-data) gid=33(www-data) groups=33(www-data)");
}

#[test]
fn a_read_only_root_refuses_changes() {
    let said = hull(["run", "--rm", "--memory", "128", "--read-only", &busybox(), "touch", "/new"]).run();
    assert_eq!(said.code, 1);
    assert!(said.stderr.contains("Read-only file system"), "{}", said.stderr);
}

#[test]
fn changes_to_the_root_do_not_outlive_the_container() {
    assert_eq!(script("echo x >/marker && cat /marker").run().ok(), "x");
    assert_eq!(script("ls /marker 2>/dev/null || echo none").run().ok(), "none");
}
