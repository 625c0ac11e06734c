//! Decoders of this floor, for [`crate::fuzz`].

use std::fs;

use crate::checksum::PageKey;
use crate::engine::file::anchor::Anchors;
use crate::engine::file::epochs::read_epochs;
use crate::engine::lost::fuzz_btree_page;
use crate::engine::{Lost, incoming};
use crate::files::Paths;
use crate::files::sealed::check_of;
use crate::keys::DatabaseKeys;
use crate::page::PageSize;

/// The page key of the inputs.
const KEY: PageKey = DatabaseKeys::fixed(7).page;

/// Bytes before the hash that most files of the state directory end with.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    [bytes, &check_of(bytes)].concat()
}

/// Anchors, epochs, and what a snapshot or a comparison left.
pub(crate) fn fuzz_state_files(data: &[u8]) {
    let dir = tempfile::tempdir().expect("a directory");
    let paths = Paths::fresh(dir.path());
    fs::create_dir(paths.incoming()).expect("a directory");
    fs::write(paths.incoming_pages(), [0; 8192]).expect("a file");
    let look = || {
        if let Ok(anchors) = Anchors::open(&paths, KEY.fingerprint()) {
            let _ = (anchors.newest_first(), anchors.generation());
        }
        let _ = read_epochs(&paths, KEY.fingerprint());
        let _ = incoming::progress(&paths, KEY);
        let _ = incoming::read_held(&paths, KEY, PageSize::new(512).expect("a page size"));
    };
    for bytes in [data.to_vec(), sealed(data)] {
        for path in [paths.anchors(), paths.epochs(), paths.incoming_state(), paths.incoming_held()] {
            fs::write(path, &bytes).expect("a file");
        }
        // The last of an anchor's slot is its hash.
        if let Some(slot) = bytes.get(..240) {
            fs::write(paths.anchors(), sealed(slot)).expect("a file");
        }
        look();
    }
}

/// A page as a leaf and as an interior page of a table.
pub(crate) fn fuzz_btree(data: &[u8]) {
    fuzz_btree_page(data);
}

/// A lost branch: the first byte says which of its files the rest is.
pub(crate) fn fuzz_lost(data: &[u8]) {
    let Some((&which, rest)) = data.split_first() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let paths = Paths::fresh(dir.path());
    let branch = paths.lost().join("branch-x");
    fs::create_dir_all(&branch).expect("a directory");
    let tip = format!("{:016x}-{:016x}-{:016x}-{:032x}", 1, 2, 3, 4);
    let json = format!(
        r#"{{"format":1,"fork":null,"tip":"{tip}","healed_to":"{tip}","damaged":false,"unix_millis":1,
            "page_size":512,"size_pages":1,"pages":1,"record_bytes":0}}"#
    );
    for (at, name) in ["branch.json", "pages", "records", "rows.jsonl"].into_iter().enumerate() {
        let bytes = match (at == usize::from(which % 4), at) {
            (true, _) => rest,
            (false, 0) => json.as_bytes(),
            (false, _) => b"",
        };
        fs::write(branch.join(name), bytes).expect("a file");
    }
    let Ok(all) = Lost::list(&paths) else { return };
    for branch in all.iter().filter_map(Lost::branch) {
        let _ = branch.transactions();
        let _ = branch.visit_pages(|_, _| Ok(()));
        let _ = branch.rows();
        let _ = branch.export(&dir.path().join("export.db"));
    }
}

/// What the corpus begins with.
#[cfg(test)]
pub(crate) fn fuzz_seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    use crate::engine::file::epochs::write_epochs;
    use crate::files::replace_file;
    use crate::txid::EpochHistory;
    let dir = tempfile::tempdir().expect("a directory");
    let paths = Paths::fresh(dir.path());
    write_epochs((&paths, KEY.fingerprint()), &EpochHistory::default(), true).expect("a file");
    replace_file(&dir.path().join("x"), b"").expect("a file");
    let epochs = fs::read(paths.epochs()).expect("a file");
    let (body, _) = epochs.split_last_chunk::<16>().expect("a hash");
    let mut anchor = b"repanchr\x02\0\0\0\x01\0\0\0".to_vec();
    anchor.resize(224, 3);
    anchor.extend_from_slice(&KEY.fingerprint().0);
    let mut state = b"repincom\x02\0\0\0\0\x02\0\0\x02\0\0\0".to_vec();
    state.resize(60, 1);
    state.extend_from_slice(&KEY.fingerprint().0);
    let connection = rusqlite::Connection::open_in_memory().expect("a database");
    connection
        .execute_batch(
            "PRAGMA page_size = 512; CREATE TABLE t(v); INSERT INTO t VALUES (1), ('two'), (x'03')",
        )
        .expect("rows");
    let mut connection = connection;
    let image = connection.serialize("main").expect("bytes").to_vec();
    let row = br#"{"table":"t","rowid":1,"lost":{"a":{"blob":"00ff"},"b":1.5},"kept":null}"#;
    let rows = [&[3], row.as_slice(), b"\n{\"truncated\":false}\n"].concat();
    vec![
        ("state_files", "epochs", body.to_vec()),
        ("state_files", "anchor", anchor),
        ("state_files", "state", state),
        (
            "state_files",
            "held",
            [&b"repheld3"[..], &KEY.fingerprint().0, b"\0\x02\0\0\x01\0\0\0\x07\0\0\0"].concat(),
        ),
        ("btree", "leaf", image[512..1024].to_vec()),
        (
            "btree",
            "interior",
            [&[5, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 3, 0, 16, 0, 20], [0; 496].as_slice()].concat(),
        ),
        ("lost", "rows", rows),
        ("lost", "json", b"\0{\"format\":2}".to_vec()),
        ("lost", "pages", [&[1u8], [0u8; 60].as_slice()].concat()),
        ("wal", "header", vec![7; 48]),
    ]
}
