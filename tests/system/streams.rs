//! Standard streams: every byte, in order, at the pace of the slower side.

use std::io::Read;

use fixture::{busybox, hull, noise, script};

#[test]
fn large_input_comes_back_unchanged() {
    let mut child = hull(["run", "--rm", "-i", "--memory", "128", &busybox(), "cat"]).spawn();
    noise::comes_back(child.stdin.take().unwrap(), child.stdout.take().unwrap(), 64);
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_end_of_input_reaches_the_program() {
    let said = hull(["run", "--rm", "-i", "--memory", "128", &busybox(), "wc", "-c"]).stdin("12345").run();
    assert_eq!(said.ok(), "5");
}

#[test]
fn without_i_there_is_no_input() {
    let said = hull(["run", "--rm", "--memory", "128", &busybox(), "wc", "-c"]).stdin("12345").run();
    assert_eq!(said.ok(), "0");
}

#[test]
fn a_closed_output_ends_the_program() {
    let mut child = script("yes").spawn();
    let mut stdout = child.stdout.take().unwrap();
    let mut some = [0; 4096];
    stdout.read_exact(&mut some).unwrap();
    drop(stdout);
    let code = fixture::Said::new(child.wait_with_output().unwrap()).code;
    assert!(code == 128 + 13 || code == 1, "yes ended with {code} on its broken pipe");
}
