//! Standard streams that containerd 2 opens to the shim instead of making FIFOs (`io_type = "streaming"`).

use fixture::cri::{Pod, STDIN, STDOUT, streaming_handler};

#[test]
fn streams_streaming_carries_all_where_containerd_is_told_to() {
    // containerd 1.7 does not have it.
    let Some(handler) = streaming_handler() else { return };
    let pod = Pod::start(handler, |_| {});
    super::exec_and_attach_carry_streams(handler, &pod);
    super::a_terminal_has_a_size_and_passes_interrupts_on(handler, &pod);
    super::its_log_goes_on_in_a_new_file(handler, &pod);

    // More than all windows on the way hold, in both directions.
    let container = pod.run("bulk", "seq 1 200000; sleep 1000", |_| {});
    container.logs("stdout F 200000");
    let lines = container.log_lines();
    assert_eq!(lines.len(), 200_000);
    assert!(lines.iter().zip(1..).all(|(line, number)| *line == format!("stdout F {number}")));
    let mut counted = container.stream("head -c 1000000 | wc -c", false);
    for _ in 0..100 {
        counted.send(STDIN, &[b'x'; 10_000]);
    }
    counted.expect(STDOUT, b"1000000\n");
    assert_eq!(counted.exit_code(), 0);

    // The output is whole when the end is told.
    let executed = container.try_exec("seq 1 50000; seq 1 50000 >&2; exit 5", 0).unwrap();
    assert_eq!((executed.code, executed.stdout.lines().count(), executed.stderr.lines().count()), (5, 50_000, 50_000));
    pod.end();
}
