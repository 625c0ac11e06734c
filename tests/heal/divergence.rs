//! Two histories that a checksum made of CRCs can't tell apart, and ours can.

use crc::{CRC_64_GO_ISO, Crc};
use replite::PageSize;

use crate::fork::*;
use crate::support::*;

/// The database checksum of LiteFS (its library `ltx`, `ChecksumPage`): the exclusive or of each
/// page's CRC-64 over page number, big endian, and page, with the highest bit set.
fn xor_of_crcs(image: &[u8], page_bytes: usize) -> u64 {
    let crc = Crc::<u64>::new(&CRC_64_GO_ISO);
    let pages = (1u32..).zip(image.chunks_exact(page_bytes));
    let sums = pages.map(|(number, page)| {
        let mut digest = crc.digest();
        digest.update(&number.to_be_bytes());
        digest.update(page);
        digest.finalize()
    });
    sums.fold(0, |all, sum| all ^ sum) | 1 << 63
}

/// A CRC is affine: the same exclusive or at the same offset changes the CRC of any page in the
/// same way. So one side may change one page and the other side another page, and the exclusive or
/// of all CRCs is the same on both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_updates_that_an_xor_of_crcs_takes_for_one_are_told_apart_and_healed() {
    let fork = Fork::new();
    let a = open(fork.primary("a")).await;
    // Two tables of the same form: their rows lie at the same offsets of two pages.
    let tables = "CREATE TABLE x(v); CREATE TABLE y(v);
        INSERT INTO x VALUES ('balance: 100'); INSERT INTO y VALUES ('balance: 100');";
    run(&a, tables.into()).await;
    a.shutdown().await;
    let before = position(&a);
    fork.copy("a", "b");
    // The failover: b goes on in the place of a, which lives.
    let (a, b) = (open(fork.primary("a")).await, open(fork.alone("b")).await);
    run(&a, "UPDATE x SET v = 'balance: 900'".into()).await;
    run(&b, "UPDATE y SET v = 'balance: 900'".into()).await;
    a.shutdown().await;
    b.shutdown().await;
    let (ours, theirs) = (image(&fork.path("a")), image(&fork.path("b")));
    assert!(ours != theirs, "the rows are the same");
    assert_eq!(ours.len(), theirs.len());
    assert_eq!(xor_of_crcs(&ours, 4096), xor_of_crcs(&theirs, 4096), "the case is not made as it should be");
    // One transaction each since the same state, and so the same position, by such a checksum.
    assert_eq!([position(&a).number(), position(&b).number()], [before.number() + 1; 2]);
    let size = PageSize::new(4096).unwrap();
    for (db, image) in [(&a, &ours), (&b, &theirs)] {
        assert_eq!(position(db).checksum(), db.checksum_of(image, size));
    }
    assert_ne!(position(&a).checksum(), position(&b).checksum());

    let tip = position(&b);
    let (a, b) = (open(fork.primary("a")).await, open(fork.replica("b")).await);
    healed(&mut b.events()).await;
    equal(&a, &b).await;
    let y = "SELECT x.v || ', ' || y.v FROM x, y";
    let rows: String = plain(b.path()).query_row(y, [], |r| r.get(0)).unwrap();
    assert_eq!(rows, "balance: 900, balance: 100");
    // The lost update is kept: as a transaction, as a row, as a page.
    let branch = only_branch(&b).await;
    assert_eq!((branch.fork, branch.tip), (Some(before), tip));
    let transactions = branch.transactions().unwrap();
    assert_eq!(transactions.iter().map(|t| t.position).collect::<Vec<_>>(), [tip]);
    let rows = branch.rows().unwrap().unwrap().rows;
    let lost = rows.iter().find(|row| row.table == "y").unwrap();
    assert_eq!(lost.lost.as_ref().unwrap()["v"], "balance: 900");
    assert_eq!(lost.kept.as_ref().unwrap()["v"], "balance: 100");
    let mut pages = Vec::new();
    branch
        .visit_pages(|_, page| {
            pages.push(page.to_vec());
            Ok(())
        })
        .unwrap();
    assert!(!pages.is_empty());
    let page = theirs.chunks_exact(4096).zip(ours.chunks_exact(4096)).filter(|(b, a)| b != a).map(|(b, _)| b);
    assert!(page.eq(pages), "the pages that differed are the pages that are kept");
    a.shutdown().await;
    b.shutdown().await;
}
