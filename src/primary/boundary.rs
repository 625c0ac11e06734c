//! Where units end in the log's bytes: control units may only stand between them.

use crate::wire::HEADER_BYTES;

/// Follows the bytes that are sent and knows whether a unit is unfinished.
#[derive(Debug, Default)]
pub(crate) struct Boundary {
    /// The header that is not complete yet: its first bytes; only the payload's length is needed.
    header: [u8; 4],
    have: usize,
    /// Bytes of the unit that are still missing, once its header is complete.
    missing: usize,
}

impl Boundary {
    /// Whether all that was sent are whole units.
    pub(crate) fn is_clean(&self) -> bool {
        self.have == 0 && self.missing == 0
    }

    /// How many of the bytes to send now: up to the end of the last whole unit. All of them when
    /// they end no unit at all. They count as sent.
    pub(crate) fn cut(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        let mut last = 0;
        while at < bytes.len() {
            if self.missing == 0 {
                let take = (HEADER_BYTES - self.have).min(bytes.len() - at);
                for (to, from) in self.header[self.have.min(4)..].iter_mut().zip(&bytes[at..at + take]) {
                    *to = *from;
                }
                self.have += take;
                at += take;
                if self.have < HEADER_BYTES {
                    break;
                }
                self.have = 0;
                self.missing = u32::from_le_bytes(self.header) as usize;
            } else {
                let take = self.missing.min(bytes.len() - at);
                self.missing -= take;
                at += take;
            }
            if self.missing == 0 {
                last = at;
            }
        }
        if last == 0 {
            return bytes.len();
        }
        *self = Boundary::default();
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(lengths: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &length in lengths {
            let mut header = [7; HEADER_BYTES];
            header[..4].copy_from_slice(&length.to_le_bytes());
            bytes.extend(header);
            bytes.extend(std::iter::repeat_n(9, length as usize));
        }
        bytes
    }

    #[test]
    fn whole_units_are_cut_off_wherever_the_bytes_end() {
        let lengths = [0, 1, 40, 1000, 3];
        let all = units(&lengths);
        let mut ends = vec![0];
        for length in lengths {
            ends.push(ends[ends.len() - 1] + HEADER_BYTES + length as usize);
        }
        for read in 1..all.len() + 1 {
            let (mut sent, mut boundary) = (0, Boundary::default());
            while sent < all.len() {
                let to = (sent + read).min(all.len());
                let n = boundary.cut(&all[sent..to]);
                assert!(n > 0 && n <= to - sent);
                sent += n;
                assert_eq!(boundary.is_clean(), ends.contains(&sent), "reads of {read}, at {sent}");
            }
            assert!(boundary.is_clean());
        }
    }
}
