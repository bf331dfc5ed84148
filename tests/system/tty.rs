//! Terminals.

use fixture::terminal::Terminal;
use fixture::{busybox, hull};

fn shell() -> Terminal {
    let mut terminal = Terminal::run(["run", "--rm", "-it", "--memory", "128", &busybox(), "sh"]);
    terminal.wait_for("# ");
    terminal
}

#[test]
fn a_shell_has_a_terminal() {
    let mut terminal = shell();
    terminal.type_in("tty; exit 5\n");
    terminal.wait_for("/dev/pts/");
    assert_eq!(terminal.finish(), 5);
}

#[test]
fn ctrl_c_interrupts_the_program_and_not_hull() {
    let mut terminal = shell();
    terminal.run_something();
    terminal.type_in("\x03");
    terminal.wait_for("# ");
    terminal.type_in("echo status $?; exit\n");
    terminal.wait_for("status 130");
    assert_eq!(terminal.finish(), 0);
}

#[test]
fn job_control_works() {
    let mut terminal = shell();
    terminal.run_something();
    terminal.type_in("\x1a");
    terminal.wait_for("Stopped");
    terminal.type_in("jobs; kill -9 %1; wait; exit 0\n");
    terminal.wait_for("exec sleep 1000");
    assert_eq!(terminal.finish(), 0);
}

#[test]
fn the_window_has_its_size_and_follows_it() {
    let mut terminal = shell();
    terminal.type_in("stty size\n");
    terminal.wait_for("24 80");
    terminal.resize(132, 43);
    // The shell is told by SIGWINCH; asking again until it is so needs no clock.
    terminal.type_in("while [ \"$(stty size)\" != '43 132' ]; do :; done; echo resized; exit\n");
    terminal.wait_for("\nresized");
    assert_eq!(terminal.finish(), 0);
}

#[test]
fn a_terminal_needs_one() {
    hull(["run", "--rm", "-it", &busybox(), "true"]).run().failed(&["terminal", "-t"]);
}
