//! The recorder's trace, read back.

use std::path::{Path, PathBuf};

/// A change to a file or a name, in the order in which they were made.
#[derive(Clone, Debug)]
pub enum Change {
    Create {
        inode: u64,
        path: String,
        modified: i64,
    },
    Length {
        inode: u64,
        length: u64,
        modified: i64,
    },
    Write {
        inode: u64,
        offset: u64,
        modified: i64,
        data: Vec<u8>,
    },
    /// An fsync begins.
    Sync {
        inode: u64,
        id: u64,
        path: String,
    },
    /// It has succeeded.
    Synced {
        inode: u64,
        id: u64,
        data_only: bool,
        path: String,
    },
    Rename {
        from: String,
        to: String,
    },
    Unlink {
        path: String,
    },
    Mkdir {
        path: String,
    },
    Rmdir {
        path: String,
    },
    /// A line that the workload wrote into the file `acks`, which is no part of the disk.
    Said(String),
}

/// Reads a trace; paths become relative to the directory that was watched, which itself is the empty path.
pub fn read(trace: &Path, watch: &Path) -> Vec<Change> {
    let bytes = std::fs::read(trace).unwrap();
    let mut rest = &bytes[..];
    let mut changes = Vec::new();
    while !rest.is_empty() {
        let length = u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
        let (record, after) = rest.split_at(length);
        rest = after;
        decode(&record[4..], watch, &mut changes);
    }
    changes
}

fn decode(record: &[u8], watch: &Path, changes: &mut Vec<Change>) {
    let long = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().unwrap());
    let (inode, a, b) = (long(1), long(9), long(17));
    let lengths = [25, 27].map(|at| u16::from_le_bytes([record[at], record[at + 1]]) as usize);
    let path = |at: usize, length: usize| {
        let path = PathBuf::from(std::str::from_utf8(&record[at..at + length]).unwrap());
        path.strip_prefix(watch).unwrap_or(&path).to_str().unwrap().to_string()
    };
    let (first, second) = (path(29, lengths[0]), || path(29 + lengths[0], lengths[1]));
    let data = &record[29 + lengths[0] + lengths[1]..];
    if first == "acks" {
        if record[0] == 3 {
            let lines = std::str::from_utf8(data).unwrap().lines();
            changes.extend(lines.map(|line| Change::Said(line.to_string())));
        }
        return;
    }
    changes.push(match record[0] {
        1 => Change::Create { inode, path: first, modified: b as i64 },
        2 => Change::Length { inode, length: a, modified: b as i64 },
        3 => Change::Write { inode, offset: a, modified: b as i64, data: data.to_vec() },
        4 => Change::Sync { inode, id: a, path: first },
        5 => Change::Synced { inode, id: a, data_only: b != 0, path: first },
        6 => Change::Rename { from: first, to: second() },
        7 => Change::Unlink { path: first },
        8 => Change::Mkdir { path: first },
        9 => Change::Rmdir { path: first },
        kind => panic!("a record of kind {kind}"),
    });
}

/// What kind of file a path names.
pub fn kind(path: &str) -> &'static str {
    let name = path.rsplit('/').next().unwrap_or(path);
    let within = |part: &str| path.contains(part);
    match name {
        _ if path.is_empty() => "directory of the database",
        _ if within("-replite/lost") => "lost",
        _ if within("-replite/incoming") && name == "pages" => "incoming/pages",
        _ if within("-replite/incoming") && name == "first" => "incoming/first",
        _ if within("-replite/incoming") && name.starts_with("state") => "incoming/state",
        "incoming" => "directory incoming",
        "log" => "directory log",
        _ if name.ends_with(".log") => "log segment",
        _ if name.ends_with("-replite") => "directory beside the database",
        "anchors" => "anchors",
        _ if name.starts_with("epochs") => "epochs",
        _ if name.starts_with("node") => "node",
        _ if name.ends_with("-wal") => "WAL",
        _ if name.ends_with("-journal") => "rollback journal",
        _ if name.ends_with(".db") => "database",
        _ => "other",
    }
}
