//! What databases are refused for, and what is wrong with a peer.

use std::time::Duration;

use crate::peer::{NodeId, PeerKey};
use crate::status::is_plain;

/// Why a database can't be served.
///
/// ```
/// use replite::{Error, Unsupported};
///
/// fn hint(error: &Error) -> Option<&'static str> {
///     let Error::Unsupported { reason, .. } = error else { return None };
///     match reason {
///         Unsupported::NetworkFileSystem(_) => Some("use a local disk"),
///         Unsupported::NotADatabase => Some("is the file encrypted?"),
///         _ => None,
///     }
/// }
/// # let _ = hint;
/// ```
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// The linked SQLite has a WAL race that newer ones don't have.
    #[error("SQLite {found} is linked; {needed} or newer is needed")]
    SqliteTooOld {
        /// The linked version.
        found: String,
        /// The oldest that serves.
        needed: &'static str,
    },
    /// Not the path of a file: it is empty, or what is there is a directory.
    #[error("the path is that of no file: give the path of the database file, such as data/app.db")]
    NotAFile,
    /// `:memory:`, also as a URL has it.
    #[error(
        "what is in memory has no file to replicate: give the path of a file, such as data/app.db; tests \
         have `Db::temporary`, with the feature `testing`"
    )]
    InMemory,
    /// A URL that says more than a file, or none of SQLite's.
    #[error(
        "it is a URL {0}: give the path alone, such as data/app.db; a file whose name looks like a URL is \
         written with ./ before it"
    )]
    Url(&'static str),
    /// The path is a symbolic link that points to no file.
    #[error("the path is a symbolic link to nothing")]
    DanglingLink,
    /// The bytes are not a SQLite database, or it is encrypted.
    #[error("the file is not a SQLite database")]
    NotADatabase,
    /// The directory can't be written.
    #[error("the directory can't be written: {0}")]
    ReadOnlyDirectory(String),
    /// The VFS has no shared memory for the wal-index, or not in the version needed.
    #[error("the file system or VFS has no shared memory")]
    NoSharedMemory,
    /// The file system is a network or FUSE one.
    #[error("{0} is a network or user-space file system, where SQLite's locks can't be trusted")]
    NetworkFileSystem(String),
    /// The state directory, or what has its name, is not for this database's owner alone. The text
    /// says what to do.
    #[error("the state directory is not private: {0}")]
    StateDirectory(&'static str),
    /// The directory of a member that keeps the lease's record is a copy, or comes from a backup.
    /// The member could vote twice. Nothing was changed: remove that directory, and the node joins
    /// anew.
    #[error(
        "the directory is a copy, or comes from a backup, which is never done with it: the member could vote \
         twice; remove it, and the node joins anew, as a new member"
    )]
    CopiedMember,
    /// The journal mode could not be turned to WAL.
    #[error("the journal mode stays {0:?}; it must be WAL")]
    NotWal(String),
}

