//! Standard streams: every byte, in order, at the pace of the slower side.

use std::io::{Read, Write};

use fixture::{busybox, hull, script};
use sha2::{Digest, Sha256};

/// Through a pipe each way. The lab moves some tens of MiB a second, so this is what a test can afford there; HULL_TEST_STREAM_MIB
/// asks for more.
fn stream_mib() -> usize {
    std::env::var("HULL_TEST_STREAM_MIB").map_or(64, |text| text.parse().expect("a number of MiB"))
}

/// A MiB of bytes that do not repeat soon.
fn noise() -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_le_bytes()
    };
    (0..1 << 17).flat_map(|_| next()).collect()
}

#[test]
fn large_input_comes_back_unchanged() {
    let mut child = hull(["run", "--rm", "-i", "--memory", "128", &busybox(), "cat"]).spawn();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        let mut sent = Sha256::new();
        let mut chunk = noise();
        for number in 0..stream_mib() as u64 {
            // No two are the same.
            chunk[..8].copy_from_slice(&number.to_le_bytes());
            sent.update(&chunk);
            stdin.write_all(&chunk).expect("cat reads on");
        }
        sent.finalize()
    });
    let mut stdout = child.stdout.take().unwrap();
    let mut received = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut count = 0;
    while let Ok(read @ 1..) = stdout.read(&mut buffer) {
        received.update(&buffer[..read]);
        count += read;
    }
    assert_eq!(count, stream_mib() << 20);
    assert_eq!(received.finalize(), writer.join().unwrap());
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
