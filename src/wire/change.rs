//! What a transaction changes: pages as the runs of bytes that differ from their image before.
use bytes::{BufMut, BytesMut};

use crate::checksum::{PageHash, PageKey};
use crate::page::{PageNo, PageSize};
use crate::wire::WireError;
use crate::wire::fields::Fields;

/// Runs closer to each other than this are one run: a run of its own costs at least two bytes.
const GAP_MIN_BYTES: usize = 4;
/// Flag of a change: the hash of the image before follows.
const REPLACES: u8 = 1;
/// Flag of a change: its runs lie over the image before, not over zeros.
const OVER_BASE: u8 = 2;
/// What a page is compared with that has no image before.
static ZEROS: [u8; PageSize::MAX_BYTES as usize] = [0; PageSize::MAX_BYTES as usize];

/// A page that a transaction changed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct PageChange<'a> {
    pub(crate) number: PageNo,
    /// The hash of the page as it is after the transaction.
    pub(crate) hash: PageHash,
    /// The hash of the image that it replaces. A PAGE unit does not say it.
    pub(crate) replaced: Option<PageHash>,
    pub(crate) image: Image<'a>,
}

/// How a change says what the page is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Image<'a> {
    /// All of it. The unit's hash is the page's, so it was verified.
    Whole(&'a [u8]),
    /// The runs that are not zero.
    Sparse(Runs<'a>),
    /// The runs that are not as in the image that is replaced.
    Patch(Runs<'a>),
}

/// Runs of bytes: each is a varint of how far it begins after the end of the one before, a varint
/// of its length, and its bytes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Runs<'a>(&'a [u8]);

impl PageChange<'_> {
    /// The hash of the image that the page must have for the change to apply, if it needs one.
    pub(crate) fn base(&self) -> Option<PageHash> {
        self.replaced.filter(|_| matches!(self.image, Image::Patch(_)))
    }

    /// Makes the page. `page` is its image before, where [`PageChange::base`] asks for one.
    ///
    /// # Errors
    /// What was made is not the page that the change says; `page` has anything then.
    pub(crate) fn make(&self, page: &mut [u8], key: &PageKey) -> Result<(), WireError> {
        match self.image {
            Image::Whole(whole) if whole.len() == page.len() => {
                page.copy_from_slice(whole);
                return Ok(());
            }
            Image::Whole(_) => return Err(WireError::Fields("a page of another size than the database's")),
            Image::Sparse(runs) => {
                page.fill(0);
                runs.write(page)?;
            }
            Image::Patch(runs) => runs.write(page)?,
        }
        if key.hash(self.number, page) == self.hash { Ok(()) } else { Err(WireError::Patch) }
    }
}

impl Runs<'_> {
    /// How long they are, encoded.
    #[cfg(feature = "testing")]
    pub(crate) fn bytes(self) -> usize {
        self.0.len()
    }

    fn write(self, page: &mut [u8]) -> Result<(), WireError> {
        let (mut fields, mut at) = (Fields::of(self.0), 0_usize);
        while !fields.is_empty() {
            at = at.checked_add(fields.varint()? as usize).ok_or(BEYOND)?;
            let bytes = fields.varint()? as usize;
            let from = fields.bytes(bytes)?;
            let to = page.get_mut(at..).and_then(|page| page.get_mut(..bytes)).ok_or(BEYOND)?;
            to.copy_from_slice(from);
            at += bytes;
        }
        Ok(())
    }
}

const BEYOND: WireError = WireError::Fields("a patch that goes beyond its page");

impl<'a> Fields<'a> {
    /// A number of at most 32 bits, seven of them in each byte, the lowest first, in as few bytes
    /// as it needs.
    pub(super) fn varint(&mut self) -> Result<u32, WireError> {
        let mut value = 0_u32;
        for shift in (0..35).step_by(7) {
            let [byte] = *self.array()?;
            let bits = u32::from(byte & 0x7F);
            if shift == 28 && bits > 0x0F || shift > 0 && byte == 0 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(WireError::Fields("a number of more than 32 bits, or of more bytes than it needs"))
    }

    /// A page's number and all of it. `hash` was verified.
    pub(super) fn page(&mut self, hash: [u8; 16]) -> Result<PageChange<'a>, WireError> {
        let (number, page) = (self.page_no()?, self.rest());
        u32::try_from(page.len())
            .ok()
            .and_then(|bytes| PageSize::new(bytes).ok())
            .ok_or(WireError::Fields("a page of no valid size"))?;
        Ok(PageChange { number, hash: PageHash::from_bytes(hash), replaced: None, image: Image::Whole(page) })
    }

