//! Which table a leaf page belongs to, and which rows are on it: as much of SQLite's b-tree format
//! as that takes.
//!
//! <https://www.sqlite.org/fileformat2.html#b_tree_pages>. Rowid tables only. The code checks every
//! offset: the pages may be damaged.

use std::collections::BTreeMap;

use crate::page::{PageNo, PageSet};

const INTERIOR: u8 = 0x05;
const LEAF: u8 = 0x0d;
/// SQLite's own limit on the depth of a tree.
const DEPTH_MAX: usize = 20;
/// Before the first page's header stands the database's.
const DATABASE_HEADER_BYTES: usize = 100;

/// A page that can't be what it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Malformed;

/// Reads pages of one state.
pub(super) type ReadPage<'a> = dyn FnMut(PageNo, &mut [u8]) -> crate::error::Result<()> + 'a;

/// A state of a database: its pages, of a size, so many.
pub(super) struct StatePages<'a> {
    pub(super) read: Box<ReadPage<'a>>,
    pub(super) page_bytes: usize,
    pub(super) count: u32,
}

/// The leaf pages of a table that are in a set. Reads the table's interior pages alone.
pub(super) fn leaves(
    pages: &mut StatePages<'_>,
    root: PageNo,
    wanted: &PageSet,
) -> crate::error::Result<Vec<PageNo>> {
    let (read, count) = (&mut pages.read, pages.count);
    let mut found = Vec::new();
    let mut level = vec![root];
    let mut seen = PageSet::default();
    let mut buffer = vec![0; pages.page_bytes];
    for _ in 0..DEPTH_MAX {
        let Some(&first) = level.first() else { break };
        read(first, &mut buffer)?;
        match node(first, &buffer).map(|node| node.kind) {
            // All leaves of a tree are on one level.
            Ok(LEAF) => {
                found.extend(level.into_iter().filter(|page| wanted.contains(*page)));
                return Ok(found);
            }
            Ok(INTERIOR) => {}
            // A WITHOUT ROWID table, or no sound page at all.
            _ => return Ok(found),
        }
        let mut below = Vec::new();
        for page in level {
            read(page, &mut buffer)?;
            for child in children(page, &buffer).unwrap_or_default() {
                if child.get() <= count && !seen.contains(child) {
                    seen.insert(child);
                    below.push(child);
                }
            }
        }
        level = below;
    }
    Ok(found)
}

/// The rowids on a leaf page of a table.
pub(super) fn rowids(number: PageNo, page: &[u8]) -> Result<Vec<i64>, Malformed> {
    let node = node(number, page)?;
    if node.kind != LEAF {
        return Err(Malformed);
    }
    node.cells(page)
        .map(|cell| {
            let (_, length) = varint(cell)?;
            Ok(varint(cell.get(length..).ok_or(Malformed)?)?.0 as i64)
        })
        .collect()
}

struct BtreeNode {
    kind: u8,
    cells: usize,
    /// Where the pointers to the cells stand.
    pointers: usize,
    rightmost: u32,
}

fn node(number: PageNo, page: &[u8]) -> Result<BtreeNode, Malformed> {
    let at = if number == PageNo::FIRST { DATABASE_HEADER_BYTES } else { 0 };
    let head = page.get(at..at + 12).ok_or(Malformed)?;
    let interior = head[0] == INTERIOR;
    Ok(BtreeNode {
        kind: head[0],
        cells: usize::from(u16::from_be_bytes([head[3], head[4]])),
        pointers: at + if interior { 12 } else { 8 },
        rightmost: if interior { u32::from_be_bytes([head[8], head[9], head[10], head[11]]) } else { 0 },
    })
}

impl BtreeNode {
    fn cells<'a>(&self, page: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let pointers = page.get(self.pointers..self.pointers + 2 * self.cells).unwrap_or_default();
        let at = pointers.chunks_exact(2).map(|p| usize::from(u16::from_be_bytes([p[0], p[1]])));
        at.map(|at| page.get(at..).unwrap_or_default())
    }
}

fn children(number: PageNo, page: &[u8]) -> Result<Vec<PageNo>, Malformed> {
    let node = node(number, page)?;
    if node.kind != INTERIOR {
        return Err(Malformed);
    }
    let left = node.cells(page).map(|cell| {
        let child = cell.first_chunk().ok_or(Malformed)?;
        PageNo::new(u32::from_be_bytes(*child)).ok_or(Malformed)
    });
    left.chain([PageNo::new(node.rightmost).ok_or(Malformed)]).collect()
}

