//! Bytes as hexadecimal digits.

use std::fmt;

/// Writes bytes as lower-case digits.
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// Bytes as lower-case digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    Hex(bytes).to_string()
}

/// Reads exactly `N` bytes of digits of either case, and nothing else.
pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair_value(pair)?;
    }
    Some(bytes)
}

/// Reads any number of bytes. Pairs that are no digits are left out.
pub(crate) fn unhex_lossy(text: &str) -> Vec<u8> {
    text.as_bytes().chunks_exact(2).filter_map(pair_value).collect()
}

/// Reads sixteen digits, the highest first.
pub(crate) fn unhex_u64(text: &str) -> Option<u64> {
    unhex(text).map(u64::from_be_bytes)
}

fn pair_value(pair: &[u8]) -> Option<u8> {
    let digit = |b: &u8| char::from(*b).to_digit(16).map(|d| d as u8);
    match pair {
        [high, low] => Some(digit(high)? << 4 | digit(low)?),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_from_their_digits_and_from_nothing_else() {
        assert_eq!(hex(&[0, 0xab, 0x7f]), "00ab7f");
        assert_eq!(unhex("00ab7f"), Some([0, 0xab, 0x7f]));
        assert_eq!(unhex("00AB7F"), Some([0, 0xab, 0x7f]));
        for wrong in ["00ab7", "00ab7f0", "00ab7f00", "+0ab7f", "00ab7g", "00abé", ""] {
            assert_eq!(unhex::<3>(wrong), None, "{wrong:?}");
        }
        assert_eq!(unhex_u64("00000000000000fe"), Some(0xfe));
        for wrong in ["fe", "+0000000000000fe", "00000000000000fe0"] {
            assert_eq!(unhex_u64(wrong), None, "{wrong:?}");
        }
        assert_eq!(unhex_lossy("00ab7f"), [0, 0xab, 0x7f]);
        assert_eq!(unhex_lossy("00xx7f7"), [0, 0x7f]);
    }
}
