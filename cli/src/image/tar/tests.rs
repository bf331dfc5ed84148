use std::os::unix::fs::symlink;
use std::process::Command;

use super::*;

/// Reads everything; the content of every entry as it would be in the file.
fn read(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut reader = Reader::new(archive);
    let mut all = Vec::new();
    while let Some(entry) = reader.next()? {
        let mut stored = Vec::new();
        loop {
            let piece = reader.data()?.to_vec();
            if piece.is_empty() {
                break;
            }
            reader.consume(piece.len());
            stored.extend(piece);
        }
        let mut content = stored;
        if let Some(segments) = &entry.sparse {
            let mut file = vec![0; entry.size as usize];
            let mut rest = content.as_slice();
            for segment in segments {
                let (piece, more) = rest.split_at(segment.length as usize);
                file[segment.offset as usize..][..piece.len()].copy_from_slice(piece);
                rest = more;
            }
            content = file;
        }
        all.push((entry, content));
    }
    reader.finish()?;
    Ok(all)
}

fn one(name: &str, kind: tar::EntryType, data: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    header.set_uid(1);
    header.set_gid(2);
    header.set_mtime(3);
    header.set_path(name).unwrap();
    header.set_cksum();
    let mut block = header.as_bytes().to_vec();
    block.extend(data);
    block.resize(block.len().next_multiple_of(BLOCK), 0);
    block
}

#[test]
fn reads_plain_entries() {
    let mut archive = one("dir/", tar::EntryType::Directory, b"");
    archive.extend(one("dir/file", tar::EntryType::Regular, b"content"));
    archive.extend([0; 2 * BLOCK]);
    let all = read(&archive).unwrap();
    assert_eq!(all.len(), 2);
    let (file, content) = &all[1];
    assert_eq!((file.name.as_slice(), content.as_slice()), (&b"dir/file"[..], &b"content"[..]));
    assert_eq!((file.mode, file.uid, file.gid, file.mtime.seconds), (0o644, 1, 2, 3));
}

#[test]
fn an_archive_may_lack_its_end_but_not_part_of_an_entry() {
    let whole = one("file", tar::EntryType::Regular, &[7; 1000]);
    assert_eq!(read(&whole).unwrap().len(), 1);
    assert_eq!(read(&[]).unwrap().len(), 0);
    for length in [1, 511, 513, 1000, 1511] {
        assert!(matches!(read(&whole[..length]), Err(TarError::Truncated)), "{length}");
    }
}

#[test]
fn damage_is_noticed() {
    let whole = one("file", tar::EntryType::Regular, b"x");
    let mut changed = whole.clone();
    changed[0] ^= 1;
    assert!(matches!(read(&changed), Err(TarError::Header(0))));
    let mut second = [whole.clone(), whole].concat();
    second[1024] ^= 1;
    assert!(matches!(read(&second), Err(TarError::Header(1024))));
}

#[test]
fn metadata_has_limits() {
    let name = one("././@LongLink", tar::EntryType::GNULongName, &vec![b'a'; 9000]);
    assert!(matches!(read(&name), Err(TarError::TooLong { what: "file name", .. })));
    let mut huge = one("pax", tar::EntryType::XHeader, b"");
    let mut header = tar::Header::from_byte_slice(&huge[..512]).clone();
    header.set_size(1 << 40);
    header.set_cksum();
    huge = header.as_bytes().to_vec();
    assert!(matches!(read(&huge), Err(TarError::TooLong { what: "pax header", .. })));
    let path = vec![b'p'; 5000];
    let record = [b"5011 path=", path.as_slice(), b"\n"].concat();
    let mut long = one("pax", tar::EntryType::XHeader, &record);
    long.extend(one("short", tar::EntryType::Regular, b""));
    assert!(matches!(read(&long), Err(TarError::TooLong { what: "file name", .. })));
}

#[test]
fn a_bomb_behind_the_end_is_refused() {
    let mut archive = one("file", tar::EntryType::Regular, b"x");
    archive.resize(archive.len() + (17 << 20), 0);
    assert!(matches!(read(&archive), Err(TarError::Trailer)));
}

#[test]
fn only_what_images_use_is_taken() {
    let error = read(&one("x", tar::EntryType::new(b'M'), b"")).unwrap_err().to_string();
    assert!(error.contains("`x`") && error.contains("type `M`"), "{error}");
}

#[test]
fn the_pax_size_counts_where_both_are_given() {
    let mut archive = one("pax", tar::EntryType::XHeader, b"10 size=3\n");
    let mut header = tar::Header::from_byte_slice(&one("file", tar::EntryType::Regular, b"")[..512]).clone();
    header.set_size(0);
    header.set_cksum();
    archive.extend(header.as_bytes());
    archive.extend(b"abc");
    archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    archive.extend(one("next", tar::EntryType::Regular, b""));
    let all = read(&archive).unwrap();
    assert_eq!(all[0].1, b"abc");
    assert_eq!(all[1].0.name, b"next");
}

#[test]
fn reads_what_gnu_tar_writes() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{}/{}", "d".repeat(90), "f".repeat(200));
    std::fs::create_dir(dir.path().join("d".repeat(90))).unwrap();
    std::fs::write(dir.path().join(&long), "long").unwrap();
    symlink("t".repeat(300), dir.path().join("link")).unwrap();
    let sparse = std::fs::File::create(dir.path().join("sparse")).unwrap();
    let mut expected = vec![0; 3 << 20];
    for at in (0..30).map(|n| n * 100_000) {
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"island", at as u64).unwrap();
        expected[at..at + 6].copy_from_slice(b"island");
    }
    sparse.set_len(3 << 20).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let tar = Command::new("tar").args(["-c", "--sparse"]).args(format).arg("-C").arg(dir.path()).arg(".").output();
        let Ok(tar) = tar else {
            println!("skipped: there is no tar program here");
            return;
        };
        assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
        let all = read(&tar.stdout).unwrap();
        let find = |name: &str| all.iter().find(|(entry, _)| entry.name == format!("./{name}").as_bytes()).unwrap();
        assert_eq!(find(&long).1, b"long", "{format:?}");
        assert_eq!(find("link").0.link, "t".repeat(300).as_bytes(), "{format:?}");
        assert!(find("sparse").0.sparse.is_some(), "{format:?}");
        assert!(find("sparse").1 == expected, "{format:?}");
        let pax = format[0] == "--format=pax";
        assert_eq!(find("link").0.mtime.nanoseconds != 0, pax, "{format:?}");
    }
}

mod hostile {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(noise in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = read(&noise);
        }

        /// Headers with a right checksum get further than noise.
        #[test]
        fn no_header_makes_it_panic(
            flag in prop_oneof![Just(b'0'), Just(b'S'), Just(b'L'), Just(b'x'), Just(b'5'), any::<u8>()],
            fields in proptest::collection::vec((100_usize..512, any::<u8>()), 0..40),
            data in proptest::collection::vec(any::<u8>(), 0..1024),
        ) {
            let mut archive = one("name", tar::EntryType::new(flag), &data);
            for (at, byte) in fields {
                archive[at] = byte;
            }
            let mut header = tar::Header::from_byte_slice(&archive[..512]).clone();
            header.set_cksum();
            archive[..512].copy_from_slice(header.as_bytes());
            // Sparse files may claim any length, which this test would have to make.
            let mut reader = Reader::new(archive.as_slice());
            while let Ok(Some(_)) = reader.next() {}
        }
    }
}
