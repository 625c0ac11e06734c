//! A disk that keeps only what was synced, and of the rest whatever a power cut may leave.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rand::Rng;
use rand::rngs::StdRng;

use crate::trace::Change;

const SECTOR: usize = 512;

/// What makes a name in a directory durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Names {
    /// Any fsync, for all names that were changed before it: file systems with a journal.
    Journal,
    /// Only an fsync of the directory: what POSIX promises.
    Strict,
}

/// What becomes of what was not synced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Style {
    Nothing,
    Everything,
    /// Each sector for itself, at any of the contents that it has had.
    Each,
    /// Of each file everything up to some write, and of that write some sectors.
    Prefix,
    /// Each file in another of these ways.
    Mixed,
}

pub const STYLES: [Style; 5] = [Style::Nothing, Style::Everything, Style::Each, Style::Prefix, Style::Mixed];

/// What a sector held after a change.
type Version = (u64, Box<[u8; SECTOR]>);

#[derive(Clone, Debug, Default)]
struct File {
    /// The bytes as processes see them.
    current: Vec<u8>,
    durable: Vec<u8>,
    durable_modified: i64,
    /// By sector, its contents since it was synced, each with the change that made it.
    sectors: BTreeMap<usize, Vec<Version>>,
    lengths: Vec<(u64, usize)>,
    modified: Vec<(u64, i64)>,
}

impl File {
    fn touch(&mut self, op: u64, sectors: std::ops::Range<usize>) {
        for sector in sectors {
            let mut bytes = Box::new([0; SECTOR]);
            let from = (sector * SECTOR).min(self.current.len());
            let until = (from + SECTOR).min(self.current.len());
            bytes[..until - from].copy_from_slice(&self.current[from..until]);
            self.sectors.entry(sector).or_default().push((op, bytes));
        }
    }

    fn write(&mut self, op: u64, offset: usize, data: &[u8], modified: i64) {
        let end = offset + data.len();
        if data.is_empty() {
            // Only the time was set.
            self.modified.push((op, modified));
            return;
        }
        if end > self.current.len() {
            self.current.resize(end, 0);
            self.lengths.push((op, end));
        }
        self.current[offset..end].copy_from_slice(data);
        self.touch(op, offset / SECTOR..end.div_ceil(SECTOR));
        self.modified.push((op, modified));
    }

    fn set_length(&mut self, op: u64, length: usize, modified: i64) {
        let before = self.current.len();
        self.current.resize(length, 0);
        if length < before {
            // Should the file grow again, zeros are there.
            self.touch(op, length / SECTOR..before.div_ceil(SECTOR));
        }
        self.lengths.push((op, length));
        self.modified.push((op, modified));
    }

    /// Everything up to `mark` is on the disk.
    fn settle(&mut self, mark: u64, data_only: bool) {
        let last = |list: &[(u64, usize)]| list.iter().rev().find(|(op, _)| *op <= mark).map(|(_, l)| *l);
        if let Some(length) = last(&self.lengths) {
            self.durable.resize(length, 0);
        }
        self.lengths.retain(|(op, _)| *op > mark);
        for (sector, versions) in &mut self.sectors {
            let done = versions.partition_point(|(op, _)| *op <= mark);
            if let Some((_, bytes)) = versions.drain(..done).next_back() {
                put(&mut self.durable, *sector, &bytes[..]);
            }
        }
        self.sectors.retain(|_, versions| !versions.is_empty());
        // fdatasync need not write times: any of them may be found.
        if !data_only {
            let done = self.modified.partition_point(|(op, _)| *op <= mark);
            if let Some((_, time)) = self.modified.drain(..done).next_back() {
                self.durable_modified = time;
            }
        }
    }

