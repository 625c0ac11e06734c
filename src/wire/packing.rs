//! How a primary's stream travels after its WELCOME, if that says so: in blocks, some of which are
//! compressed.
//!
//! A block is a varint and bytes. The varint is their count, 1 to [`BLOCK_MAX_BYTES`], times two,
//! and one more where they are compressed. The compressed blocks of a stream are one zstd frame,
//! flushed at the end of each: what came before is the dictionary of what comes.

use std::collections::VecDeque;
use std::fmt;

use bytes::{Buf, Bytes, BytesMut};
use zstd::stream::raw::{CParameter, DParameter, Decoder, Encoder, InBuffer, Operation, OutBuffer};

use crate::wire::WireError;
use crate::wire::change::put_varint;

/// The most bytes of a block.
const BLOCK_MAX_BYTES: usize = 128 * 1024;
/// The most bytes that go into a block. A compressed one may have more.
const PART_BYTES: usize = 64 * 1024;
/// The most bytes of a block's varint.
const HEAD_MAX_BYTES: usize = 3;
/// What a part that can't be compressed grows by: zstd's header, and three bytes for each of its
/// own blocks. It has one of 128 KiB at most, and one for the flush.
const GROWTH_MAX_BYTES: usize = 64;
/// How much of what came before both sides remember, as a power of two. The cells that a B-tree
/// moves to another page were sent when they were inserted: the longer ago that may be, the fewer
/// of them are sent again.
const WINDOW_LOG: u32 = 20;
/// Places of the table in which the sender looks for them, as a power of two; 4 bytes each.
const HASH_LOG: u32 = 17;
/// The shortest bytes that are worth a reference. A cell of an index is short.
const MATCH_MIN_BYTES: u32 = 4;
/// The fastest of zstd's ordinary levels.
const LEVEL: i32 = 1;
/// Bytes that are unpacked at a time. What a block may become is not bounded by its length.
const STEP_BYTES: usize = 64 * 1024;

