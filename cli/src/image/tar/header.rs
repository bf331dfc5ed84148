//! The 512-byte tar header: ustar, its GNU variant, and the ancient one without a magic.

use super::{TarError, Time};

/// The unit of tar archives.
pub(super) const BLOCK: usize = 512;

const NAME: std::ops::Range<usize> = 0..100;
const MODE: std::ops::Range<usize> = 100..108;
const UID: std::ops::Range<usize> = 108..116;
const GID: std::ops::Range<usize> = 116..124;
const SIZE: std::ops::Range<usize> = 124..136;
const MTIME: std::ops::Range<usize> = 136..148;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const TYPE_FLAG: usize = 156;
const LINK: std::ops::Range<usize> = 157..257;
const MAGIC: std::ops::Range<usize> = 257..263;
const DEVICE_MAJOR: std::ops::Range<usize> = 329..337;
const DEVICE_MINOR: std::ops::Range<usize> = 337..345;
const PREFIX: std::ops::Range<usize> = 345..500;
/// `star` keeps times in the second half of the prefix and says so at the block's end.
const STAR_PREFIX: std::ops::Range<usize> = 345..476;
const STAR_MAGIC: std::ops::Range<usize> = 508..512;

/// A header whose checksum is right.
#[derive(Clone, Copy)]
pub(super) struct Header<'a>(&'a [u8; BLOCK]);

impl<'a> Header<'a> {
    /// None if the checksum is wrong.
    pub(super) fn new(block: &'a [u8; BLOCK]) -> Option<Self> {
        let stated = number(&block[CHECKSUM])?;
        let byte = |(at, byte): (usize, &u8)| if CHECKSUM.contains(&at) { b' ' } else { *byte };
        // Some old writers summed signed bytes.
        let sum: i64 = block.iter().enumerate().map(byte).map(i64::from).sum();
        let signed: i64 = block.iter().enumerate().map(byte).map(|b| i64::from(b.cast_signed())).sum();
        (stated == sum || stated == signed).then_some(Self(block))
    }

    pub(super) fn block(&self) -> &'a [u8; BLOCK] {
        self.0
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.0[TYPE_FLAG]
    }

    /// The name, the prefix included where the format has one.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = text(&self.0[NAME]);
        if &self.0[MAGIC] != b"ustar\0" {
            return name.to_vec();
        }
        let star = &self.0[STAR_MAGIC] == b"tar\0";
        match text(&self.0[if star { STAR_PREFIX } else { PREFIX }]) {
            b"" => name.to_vec(),
            prefix => [prefix, b"/", name].concat(),
        }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.0[LINK]).to_vec()
    }

    pub(super) fn size(&self) -> Result<u64, TarError> {
        self.field(SIZE, "size")
    }

    pub(super) fn mode(&self) -> Result<u32, TarError> {
        Ok(self.field::<u64>(MODE, "mode")? as u32 & 0o7777)
    }

    pub(super) fn uid(&self) -> Result<u32, TarError> {
        self.field(UID, "owner")
    }

    pub(super) fn gid(&self) -> Result<u32, TarError> {
        self.field(GID, "group")
    }

    pub(super) fn mtime(&self) -> Result<Time, TarError> {
        Ok(Time { seconds: self.field(MTIME, "modification time")?, nanoseconds: 0 })
    }

    pub(super) fn device(&self) -> Result<(u32, u32), TarError> {
        Ok((self.field(DEVICE_MAJOR, "device number")?, self.field(DEVICE_MINOR, "device number")?))
    }

    fn field<T: TryFrom<i64>>(&self, range: std::ops::Range<usize>, what: &'static str) -> Result<T, TarError> {
        number(&self.0[range]).and_then(|n| T::try_from(n).ok()).ok_or(TarError::Number(what))
    }
}

/// The bytes before the first NUL.
fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|byte| *byte == 0).unwrap_or(field.len())]
}

/// A number: octal digits between blanks, or big-endian two's complement if the first bit is set.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let start: i128 = if negative { i128::from(first | 0x80) - 0x100 } else { i128::from(first & 0x7f) };
        let value =
            field[1..].iter().try_fold(start, |value, byte| value.checked_mul(256)?.checked_add((*byte).into()))?;
        return i64::try_from(value).ok();
    }
    let digits = text(field).trim_ascii();
    digits.iter().try_fold(0_i64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"0009\0\0\0\0"), None);
        assert_eq!(number(b"\x80\0\0\0\0\0\x01\0"), Some(256));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), None);
        assert_eq!(number(b"\xc0\0\0\0\0\0\0\0\0\0\0\0"), None);
    }
}