    /// Page number, flags, perhaps the hash of the image before, the hash of the page, the length
    /// of the runs, the runs.
    pub(super) fn change(&mut self) -> Result<PageChange<'a>, WireError> {
        let number = PageNo::new(self.varint()?).ok_or(WireError::Fields("page number 0"))?;
        let [flags] = *self.array()?;
        if flags & !(REPLACES | OVER_BASE) != 0 || flags == OVER_BASE {
            return Err(WireError::Fields("flags that no change has"));
        }
        let replaces = flags & REPLACES != 0;
        let replaced = replaces.then(|| self.array().map(|hash| PageHash::from_bytes(*hash))).transpose()?;
        let hash = PageHash::from_bytes(*self.array()?);
        let bytes = self.varint()? as usize;
        let runs = Runs(self.bytes(bytes)?);
        let image = if flags & OVER_BASE != 0 { Image::Patch(runs) } else { Image::Sparse(runs) };
        Ok(PageChange { number, hash, replaced, image })
    }
}

/// Writes a change, its fields as [`Fields::change`] reads them. A whole page becomes one run.
pub(super) fn put_change(change: &PageChange<'_>, out: &mut BytesMut) {
    let flags = match (change.replaced, change.image) {
        (None, _) => 0,
        (Some(_), Image::Patch(_)) => REPLACES | OVER_BASE,
        (Some(_), _) => REPLACES,
    };
    put_varint(change.number.get(), out);
    out.put_u8(flags);
    if let Some(replaced) = change.replaced {
        out.put_slice(&replaced.to_bytes());
    }
    out.put_slice(&change.hash.to_bytes());
    match change.image {
        Image::Sparse(Runs(runs)) | Image::Patch(Runs(runs)) => {
            put_varint(runs.len() as u32, out);
            out.put_slice(runs);
        }
        Image::Whole(page) => {
            put_varint((1 + varint_bytes(page.len() as u32) + page.len()) as u32, out);
            put_varint(0, out);
            put_varint(page.len() as u32, out);
            out.put_slice(page);
        }
    }
}

pub(super) fn put_varint(mut value: u32, out: &mut BytesMut) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn varint_bytes(value: u32) -> usize {
    (32 - (value | 1).leading_zeros()).div_ceil(7) as usize
}

/// Says what a page became in as few bytes as are easily found. `runs` is where they are put.
pub(crate) fn difference<'r>(old: Option<&[u8]>, page: &'r [u8], runs: &'r mut BytesMut) -> Image<'r> {
    runs.clear();
    let before = old.unwrap_or(&ZEROS[..page.len()]);
    if has_little_in_common(before, page) {
        return Image::Whole(page);
    }
    let mut last = 0;
    while let Some(first) = first_difference(before, page, last) {
        let end = run_end(before, page, first);
        put_varint((first - last) as u32, runs);
        put_varint((end - first) as u32, runs);
        runs.put_slice(&page[first..end]);
        if runs.len() >= page.len() {
            return Image::Whole(page);
        }
        last = end;
    }
    match old {
        Some(_) => Image::Patch(Runs(runs)),
        None => Image::Sparse(Runs(runs)),
    }
}

/// Whether so few words are the same that a page of random bytes is not looked at byte by byte.
fn has_little_in_common(old: &[u8], new: &[u8]) -> bool {
    let (old, new) = (old.as_chunks::<8>().0, new.as_chunks::<8>().0);
    let (enough, mut same) = (new.len() / 32, 0);
    // Of most pages that were changed, the first words tell.
    for (old, new) in old.chunks(64).zip(new.chunks(64)) {
        same += old.iter().zip(new).filter(|(old, new)| old == new).count();
        if same >= enough {
            return false;
        }
    }
    true
}

/// The first byte from `at` on that differs.
fn first_difference(old: &[u8], new: &[u8], mut at: usize) -> Option<usize> {
    const STEP: usize = 32;
    while let (Some(o), Some(n)) = (old.get(at..at + STEP), new.get(at..at + STEP)) {
        if o != n {
            break;
        }
        at += STEP;
    }
    let (old, new) = (old.get(at..)?, new.get(at..)?);
    old.iter().zip(new).position(|(o, n)| o != n).map(|more| at + more)
}

