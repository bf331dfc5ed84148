//! What a program was told is on the disk is there, however its machine ends.

use std::fs;
use std::io::{BufRead, BufReader, Lines, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use fixture::{debian, hull};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Writes numbered records to the disk and to the shares without end, each at its place, and prints a number once all are synced.
const WRITER: &str = "
import os
targets = [os.open('/dev/vda', os.O_WRONLY)]
targets += [os.open(f'/{caching}/records', os.O_WRONLY | os.O_CREAT, 0o644) for caching in ('never', 'auto', 'always')]
number = 0
while True:
    for fd in targets:
        os.pwrite(fd, b'%09d\\n' % number * 100, number * 1000)
        os.fsync(fd)
    print(number, flush=True)
    number += 1
";

/// How many records from the first on are in a file, whole and at their places.
fn records(path: &Path) -> usize {
    let content = fs::read(path).unwrap();
    let whole = |(number, record): &(usize, &[u8])| *record == format!("{number:09}\n").repeat(100).as_bytes();
    content.chunks(1000).enumerate().take_while(whole).count()
}

/// The last number of those that come, which must be all numbers from 0 on.
fn last_number(lines: Lines<impl BufRead>) -> usize {
    let numbers: Vec<usize> = lines.map(|line| line.unwrap().parse().unwrap()).collect();
    assert!(numbers.iter().copied().eq(0..numbers.len()), "{numbers:?}");
    numbers.len() - 1
}

#[test]
fn what_was_synced_survives_the_death_of_the_machine() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let disk = dir.path().join("disk.img");
    fs::File::create(&disk).unwrap().set_len(8 << 20).unwrap();
    let shares = ["never", "auto", "always"].map(|caching| dir.path().join(caching));
    for share in &shares {
        fs::create_dir(share).unwrap();
    }
    let [never, auto, always] = ["never", "auto", "always"]
        .map(|caching| format!("{}:/{caching}:cache={caching}", dir.path().join(caching).display()));
    let mut child = hull([
        "run",
        "--rm",
        "--memory",
        "256",
        "--name",
        "durable",
        "--disk",
        disk.to_str().unwrap(),
        "-v",
        &never,
        "-v",
        &auto,
        "-v",
        &always,
        &debian(),
        "python3",
        "-c",
        WRITER,
    ])
    .spawn();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut said = String::new();
    for _ in 0..20 {
        stdout.read_line(&mut said).unwrap();
    }
    let record: serde_json::Value = serde_json::from_str(&hull(["inspect", "durable"]).run().ok()).unwrap();
    let vmm = i32::try_from(record[0]["vmm_pid"].as_i64().unwrap()).unwrap();
    // It has gone on meanwhile, and is somewhere in the middle of it.
    kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
    stdout.read_to_string(&mut said).unwrap();
    child.wait_with_output().unwrap();
    // The last line may have been cut.
    said.truncate(said.rfind('\n').unwrap() + 1);
    let last = last_number(said.as_bytes().lines());
    assert!(last >= 19, "{last}");
    for path in shares.iter().map(|share| share.join("records")).chain([disk]) {
        let found = records(&path);
        assert!(found > last, "{last} was told to be in {}, and there are {found} records", path.display());
    }
}
