//! Pax extended headers: `length key=value\n` records that override fields of the header that follows.

use super::{TarError, Time};

/// What a pax header sets; keys that mean nothing to an image are passed over.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: PaxSparse,
}

/// The `GNU.sparse.*` keys, of all three versions of that format.
#[derive(Debug, Default, PartialEq)]
pub(super) struct PaxSparse {
    pub(super) name: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    /// Version 0.0 repeats offset and length, 0.1 lists them: offsets and lengths in turn.
    pub(super) numbers: Vec<u64>,
}

impl Pax {
    pub(super) fn parse(mut records: &[u8]) -> Result<Self, TarError> {
        let mut pax = Self::default();
        while !records.is_empty() {
            let blank = records.iter().take(20).position(|byte| *byte == b' ').ok_or(TarError::Pax)?;
            let length: usize = decimal(&records[..blank])?;
            // The length counts itself, the blank and the line feed.
            if length < blank + 2 || length > records.len() || records[length - 1] != b'\n' {
                return Err(TarError::Pax);
            }
            let record = &records[blank + 1..length - 1];
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(TarError::Pax)?;
            pax.set(&record[..equals], &record[equals + 1..])?;
            records = &records[length..];
        }
        if !pax.sparse.numbers.len().is_multiple_of(2) {
            return Err(TarError::Pax);
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        let sparse = &mut self.sparse;
        match key {
            b"path" => self.path = name(value)?,
            b"linkpath" => self.link = name(value)?,
            // An empty value takes an earlier one back.
            b"size" | b"uid" | b"gid" | b"mtime" if value.is_empty() => {}
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(decimal(value)?),
            b"gid" => self.gid = Some(decimal(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.name" => sparse.name = name(value)?,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => sparse.size = Some(decimal(value)?),
            b"GNU.sparse.major" => sparse.major = Some(decimal(value)?),
            b"GNU.sparse.minor" => sparse.minor = Some(decimal(value)?),
            b"GNU.sparse.offset" if sparse.numbers.len().is_multiple_of(2) => sparse.numbers.push(decimal(value)?),
            b"GNU.sparse.numbytes" if !sparse.numbers.len().is_multiple_of(2) => sparse.numbers.push(decimal(value)?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => return Err(TarError::Pax),
            b"GNU.sparse.map" if value.is_empty() => {}
            b"GNU.sparse.map" => {
                sparse.numbers = value.split(|byte| *byte == b',').map(decimal).collect::<Result<_, _>>()?;
            }
            _ => {
                if let Some(attribute) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.retain(|(known, _)| known != attribute);
                    self.xattrs.push((attribute.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

fn name(value: &[u8]) -> Result<Option<Vec<u8>>, TarError> {
    match value {
        b"" => Ok(None),
        _ if value.contains(&0) => Err(TarError::Pax),
        _ => Ok(Some(value.to_vec())),
    }
}

pub(super) fn decimal<T: std::str::FromStr>(text: &[u8]) -> Result<T, TarError> {
    // `parse` would take a sign.
    if !text.iter().all(u8::is_ascii_digit) {
        return Err(TarError::Pax);
    }
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or(TarError::Pax)
}

/// Seconds with an optional sign and fraction; digits beyond nanoseconds are dropped.
fn time(text: &[u8]) -> Result<Time, TarError> {
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    let seconds: i64 = decimal(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(TarError::Pax);
    }
    let digit = |at| fraction.get(at).map_or(0, |byte| u32::from(byte - b'0'));
    let nanoseconds = (0..9).fold(0, |value, at| value * 10 + digit(at));
    Ok(match (negative, nanoseconds) {
        (false, _) => Time { seconds, nanoseconds },
        (true, 0) => Time { seconds: -seconds, nanoseconds },
        // The nanoseconds of a time before 1970 still count forwards.
        (true, _) => Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_records_whose_values_hold_anything() {
        let pax = Pax::parse(b"10 path=a\n27 SCHILY.xattr.user.k=\n=\0\n20 mtime=1.00000000\n").unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a"[..]));
        assert_eq!(pax.xattrs, [(b"user.k".to_vec(), b"\n=\0".to_vec())]);
        assert_eq!(pax.mtime, Some(Time { seconds: 1, nanoseconds: 0 }));
    }

    #[test]
    fn refuses_broken_records() {
        for bad in ["x", "10 path=ab\n", "8 path=a\n", "0 a=b\n", "8 path=\0\n", "99999999999999999999 a=b\n", "5 a\n"]
        {
            assert!(Pax::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(time(b"1.5").unwrap(), Time { seconds: 1, nanoseconds: 500_000_000 });
        assert_eq!(time(b"-1.25").unwrap(), Time { seconds: -2, nanoseconds: 750_000_000 });
        assert_eq!(time(b"7.1234567899").unwrap(), Time { seconds: 7, nanoseconds: 123_456_789 });
        assert!(time(b"--1").is_err() && time(b"1.x").is_err() && time(b"").is_err());
    }
}