/// The side that sends.
pub(crate) struct Packer(Encoder<'static>);

impl Packer {
    pub(crate) fn new() -> Result<Packer, WireError> {
        let mut encoder = Encoder::new(LEVEL).map_err(|_| WireError::Pack)?;
        let set = [
            CParameter::WindowLog(WINDOW_LOG),
            CParameter::HashLog(HASH_LOG),
            CParameter::MinMatch(MATCH_MIN_BYTES),
        ];
        for parameter in set {
            encoder.set_parameter(parameter).map_err(|_| WireError::Pack)?;
        }
        Ok(Packer(encoder))
    }

    /// The most that so many bytes become.
    pub(crate) fn most(bytes: usize) -> usize {
        bytes + bytes.div_ceil(PART_BYTES) * (HEAD_MAX_BYTES + GROWTH_MAX_BYTES)
    }

    /// Makes blocks of bytes.
    ///
    /// # Errors
    /// zstd has no memory. The stream can't go on.
    pub(crate) fn pack(&mut self, bytes: &[u8], compress: bool) -> Result<Bytes, WireError> {
        let mut out = BytesMut::with_capacity(Packer::most(bytes.len()));
        for part in bytes.chunks(PART_BYTES) {
            if compress {
                let packed = self.compress(part)?;
                put_varint((packed.len() as u32) << 1 | 1, &mut out);
                out.extend_from_slice(&packed);
            } else {
                put_varint((part.len() as u32) << 1, &mut out);
                out.extend_from_slice(part);
            }
        }
        Ok(out.freeze())
    }

    fn compress(&mut self, part: &[u8]) -> Result<Vec<u8>, WireError> {
        let mut packed = Vec::with_capacity(part.len() + GROWTH_MAX_BYTES);
        let mut out = OutBuffer::around(&mut packed);
        let mut input = InBuffer::around(part);
        while input.pos() < part.len() && out.pos() < out.capacity() {
            self.0.run(&mut input, &mut out).map_err(|_| WireError::Pack)?;
        }
        match self.0.flush(&mut out).map_err(|_| WireError::Pack)? {
            0 if input.pos() == part.len() => Ok(packed),
            _ => Err(WireError::Pack),
        }
    }
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

/// The side that receives. It holds what arrived, and makes no more of it than is asked for.
pub(crate) struct Unpacker {
    decoder: Decoder<'static>,
    arrived: VecDeque<Bytes>,
    /// The bytes that have come of a block's varint.
    head: ([u8; HEAD_MAX_BYTES], usize),
    block: Option<Block>,
}

/// A block of which something is to come.
#[derive(Clone, Copy)]
struct Block {
    left: usize,
    compressed: bool,
    /// zstd has more of what it took already.
    more: bool,
}

impl Unpacker {
    pub(crate) fn new() -> Result<Unpacker, WireError> {
        let mut decoder = Decoder::new().map_err(|_| WireError::Pack)?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG)).map_err(|_| WireError::Pack)?;
        Ok(Unpacker { decoder, arrived: VecDeque::new(), head: ([0; HEAD_MAX_BYTES], 0), block: None })
    }

    /// Takes in what arrived.
    pub(crate) fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.arrived.push_back(bytes);
        }
    }

    /// Some bytes of what arrived; none when more has to arrive.
    ///
    /// # Errors
    /// These are no blocks. So it is from then on.
    pub(crate) fn next(&mut self) -> Result<Option<Bytes>, WireError> {
        loop {
            let Some(Block { left, compressed, more }) = self.block else {
                if !self.begin_block()? {
                    return Ok(None);
                }
                continue;
            };
            if !compressed {
                let Some(front) = self.arrived.front_mut() else { return Ok(None) };
                let bytes = front.split_to(left.min(front.len()));
                self.took(left, bytes.len());
                return Ok(Some(bytes));
            }
            let front = self.arrived.front().map_or(&[][..], |front| &front[..]);
            let taken = &front[..left.min(front.len())];
            if taken.is_empty() && !more {
                // zstd is not asked for nothing: some times of that are an error.
                if left > 0 {
                    return Ok(None);
                }
                self.block = None;
                continue;
            }
            let mut unpacked = Vec::with_capacity(STEP_BYTES);
            let (mut input, mut out) = (InBuffer::around(taken), OutBuffer::around(&mut unpacked));
            let run = self.decoder.run(&mut input, &mut out);
            run.map_err(|_| WireError::Fields("a compressed block that zstd can't read"))?;
            let (took, made) = (input.pos(), out.pos());
            if took == 0 && made == 0 && !taken.is_empty() {
                return Err(WireError::Fields("a compressed block of which zstd takes nothing"));
            }
            if let Some(front) = self.arrived.front_mut() {
                front.advance(took);
            }
            self.block = Some(Block { left: left - took, compressed, more: made == STEP_BYTES });
            self.drop_empty();
            if made > 0 {
                return Ok(Some(unpacked.into()));
            }
        }
    }

    fn took(&mut self, left: usize, bytes: usize) {
        let left = left - bytes;
        self.block = (left > 0).then_some(Block { left, compressed: false, more: false });
        self.drop_empty();
    }

    fn drop_empty(&mut self) {
        if self.arrived.front().is_some_and(Bytes::is_empty) {
            self.arrived.pop_front();
        }
    }

    /// Reads a block's varint. False when not all of it has arrived.
    fn begin_block(&mut self) -> Result<bool, WireError> {
        while let Some(front) = self.arrived.front_mut() {
            let byte = front.get_u8();
            self.drop_empty();
            let (head, have) = &mut self.head;
            let Some(place) = head.get_mut(*have) else { break };
            *place = byte;
            *have += 1;
            if byte & 0x80 == 0 {
                let value =
                    head[..*have].iter().rev().fold(0, |value, byte| value << 7 | usize::from(byte & 0x7F));
                *have = 0;
                let block = Block { left: value >> 1, compressed: value & 1 != 0, more: false };
                if block.left == 0 || block.left > BLOCK_MAX_BYTES {
                    return Err(WireError::Fields("a block of no bytes, or of too many"));
                }
                self.block = Some(block);
                return Ok(true);
            }
        }
        match self.head.1 {
            HEAD_MAX_BYTES => Err(WireError::Fields("a block of no bytes, or of too many")),
            _ => Ok(false),
        }
    }
}