    fn cut(&self, style: Style, rng: &mut StdRng) -> (Vec<u8>, i64) {
        let style = match style {
            Style::Mixed => STYLES[rng.random_range(0..STYLES.len() - 1)],
            other => other,
        };
        let ops: Vec<u64> = self.modified.iter().map(|(op, _)| *op).collect();
        // Up to where the file's changes are kept; and whether each sector is drawn for itself.
        let until = match style {
            Style::Nothing => 0,
            Style::Everything | Style::Each | Style::Mixed => u64::MAX,
            Style::Prefix if ops.is_empty() => 0,
            Style::Prefix => ops[rng.random_range(0..ops.len())],
        };
        let kept = |list: &[(u64, usize)]| list.partition_point(|(op, _)| *op <= until);
        let lengths = kept(&self.lengths);
        let chosen = match style {
            Style::Each => rng.random_range(0..=lengths),
            // The length goes with the metadata, which may be late or early.
            Style::Prefix if rng.random_bool(0.2) => rng.random_range(0..=self.lengths.len()),
            _ => lengths,
        };
        let length = chosen.checked_sub(1).map_or(self.durable.len(), |at| self.lengths[at].1);
        let mut bytes = self.durable.clone();
        bytes.resize(length, 0);
        let keep = *[0.1, 0.5, 0.9].get(rng.random_range(0..3)).unwrap_or(&0.5);
        for (sector, versions) in &self.sectors {
            let last = versions.partition_point(|(op, _)| *op <= until);
            let version = match style {
                Style::Each if rng.random_bool(keep) => Some(rng.random_range(0..last)),
                Style::Each => None,
                Style::Prefix if last > 0 && versions[last - 1].0 == until && rng.random_bool(0.5) => {
                    last.checked_sub(2)
                }
                _ => last.checked_sub(1),
            };
            if let Some(version) = version {
                put(&mut bytes, *sector, &versions[version].1[..]);
            }
        }
        let times = self.modified.partition_point(|(op, _)| *op <= until);
        let time = rng.random_range(0..=times);
        let time = if style == Style::Everything { times } else { time };
        (bytes, time.checked_sub(1).map_or(self.durable_modified, |at| self.modified[at].1))
    }
}

/// Copies a directory, with the times of its files; the wal-index is left behind.
pub fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            copy_tree(&source, &target);
        } else if !source.to_str().unwrap().ends_with("-shm") {
            fs::copy(&source, &target).unwrap();
            let modified = fs::metadata(&source).unwrap().modified().unwrap();
            fs::File::options().write(true).open(&target).unwrap().set_modified(modified).unwrap();
        }
    }
}

/// The paths of all files below a directory, relative to it, in order.
#[must_use]
pub fn files_below(directory: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            all.extend(files_below(&entry.path()).into_iter().map(|below| format!("{name}/{below}")));
        } else if !name.ends_with("-shm") {
            all.push(name);
        }
    }
    all.sort();
    all
}

