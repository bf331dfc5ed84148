//! What a guest's memory costs the host.

use std::thread::sleep;
use std::time::{Duration, Instant};

use fixture::{Detached, busybox};

const MIB: u64 = 1 << 20;

fn resident(container: &Detached) -> u64 {
    container.inspect()["vm"]["counters"]["guest_resident_bytes"].as_u64().expect("a number of bytes")
}

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host() {
    let container = Detached::start(["--memory", "256", &busybox(), "sleep", "1000"]);
    let before = resident(&container);
    // Two file systems, as neither may hold more than 64 MiB.
    let write = "for file in /dev/shm/file /dev/file; do dd if=/dev/zero of=$file bs=1M count=50 || exit; done 2>&1";
    container.exec(["sh", "-c", write]).run().ok();
    let used = resident(&container);
    assert!(used > before + 80 * MIB, "{before} {used}");
    container.exec(["rm", "/dev/shm/file", "/dev/file"]).run().ok();
    // The guest's kernel reports some two seconds after it has freed something; of that the host sees nothing but this figure.
    let deadline = Instant::now() + Duration::from_secs(60);
    while resident(&container) > before + 30 * MIB {
        assert!(Instant::now() < deadline, "{before} {used} {}", resident(&container));
        sleep(Duration::from_millis(500));
    }
}
