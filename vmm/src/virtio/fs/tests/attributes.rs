//! Owners, modes and times: what a change leaves of them, and what is told.

use super::*;

#[test]
fn the_time_of_birth_is_told() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "file", 0o644).unwrap();
    b.write(file, 0, b"12345").unwrap();
    let Ok(born) = fs::metadata(b.path("file")).unwrap().created() else {
        eprintln!("skipped: no time of birth here");
        return;
    };
    let born = born.duration_since(std::time::UNIX_EPOCH).unwrap();
    // By node, then by handle.
    for (by_handle, handle) in [(0, 0), (1, file.1)] {
        let mut body = words(&[by_handle, 0]);
        body.extend(longs(&[handle]));
        body.extend(words(&[0, 0xfff]));
        let answer = b.ask(STATX, file.0, &body).unwrap();
        assert_eq!(answer.len(), 288);
        let stat = &answer[32..];
        assert_eq!(u32_at(stat, 0) & 0xfff, 0xfff, "all that was asked for");
        assert_eq!((u64_at(stat, 40), u32_at(stat, 28) & 0xffff), (5, 0o100_644));
        assert_eq!((u64_at(stat, 80), u32_at(stat, 88)), (born.as_secs(), born.subsec_nanos()));
        let attr = b.ask(GETATTR, file.0, &longs(&[0, 0])).unwrap();
        // Inode number, seconds of the last modification.
        assert_eq!((u64_at(stat, 32), u64_at(stat, 112)), (u64_at(&attr, 16), u64_at(&attr, 16 + 32)));
    }
    assert_eq!(b.ask(STATX, file.0, &[0; 23]), Err(libc::EINVAL));
    assert_eq!(b.ask(STATX, 99, &[0; 24]), Err(libc::ESTALE));
}