impl fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpacker").field("arrived", &self.arrived).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unpacked(unpacker: &mut Unpacker) -> Result<Vec<u8>, WireError> {
        let mut all = Vec::new();
        while let Some(bytes) = unpacker.next()? {
            assert!((1..=STEP_BYTES.max(BLOCK_MAX_BYTES)).contains(&bytes.len()));
            all.extend_from_slice(&bytes);
        }
        Ok(all)
    }

    fn noise(bytes: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .take(bytes)
        .collect()
    }

    proptest! {
        #[test]
        fn what_was_packed_comes_out_however_it_is_cut(
            parts in prop::collection::vec((0_usize..200_000, any::<bool>(), any::<bool>()), 1..6),
            cuts in prop::collection::vec(1_usize..70_000, 1..6),
        ) {
            let (mut packer, mut unpacker) = (Packer::new().unwrap(), Unpacker::new().unwrap());
            let (mut sent, mut came, mut cuts) = (Vec::new(), Vec::new(), cuts.into_iter().cycle());
            for (bytes, random, compress) in parts {
                let part = if random { noise(bytes, bytes as u64) } else { vec![bytes as u8; bytes] };
                let mut packed = packer.pack(&part, compress).unwrap();
                prop_assert!(packed.len() <= Packer::most(part.len()));
                while !packed.is_empty() {
                    let cut = cuts.next().unwrap().min(packed.len());
                    unpacker.push(packed.split_to(cut));
                    came.extend(unpacked(&mut unpacker).unwrap());
                }
                // Each is there at its end: nothing waits for what comes later.
                sent.extend(part);
                prop_assert_eq!(&came, &sent);
            }
        }

        #[test]
        fn bytes_of_a_stranger_are_refused_or_wait(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            let mut unpacker = Unpacker::new().unwrap();
            unpacker.push(bytes.into());
            let _ = unpacked(&mut unpacker);
        }
    }

    #[test]
    fn a_block_may_arrive_byte_by_byte_and_be_asked_for_often() {
        let (mut packer, mut unpacker) = (Packer::new().unwrap(), Unpacker::new().unwrap());
        let record = noise(300, 5);
        let mut came = Vec::new();
        for byte in packer.pack(&record, true).unwrap() {
            unpacker.push(vec![byte].into());
            (0..40).for_each(|_| came.extend(unpacked(&mut unpacker).unwrap()));
        }
        assert_eq!(came, record);
    }

    #[test]
    fn what_came_before_is_the_dictionary() {
        let (mut packer, record) = (Packer::new().unwrap(), noise(1000, 7));
        assert!(packer.pack(&record, true).unwrap().len() > 1000);
        assert!(packer.pack(&record, true).unwrap().len() < 40);
    }

    #[test]
    fn a_block_that_becomes_much_is_unpacked_in_steps() {
        let mut unpacker = Unpacker::new().unwrap();
        let mut encoder = Encoder::new(19).unwrap();
        encoder.set_parameter(CParameter::WindowLog(WINDOW_LOG)).unwrap();
        let mut packed = Vec::with_capacity(BLOCK_MAX_BYTES);
        let mut out = OutBuffer::around(&mut packed);
        let zeros = vec![0; 64 << 20];
        let mut input = InBuffer::around(&zeros[..]);
        while input.pos() < zeros.len() {
            encoder.run(&mut input, &mut out).unwrap();
        }
        assert_eq!(encoder.flush(&mut out).unwrap(), 0);
        let mut block = BytesMut::new();
        put_varint((packed.len() as u32) << 1 | 1, &mut block);
        block.extend_from_slice(&packed);
        unpacker.push(block.freeze());
        assert_eq!(unpacked(&mut unpacker).unwrap().len(), zeros.len());
    }

    #[test]
    fn blocks_outside_their_bounds_are_refused() {
        let refused = |bytes: &[u8]| {
            let mut unpacker = Unpacker::new().unwrap();
            unpacker.push(Bytes::copy_from_slice(bytes));
            unpacker.next().is_err()
        };
        assert!(refused(&[0]) && refused(&[1]), "no bytes");
        let head = |bytes: usize| {
            let mut head = BytesMut::new();
            put_varint((bytes as u32) << 1, &mut head);
            head.extend_from_slice(&[7]);
            head
        };
        assert!(!refused(&head(BLOCK_MAX_BYTES)));
        assert!(refused(&head(BLOCK_MAX_BYTES + 1)));
        assert!(refused(&[0xFF; 4]), "a varint that does not end");
        // A frame that wants a window of twice ours, and one of a gigabyte.
        let mut encoder = Encoder::new(LEVEL).unwrap();
        encoder.set_parameter(CParameter::WindowLog(WINDOW_LOG + 1)).unwrap();
        let mut larger = Packer(encoder).pack(&noise(4 << 10, 3), true).unwrap().to_vec();
        assert!(refused(&larger));
        larger = Packer::new().unwrap().pack(&noise(4 << 10, 3), true).unwrap().to_vec();
        assert!(!refused(&larger));
        assert!(refused(&[2 * 10 + 1, 0x28, 0xB5, 0x2F, 0xFD, 0, 20 << 3, 1, 0, 0, 0]));
    }
}
