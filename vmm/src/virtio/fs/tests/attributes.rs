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

#[test]
fn set_id_bits_go_with_what_an_ordinary_user_allocates_or_copies() {
    if !is_root() {
        return;
    }
    let mut b = require!(bench());
    let file = b.create(ROOT, "file", 0o755).unwrap();
    b.write(file, 0, &[1; 100]).unwrap();
    let mut allocate = longs(&[file.1, 0, 8192]);
    allocate.extend(words(&[0, 0]));
    let copy = longs(&[file.1, 0, file.0, file.1, 50, 10, 0]);
    for (opcode, body) in [(FALLOCATE, allocate), (COPY_FILE_RANGE, copy)] {
        for (user, left) in [(0, 0o6755), (1234, 0o755)] {
            fs::set_permissions(b.path("file"), fs::Permissions::from_mode(0o6755)).unwrap();
            b.user = (user, user);
            b.ask(opcode, file.0, &body).unwrap();
            assert_eq!(fs::metadata(b.path("file")).unwrap().mode() & 0o7777, left, "{opcode} {user}");
        }
    }
}

/// `struct fuse_setattr_in`.
fn attributes(valid: u32, (atime, mtime): (u64, u64)) -> Vec<u8> {
    let mut body = words(&[valid, 0]);
    body.extend(longs(&[0, 0, 0, atime, mtime, 0]));
    body.extend([0; 32]);
    body
}

#[test]
fn a_file_of_another_group_keeps_its_set_group_id_bit_from_no_stranger() {
    if !is_root() {
        return;
    }
    let mut b = require!(bench());
    let file = b.create(ROOT, "file", 0o644).unwrap();
    // As the guest does for who lacks the capability to keep the bits.
    let write_and_kill = [longs(&[file.1, 0]), words(&[1, 4, 0, 0, libc::O_RDWR as u32, 0]), b"x".to_vec()].concat();
    for (group, left) in [(77, 0o644), (0, 0o2644)] {
        fs::set_permissions(b.path("file"), fs::Permissions::from_mode(0o2644)).unwrap();
        // What root makes leaves the thread with root's identity.
        b.user = (0, 0);
        b.create(ROOT, "other", 0o644).unwrap();
        b.user = (1234, group);
        b.ask(WRITE, file.0, &write_and_kill).unwrap();
        assert_eq!(fs::metadata(b.path("file")).unwrap().mode() & 0o7777, left, "written by one of group {group}");
    }
}

#[test]
fn a_change_of_owner_to_nobody_clears_set_id_bits() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "file", 0o755).unwrap();
    fs::set_permissions(b.path("file"), fs::Permissions::from_mode(0o4755)).unwrap();
    let before = fs::metadata(b.path("file")).unwrap();
    b.ask(SETATTR, file.0, &attributes(0, (0, 0))).unwrap();
    let after = fs::metadata(b.path("file")).unwrap();
    assert_eq!(after.mode() & 0o7777, 0o755);
    assert_eq!((after.uid(), after.gid()), (before.uid(), before.gid()));
}

const FATTR_TIMES: u32 = 0x30;

#[test]
fn a_file_can_be_read_without_a_trace() {
    let mut b = require!(bench());
    let file = b.create(ROOT, "file", 0o644).unwrap();
    b.write(file, 0, b"12345").unwrap();
    let mut seconds_after = |flags| {
        b.ask(SETATTR, file.0, &attributes(FATTR_TIMES, (1000, 2000))).unwrap();
        let handle = b.open(file.0, flags).unwrap();
        assert_eq!(b.read((file.0, handle), 0, 9), Ok(b"12345".to_vec()));
        fs::metadata(b.path("file")).unwrap().atime()
    };
    if seconds_after(libc::O_RDONLY) == 1000 {
        eprintln!("skipped: nobody leaves a trace here");
        return;
    }
    assert_eq!(seconds_after(libc::O_RDONLY | libc::O_NOATIME), 1000);
}