/// What is wrong with a peer.
///
/// ```
/// use replite::{Error, PeerProblem};
///
/// fn is_misconfigured(error: &Error) -> bool {
///     let Error::Peer { problem, .. } = error else { return false };
///     matches!(problem, PeerProblem::Secret | PeerProblem::NotHttp2 | PeerProblem::Cluster(_))
/// }
/// # let _ = is_misconfigured;
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerProblem {
    /// It could not be reached, or the connection broke.
    #[error("connection failed: {0}")]
    Connection(String),
    /// It does not speak HTTP/2.
    #[error(
        "it does not speak HTTP/2: enable HTTP/2 (axum's `http2` feature) there, and in every proxy between"
    )]
    NotHttp2,
    /// It speaks TLS only, and this node, or the way to it, has none.
    #[error(
        "it speaks TLS only: build this node with the feature `tls`, or give that node \
         `Config::plaintext`, too"
    )]
    NeedsTls,
    /// It is built without TLS.
    #[error("it has no TLS: build that node with the feature `tls`, or give both nodes `Config::plaintext`")]
    NoTls,
    /// It takes this from members only, and this node is a follower: see
    /// [`Config::follower_secret`](crate::Config::follower_secret).
    #[error("it takes this from members only, and this node is a follower")]
    MembersOnly,
    /// Its key is shut out here: see [`Db::shut_out`](crate::Db::shut_out).
    #[error("its key {0} is shut out here")]
    ShutOut(PeerKey),
    /// At the address of a private channel is something else.
    #[error(
        "it speaks no TLS: `replite://` is for a node's own listener; an endpoint in an HTTP server has an \
         `http://` URL"
    )]
    NotPrivate,
    /// This node has certificates ([`Config::tls`](crate::Config::tls)), and the peer has none.
    #[error("it has no certificate, and this node has: give both nodes `Config::tls`, or neither")]
    NoCertificate,
    /// The peer has certificates, and this node has none.
    #[error("it takes peers with certificates only: give both nodes `Config::tls`, or neither")]
    NeedsCertificate,
    /// This node does not take its certificate. The text says why.
    #[error("its certificate is refused: {0}")]
    Certificate(String),
    /// It does not take this node's certificate. The text says why.
    #[error("it refuses this node's certificate: {0}")]
    CertificateRefused(String),
    /// Something else than replite answered.
    #[error("not a replite endpoint: status {status}, content type {content_type:?}, begins {begins:?}")]
    NotReplite {
        /// The HTTP status.
        status: u16,
        /// The content type.
        content_type: String,
        /// The first bytes of the body.
        begins: String,
    },
    /// It answers an empty 404, which says as little as it can.
    #[error(
        "an empty 404: its secret is another one, or no endpoint is mounted at this path; compare the \
         secrets of both nodes, and the URL"
    )]
    NotFound,
    /// The secret was not proved: the peers' secrets differ.
    #[error("it did not prove the cluster's secret: both nodes need a secret in common")]
    Secret,
    /// It proved a secret that is not valid here any more; see
    /// [`Db::rotate_secrets`](crate::Db::rotate_secrets).
    #[error("the secret that it proved is not valid here any more")]
    SecretDropped,
    /// It speaks another version of the protocol.
    #[error("it speaks protocol version {theirs}; this node speaks {ours}")]
    Version {
        /// Its version.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// It belongs to another cluster.
    #[error("it belongs to cluster {0:?}: give both nodes the same name by `Config::cluster`")]
    Cluster(String),
    /// It does not serve this database.
    #[error(
        "it does not serve database {0:?}: give both nodes the same name by `Config::database`; if that is \
         not set, it is the file's name without its extension"
    )]
    Database(String),
    /// It stands in an epoch that was superseded.
    #[error("it sent epoch {theirs}, but {ours} is known")]
    OldEpoch {
        /// Its epoch.
        theirs: String,
        /// The newer one.
        ours: String,
    },
    /// It is not the primary.
    #[error("it is not the primary")]
    NotPrimary,
    /// Another running process has this node's id: a data directory was copied, or is used twice.
    #[error(
        "another live process{} uses this node's id: stop it, or delete the node id beside the copied \
        database; if that is this node's own key (`Status::key`), a state directory is used twice",
        of_key(.0)
    )]
    DuplicateNode(Option<PeerKey>),
    /// It is another node than the one that is known to be there.
    #[error("it is node {0}, and not the one that is known to be there")]
    AnotherNode(NodeId),
    /// It refused for a reason of its own, such as too many streams.
    #[error("it refused: {0}")]
    Refused(String),
    /// It sent bytes that make no sense.
    #[error("bad bytes: {0}")]
    Garbled(String),
    /// Over the pages that are here, what it sent leads elsewhere than it states: the one or the
    /// other is wrong. A replica compares all of its pages with the primary's then.
    #[error("position mismatch: expected {expected}, found {found}")]
    Mismatch {
        /// What it states.
        expected: String,
        /// Where it leads.
        found: String,
    },
    /// It was silent for too long.
    #[error("nothing was heard for {0:?}")]
    Silent(Duration),
    /// It ended the stream with a reason.
    #[error("it ended the stream: {0}")]
    Goodbye(String),
}

fn of_key(key: &Option<PeerKey>) -> String {
    key.map_or_else(String::new, |key| format!(", of key {key},"))
}

/// A URL as it may stand in logs: without who logs in, and with what.
pub(crate) fn without_user(url: &str) -> String {
    let begin = url.find("//").map_or(0, |at| at + 2);
    let end = url[begin..].find(['/', '?', '#']).map_or(url.len(), |at| begin + at);
    match url[begin..end].rfind('@') {
        Some(at) => format!("{}…{}", &url[..begin], &url[begin + at..]),
        None => url.to_string(),
    }
}

/// A text of somebody else as it may stand in logs and problems: in one line, and of so many bytes
/// at most.
pub(crate) fn shown(text: &str, max_bytes: usize) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if out.len() >= max_bytes {
            out.push('…');
            break;
        }
        match c {
            c if is_plain(c) => out.push(c),
            '\n' | '\r' | '\t' => out.extend(c.escape_default()),
            c => out.extend(c.escape_unicode()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_shown_without_who_logs_in() {
        for (url, shown) in [
            ("postgres://app:hunter2@h/db?a=@", "postgres://…@h/db?a=@"),
            ("http://a@b:p@h:1", "http://…@h:1"),
            ("replite://h:1/@", "replite://h:1/@"),
            ("a.db", "a.db"),
            ("a@b/c.db", "…@b/c.db"),
        ] {
            assert_eq!(without_user(url), shown);
        }
    }
}