/// Puts a sector where the file has it.
fn put(file: &mut [u8], sector: usize, bytes: &[u8]) {
    let from = sector * SECTOR;
    if from < file.len() {
        let until = (from + SECTOR).min(file.len());
        file[from..until].copy_from_slice(&bytes[..until - from]);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Node {
    File(usize),
    Directory,
}

type Tree = BTreeMap<String, Node>;

#[derive(Clone, Debug)]
enum Naming {
    Add(String, Node),
    Remove(String),
    Rename(String, String),
}

impl Naming {
    fn directories(&self) -> Vec<&str> {
        let parent = |path: &'_ String| path.rfind('/').unwrap_or(0);
        match self {
            Naming::Add(path, _) | Naming::Remove(path) => vec![&path[..parent(path)]],
            Naming::Rename(from, to) => vec![&from[..parent(from)], &to[..parent(to)]],
        }
    }

    fn apply(&self, tree: &mut Tree) {
        match self {
            Naming::Add(path, node) => {
                tree.insert(path.clone(), *node);
            }
            Naming::Remove(path) => {
                tree.remove(path);
            }
            Naming::Rename(from, to) => {
                let below = format!("{from}/");
                let moved: Vec<_> =
                    tree.keys().filter(|p| *p == from || p.starts_with(&below)).cloned().collect();
                for path in moved {
                    if let Some(node) = tree.remove(&path) {
                        tree.insert(format!("{to}{}", &path[from.len()..]), node);
                    }
                }
            }
        }
    }
}

/// The disk, after some of a trace.
#[derive(Clone, Debug)]
pub struct Disk {
    names: Names,
    files: Vec<File>,
    by_inode: HashMap<u64, usize>,
    tree: Tree,
    pending: Vec<(u64, Naming)>,
    op: u64,
    syncs: HashMap<u64, u64>,
}

impl Disk {
    pub fn empty(names: Names) -> Disk {
        Disk {
            names,
            files: Vec::new(),
            by_inode: HashMap::new(),
            tree: Tree::new(),
            pending: Vec::new(),
            op: 0,
            syncs: HashMap::new(),
        }
    }

    /// What a directory holds now, all of it durable.
    pub fn load(names: Names, root: &Path) -> Disk {
        let mut disk = Disk::empty(names);
        disk.load_below(root, "");
        disk
    }

    fn load_below(&mut self, directory: &Path, prefix: &str) {
        use std::os::unix::fs::MetadataExt;
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            let meta = entry.metadata().unwrap();
            if meta.is_dir() {
                self.tree.insert(name.clone(), Node::Directory);
                self.load_below(&entry.path(), &format!("{name}/"));
            } else if !name.ends_with("-shm") {
                let bytes = fs::read(entry.path()).unwrap();
                let modified = meta.mtime() * 1_000_000_000 + meta.mtime_nsec();
                let file = File {
                    current: bytes.clone(),
                    durable: bytes,
                    durable_modified: modified,
                    ..File::default()
                };
                self.by_inode.insert(meta.ino(), self.files.len());
                self.tree.insert(name, Node::File(self.files.len()));
                self.files.push(file);
            }
        }
    }

    pub fn apply(&mut self, change: &Change) {
        self.op += 1;
        let op = self.op;
        match change {
            Change::Create { inode, path, modified } => {
                self.by_inode.insert(*inode, self.files.len());
                self.pending.push((op, Naming::Add(path.clone(), Node::File(self.files.len()))));
                self.files.push(File { durable_modified: *modified, ..File::default() });
            }
            Change::Length { inode, length, modified } => {
                if let Some(file) = self.by_inode.get(inode) {
                    self.files[*file].set_length(op, *length as usize, *modified);
                }
            }
            Change::Write { inode, offset, modified, data } => {
                let file = self.by_inode.get(inode).expect("a write to a file that was never made");
                self.files[*file].write(op, *offset as usize, data, *modified);
            }
            Change::Sync { id, .. } => {
                self.syncs.insert(*id, op);
            }
            Change::Synced { inode, id, data_only, path } => {
                let mark = self.syncs.remove(id).unwrap_or(0);
                let file = self.by_inode.get(inode).copied().filter(|_| !self.is_directory(path));
                if let Some(file) = file {
                    self.files[file].settle(mark, *data_only);
                }
                self.settle_names(mark, file.is_none().then_some(path));
            }
            Change::Rename { from, to } => {
                self.pending.push((op, Naming::Rename(from.clone(), to.clone())));
            }
            Change::Unlink { path } | Change::Rmdir { path } => {
                self.pending.push((op, Naming::Remove(path.clone())));
            }
            Change::Mkdir { path } => self.pending.push((op, Naming::Add(path.clone(), Node::Directory))),
            Change::Said(_) => {}
        }
    }

    fn is_directory(&self, path: &str) -> bool {
        let made = |naming: &Naming| matches!(naming, Naming::Add(p, Node::Directory) if p == path);
        path.is_empty()
            || self.tree.get(path) == Some(&Node::Directory)
            || self.pending.iter().any(|(_, naming)| made(naming))
    }

    fn settle_names(&mut self, mark: u64, directory: Option<&String>) {
        let mut wanted = vec![false; self.pending.len()];
        match (self.names, directory) {
            (Names::Journal, _) => {
                wanted.iter_mut().zip(&self.pending).for_each(|(wanted, (op, _))| *wanted = *op <= mark);
            }
            (Names::Strict, None) => return,
            (Names::Strict, Some(directory)) => {
                // A rename is in two directories: what went before it in the other one goes along.
                let mut directories = HashSet::from([directory.as_str()]);
                for (at, (op, naming)) in self.pending.iter().enumerate().rev() {
                    let of = naming.directories();
                    if *op <= mark && of.iter().any(|d| directories.contains(d)) {
                        wanted[at] = true;
                        directories.extend(of);
                    }
                }
            }
        }
        let mut wanted = wanted.into_iter();
        let tree = &mut self.tree;
        self.pending.retain(|(_, naming)| {
            let done = wanted.next().unwrap_or(false);
            if done {
                naming.apply(tree);
            }
            !done
        });
    }

    /// Makes a state that a power cut may leave in a directory.
    pub fn cut(&self, style: Style, rng: &mut StdRng, to: &Path) {
        let tree = self.cut_names(style, rng);
        fs::create_dir_all(to).unwrap();
        for (path, node) in &tree {
            let target = to.join(path);
            // A name in a directory that is not there is not there.
            if !target.parent().unwrap().is_dir() {
                continue;
            }
            match node {
                Node::Directory => fs::create_dir(&target).unwrap(),
                Node::File(file) => {
                    let (bytes, modified) = self.files[*file].cut(style, rng);
                    fs::write(&target, bytes).unwrap();
                    let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(modified as u64);
                    fs::File::options().write(true).open(&target).unwrap().set_modified(time).unwrap();
                }
            }
        }
    }

    fn cut_names(&self, style: Style, rng: &mut StdRng) -> Tree {
        let mut tree = self.tree.clone();
        let going_on = match style {
            Style::Nothing => 0.0,
            Style::Everything => 1.0,
            _ => [0.2, 0.8, 0.95][rng.random_range(0..3)],
        };
        let mut ended = HashSet::new();
        for (_, naming) in &self.pending {
            let of = naming.directories();
            let of = if self.names == Names::Journal { vec![""] } else { of };
            if of.iter().any(|d| ended.contains(d)) || !rng.random_bool(going_on) {
                ended.extend(of);
            } else {
                naming.apply(&mut tree);
            }
        }
        tree
    }
}