/// Where the run ends that begins at `first`: bytes that differ follow no closer than the least
/// gap.
fn run_end(old: &[u8], new: &[u8], first: usize) -> usize {
    let (mut end, mut at) = (first + 1, first + 1);
    while at < new.len() && at - end < GAP_MIN_BYTES {
        at += 1;
        if old[at - 1] != new[at - 1] {
            end = at;
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: PageKey = PageKey::KEPT;

    fn sent(number: u32, old: Option<&[u8]>, page: &[u8]) -> BytesMut {
        let number = PageNo::new(number).unwrap();
        let (mut runs, mut out) = (BytesMut::new(), BytesMut::new());
        let replaced = old.map(|old| KEY.hash(number, old));
        let image = difference(old, page, &mut runs);
        put_change(&PageChange { number, hash: KEY.hash(number, page), replaced, image }, &mut out);
        out
    }

    fn received(bytes: &[u8]) -> PageChange<'_> {
        let mut fields = Fields::of(bytes);
        let change = fields.change().unwrap();
        assert!(fields.is_empty());
        change
    }

    proptest! {
        #[test]
        fn a_page_is_made_of_its_image_before_and_the_change(
            old in proptest::option::of(proptest::collection::vec(0_u8..4, 1024)),
            places in proptest::collection::vec((0_usize..1024, 1_usize..200, any::<u8>()), 0..6),
        ) {
            let mut page = old.clone().unwrap_or_else(|| vec![0; 1024]);
            for (at, bytes, value) in places {
                let end = (at + bytes).min(1024);
                page[at..end].fill(value);
            }
            let bytes = sent(9, old.as_deref(), &page);
            prop_assert!(bytes.len() <= 1024 + 2 + 32 + 8, "{} bytes", bytes.len());
            let change = received(&bytes);
            let mut made = if change.base().is_some() { old.unwrap() } else { vec![0xAA; 1024] };
            change.make(&mut made, &KEY).unwrap();
            prop_assert_eq!(made, page);
        }
    }

    #[test]
    fn a_change_costs_what_differs() {
        let old: Vec<u8> = (0..4096_u32).map(|n| (n * 7 / 3) as u8).collect();
        let mut new = old.clone();
        new[4000] ^= 1;
        new[100] ^= 1;
        new[103] ^= 1;
        // Number, flags, two hashes, length; a run of four bytes and one of one.
        assert_eq!(sent(3, Some(&old), &new).len(), 1 + 1 + 32 + 1 + (1 + 1 + 4) + (2 + 1 + 1));
        assert_eq!(sent(3, Some(&old), &old).len(), 1 + 1 + 32 + 1);
        let noise: Vec<u8> = (0..4096_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8 | 1).collect();
        assert_eq!(sent(3, None, &noise).len(), 1 + 1 + 16 + 2 + (1 + 2 + 4096), "no more than the page");
    }

    #[test]
    fn a_change_over_another_image_is_refused() {
        let (old, new) = (vec![1; 512], [vec![2; 5], vec![1; 507]].concat());
        let bytes = sent(3, Some(&old), &new);
        let mut page = vec![1; 512];
        page[400] = 7;
        assert_eq!(received(&bytes).make(&mut page, &KEY), Err(WireError::Patch));
        // Of another page, although the bytes fit.
        let change = PageChange { number: PageNo::new(4).unwrap(), ..received(&bytes) };
        assert_eq!(change.make(&mut old.clone(), &KEY), Err(WireError::Patch));
    }

    #[test]
    fn runs_beyond_a_page_or_cut_are_refused() {
        let mut page = vec![0; 512];
        for (runs, fits) in [
            (&[0xFF, 3, 1, 9][..], true),
            (&[0x80, 4, 1, 9], false),
            (&[0xFF, 3, 2, 9, 9], false),
            (&[0, 3, 9, 9], false),
            (&[0, 1], false),
            (&[0x80], false),
            (&[0xFF, 0xFF, 0xFF, 0xFF, 0x1F, 1, 9], false),
            (&[0xFF, 0xFF, 0xFF, 0xFF, 0x0F, 0], false),
            (&[0x81, 0, 1, 9], false),
            (&[0x80, 0x80, 0x80, 0x80, 0x80, 0, 9], false),
        ] {
            assert_eq!(Runs(runs).write(&mut page).is_ok(), fits, "{runs:?}");
        }
    }
}