/// A variable-length integer and its length.
fn varint(bytes: &[u8]) -> Result<(u64, usize), Malformed> {
    let mut value = 0u64;
    for (at, &byte) in bytes.iter().take(9).enumerate() {
        if at == 8 {
            return Ok((value << 8 | u64::from(byte), 9));
        }
        value = value << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            return Ok((value, at + 1));
        }
    }
    Err(Malformed)
}

/// The tables of a state with the leaf pages of each that are in a set.
pub(super) fn tables(
    pages: &mut StatePages<'_>,
    roots: &[(String, u32)],
    wanted: &PageSet,
) -> crate::error::Result<BTreeMap<String, Vec<PageNo>>> {
    let mut tables = BTreeMap::new();
    for (name, root) in roots {
        let Some(root) = PageNo::new(*root) else { continue };
        let leaves = leaves(pages, root, wanted)?;
        if !leaves.is_empty() {
            tables.insert(name.clone(), leaves);
        }
    }
    Ok(tables)
}

/// Reads bytes as a page of each kind.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(in crate::engine) fn fuzz_btree_page(data: &[u8]) {
    for number in [1, 2].into_iter().filter_map(PageNo::new) {
        let _ = rowids(number, data);
        let _ = children(number, data);
    }
    let mut wanted = PageSet::default();
    (1..100).filter_map(PageNo::new).for_each(|page| wanted.insert(page));
    let read = |_: PageNo, into: &mut [u8]| {
        let taken = data.len().min(into.len());
        into[..taken].copy_from_slice(&data[..taken]);
        Ok(())
    };
    let mut pages = StatePages { read: Box::new(read), page_bytes: 512, count: 1000 };
    let _ = PageNo::new(2).map(|root| leaves(&mut pages, root, &wanted));
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;
    use rusqlite::Connection;

    #[test]
    fn every_row_of_a_table_is_found_on_its_leaves() {
        for page_size in [512, 4096, 65_536] {
            let mut connection = Connection::open_in_memory().unwrap();
            connection.pragma_update(None, "page_size", page_size as i64).unwrap();
            let sql = "CREATE TABLE other(a); CREATE TABLE t(id INTEGER PRIMARY KEY, v);
                INSERT INTO t VALUES (-7, randomblob(100)), (9223372036854775807, 'last');
                WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 5000)
                INSERT INTO t SELECT i * 3, randomblob(i % 900) FROM c; INSERT INTO other VALUES (1);";
            connection.execute_batch(sql).unwrap();
            let image = connection.serialize("main").unwrap().to_vec();
            let mut all = PageSet::default();
            (1..=(image.len() / page_size) as u32).filter_map(PageNo::new).for_each(|p| all.insert(p));
            let read = |number: PageNo, page: &mut [u8]| {
                let at = (number.get() as usize - 1) * page_size;
                page.copy_from_slice(&image[at..at + page_size]);
                Ok(())
            };
            let count = (image.len() / page_size) as u32;
            let mut pages = StatePages { read: Box::new(read), page_bytes: page_size, count };
            let root = "SELECT rootpage FROM sqlite_schema WHERE name = 't'";
            let root = connection.query_row(root, [], |r| r.get::<_, u32>(0)).unwrap();
            let mut found = Vec::new();
            for leaf in leaves(&mut pages, PageNo::new(root).unwrap(), &all).unwrap() {
                let mut page = vec![0; page_size];
                read(leaf, &mut page).unwrap();
                found.extend(rowids(leaf, &page).unwrap());
            }
            let mut rows = connection.prepare("SELECT id FROM t ORDER BY id").unwrap();
            let rows: Vec<i64> = rows.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
            assert_eq!(found, rows);
        }
    }

    proptest! {
        #[test]
        fn any_page_is_read_without_panic(
            mut page in prop::collection::vec(any::<u8>(), 512),
            kind in 0u8..14,
        ) {
            page[0] = kind;
            let _ = rowids(PageNo::new(2).unwrap(), &page);
            let _ = children(PageNo::new(2).unwrap(), &page);
            let mut all = PageSet::default();
            (1..1000).filter_map(PageNo::new).for_each(|p| all.insert(p));
            let read = |_: PageNo, into: &mut [u8]| {
                into.copy_from_slice(&page);
                Ok(())
            };
            let mut pages = StatePages { read: Box::new(read), page_bytes: 512, count: 1000 };
            let _ = leaves(&mut pages, PageNo::new(2).unwrap(), &all);
        }
    }
}
