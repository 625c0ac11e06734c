//! Files that no crash leaves: each is an error that names the file, and nothing is changed.

use super::*;
use crate::files::member::{IDENTITY, Identity};
use crate::files::sealed::Sealed;
use crate::members::storage::formats::{ENTRIES, PURGED, SNAPSHOT, VOTE};

fn files(directory: &Path) -> Vec<(&'static Sealed, PathBuf)> {
    let small = [(&IDENTITY, "identity"), (&VOTE, "vote"), (&PURGED, "purged"), (&SNAPSHOT, "snapshot")];
    let small = small.map(|(kind, name)| (kind, directory.join(name)));
    let mut log: Vec<_> = fs::read_dir(directory.join("log")).unwrap().map(|e| e.unwrap().path()).collect();
    log.sort();
    small.into_iter().chain(log.into_iter().map(|path| (&ENTRIES, path))).collect()
}

async fn member() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("members");
    drop(full(&directory).await);
    (dir, directory)
}

/// The path that an open fails with, for it is corrupt.
fn corrupt(directory: &Path) -> PathBuf {
    match refusal(directory) {
        Error::Corrupt { path, cure, .. } => {
            assert!(cure.contains("joins anew"));
            path
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_damaged_file_is_an_error_that_names_it() {
    let (_dir, directory) = member().await;
    let before = view(&directory);
    let files = files(&directory);
    assert_eq!(files.len(), 4 + 3);
    for (kind, path) in &files {
        let whole = fs::read(path).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            fs::write(path, &flipped).unwrap();
            assert_eq!(&corrupt(&directory), path, "byte {at}");
            assert_eq!(fs::read(path).unwrap(), flipped, "nothing is cut");
        }
        for cut in [0, 1, 12, whole.len() / 2, whole.len() - 1] {
            fs::write(path, &whole[..cut]).unwrap();
            assert_eq!(&corrupt(&directory), path, "cut at {cut}");
        }
        for version in [0, 2] {
            fs::write(path, Sealed { version, ..**kind }.seal(b"{}")).unwrap();
            match refusal(&directory) {
                Error::Newer { path: named, found: 2, .. } | Error::Older { path: named, found: 0, .. } => {
                    assert_eq!(&named, path);
                }
                other => panic!("{other}"),
            }
        }
        // What is sealed, and is nonsense.
        for fields in [&b""[..], b"{}", b"[]", b"7", b"[{}]", b"{\"id\":7}", b"[[[[[[[[[[[[[["] {
            fs::write(path, kind.seal(fields)).unwrap();
            assert_eq!(&corrupt(&directory), path, "{}", String::from_utf8_lossy(fields));
        }
        fs::write(path, kind.seal(&vec![b' '; kind.max_bytes as usize])).unwrap();
        assert_eq!(&corrupt(&directory), path, "too long");
        fs::write(path, &whole).unwrap();
        assert_eq!(view(&directory), before);
    }
}

#[tokio::test]
async fn a_file_that_is_missing_is_seen_unless_it_is_the_last_of_the_log() {
    let (_dir, directory) = member().await;
    let before = view(&directory);
    let files = files(&directory);
    for (at, (_, path)) in files.iter().enumerate() {
        let away = directory.join("away");
        fs::rename(path, &away).unwrap();
        if at == files.len() - 1 {
            // No other file knows of it.
            assert_eq!(view(&directory).log, entries(3, 2..7));
        } else {
            let named = corrupt(&directory);
            let expected = match at {
                // The log begins after what is purged, or goes on after what is missing.
                2 => &files[4].1,
                4 | 5 => &files[at + 1].1,
                _ => path,
            };
            assert_eq!(&named, expected);
        }
        if at == 0 {
            assert!(matches!(Storage::create(&directory), Err(Error::Corrupt { .. })), "a log is there");
        }
        fs::rename(&away, path).unwrap();
        assert_eq!(view(&directory), before);
    }
    fs::remove_dir_all(directory.join("log")).unwrap();
    assert_eq!(corrupt(&directory), directory.join("log"));
}

#[tokio::test]
async fn files_that_contradict_each_other_are_an_error() {
    let (_dir, directory) = member().await;
    let before = view(&directory);
    let log = |index: u64| directory.join("log").join(format!("{index:016x}"));
    let json = |entries: Vec<LogEntry>| serde_json::to_vec(&entries).unwrap();
    // Names that mean nothing to us are left alone.
    for other in ["0000000000000001.bak", "A000000000000001", "1", "copy of 1"] {
        fs::copy(log(1), directory.join("log").join(other)).unwrap();
    }
    assert_eq!(view(&directory), before);
    let planted = |index: u64, fields: &[u8]| {
        let whole = fs::read(log(index)).ok();
        fs::write(log(index), ENTRIES.seal(fields)).unwrap();
        let named = corrupt(&directory);
        match whole {
            Some(whole) => fs::write(log(index), whole).unwrap(),
            None => fs::remove_file(log(index)).unwrap(),
        }
        assert_eq!(view(&directory), before);
        named
    };
    // A file twice, files that overlap, a gap inside of one, and other entries than before.
    assert_eq!(planted(10, &json(entries(3, 7..10))), log(10));
    assert_eq!(planted(9, &json(entries(3, 9..11))), log(9));
    assert_eq!(planted(5, &json(entries(3, 5..7))), log(5));
    assert_eq!(planted(12, &json(entries(3, 12..13))), log(12));
    assert_eq!(planted(7, &json([entries(3, 7..8), entries(3, 9..10)].concat())), log(7));
    assert_eq!(planted(7, &json(entries(2, 7..10))), log(7));
    assert_eq!(planted(1, &json(entries(2, 1..4))), log(1), "other entries than those purged");
    assert_eq!(planted(4, &json(entries(4, 4..7))), log(7), "a later leader in between");
    let mut strange = entry(3, 10);
    strange.payload =
        EntryPayload::Membership(serde_json::from_str(r#"{"configs":[[1]],"nodes":{}}"#).unwrap());
    assert_eq!(planted(10, &json(vec![strange])), log(10), "a voter without an address");
    let high = format!(
        r#"[{{"log_id":{{"leader_id":{{"term":3,"node_id":7}},"index":{}}},"payload":"Blank"}}]"#,
        u64::MAX
    );
    assert_eq!(planted(u64::MAX, high.as_bytes()), log(u64::MAX));

    let swapped = |kind: &Sealed, name: &str, fields: &str| {
        let path = directory.join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, kind.seal(fields.as_bytes())).unwrap();
        let named = corrupt(&directory);
        fs::write(&path, whole).unwrap();
        assert_eq!(view(&directory), before);
        named
    };
    let vote = r#"{"leader_id":{"term":2,"node_id":7},"committed":true}"#;
    for vote in ["null", vote] {
        assert_eq!(swapped(&VOTE, "vote", vote), directory.join("vote"), "older than the log");
    }
    let purged = r#"{"leader_id":{"term":3,"node_id":7},"index":5}"#;
    assert_eq!(swapped(&PURGED, "purged", purged), directory.join("snapshot"), "beyond the snapshot");
    let mut state = before.snapshot.clone().unwrap();
    state.last_applied = Some(LogId::new(LeaderId::new(3, 8), 4));
    let other = serde_json::to_string(&state).unwrap();
    assert_eq!(swapped(&SNAPSHOT, "snapshot", &other), directory.join("snapshot"), "of other entries");
    let zero = r#"{"id":0,"inode":1,"born_ns":null}"#;
    assert_eq!(swapped(&IDENTITY, "identity", zero), directory.join("identity"));
}

/// They are what a later version has to read, or to refuse by the number.
#[test]
fn the_files_fields_stay_what_they_are() {
    fn written(value: &impl serde::Serialize, text: &str) {
        assert_eq!(String::from_utf8(formats::encode(value).unwrap()).unwrap(), text);
    }
    let identity = Identity { id: u64::MAX, inode: 5, born_ns: Some(7) };
    written(&identity, r#"{"id":18446744073709551615,"inode":5,"born_ns":7}"#);
    written(&None::<Vote<u64>>, "null");
    written(&Some(Vote::new(3, 7)), r#"{"leader_id":{"term":3,"node_id":7},"committed":false}"#);
    written(&id(3, 4), r#"{"leader_id":{"term":3,"node_id":7},"index":4}"#);
    let mut log = entries(3, 1..3);
    let members = Membership::<u64, Member>::new(
        vec![BTreeSet::from([7])],
        BTreeMap::from([(7, Member { url: "replite://a:1".into(), witness: true })]),
    );
    log.push(LogEntry { log_id: id(3, 3), payload: EntryPayload::Membership(members) });
    written(
        &log,
        concat!(
            r#"[{"log_id":{"leader_id":{"term":3,"node_id":7},"index":1},"payload":"Blank"},"#,
            r#"{"log_id":{"leader_id":{"term":3,"node_id":7},"index":2},"#,
            r#""payload":{"Normal":{"swap":{"nonce":2,"record":"cmVjb3JkIDI"}}}},"#,
            r#"{"log_id":{"leader_id":{"term":3,"node_id":7},"index":3},"payload":{"Membership":{"#,
            r#""configs":[[7]],"nodes":{"7":{"url":"replite://a:1","witness":true}}}}}]"#
        ),
    );
    let mut state = Agreed::default();
    for entry in log {
        state.apply(entry);
    }
    written(
        &state,
        concat!(
            r#"{"last_applied":{"leader_id":{"term":3,"node_id":7},"index":3},"#,
            r#""membership":{"log_id":{"leader_id":{"term":3,"node_id":7},"index":3},"#,
            r#""membership":{"configs":[[7]],"nodes":{"7":{"url":"replite://a:1","witness":true}}}},"#,
            r#""register":{"version":"3-7-2","nonce":2,"record":"cmVjb3JkIDI"}}"#
        ),
    );
    for kind in [IDENTITY, VOTE, PURGED, SNAPSHOT, ENTRIES] {
        let magic = std::str::from_utf8(&kind.magic).unwrap();
        assert!(magic.starts_with("repm") && (kind.oldest, kind.version) == (1, 1));
    }
}
