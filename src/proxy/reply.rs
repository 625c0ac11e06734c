//! What a local handler's response gets from its session: the token, as header and cookie.

use std::time::Duration;

use http::header::CACHE_CONTROL;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};

use crate::context::Counting;
use crate::proxy::failure::Outcome;
use crate::proxy::headers::{LOST, OUTCOME, TOKEN, add_cookie};
use crate::proxy::route::is_safe;
use crate::proxy::shared::{Cookie, LayerShared, SameSite, SessionTokens};
use crate::session::Session;
use crate::token::Token;
use crate::txid::{Place, Txid};

/// For how long a response waits until the position has what its token is to name. A disk that
/// takes longer than that holds up writes, too.
const COUNTING_MAX: Duration = Duration::from_secs(5);

/// A request that runs here as one of those that write. Its handler may do that by a connection
/// that tells its session nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum MayWrite {
    No,
    Yes,
    /// It is a replayed one with a safe method: it wrote something if the position, which had all
    /// there was when it began, is not this one any more.
    Since(Txid),
}

impl MayWrite {
    /// Of a request that another node sent, which begins now.
    pub(super) fn sent_here(shared: &LayerShared, method: &Method) -> MayWrite {
        let settled = || match shared.node.counting() {
            None => shared.node.applied.position(),
            Some(_) => None,
        };
        match is_safe(method).then(settled).flatten() {
            Some(at) => MayWrite::Since(at.txid()),
            None => MayWrite::Yes,
        }
    }
}

/// What a response's token names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TokenReach {
    /// What the session knows.
    Told,
    /// And this commit of the node's own writer, the last one that there is.
    Ours(Txid),
    /// And all that the handler may have read.
    Read,
    /// And all that was committed, by whatever connection.
    Committed,
    /// The same, unless that ends where it did when the handler began.
    CommittedSince(Txid),
}

impl TokenReach {
    /// Of the response of a handler that is done.
    pub(super) fn of(shared: &LayerShared, session: &Session, writes: MayWrite) -> TokenReach {
        if shared.options.session == SessionTokens::Monotonic {
            return TokenReach::Read;
        }
        if session.wrote_past() {
            return TokenReach::Committed;
        }
        // Another database's layer got the response of another node, which named its own.
        if writes == MayWrite::No || session.sent() {
            return TokenReach::Told;
        }
        match (writes, session.committed(), shared.node.last_of_ours()) {
            (MayWrite::Since(before), None, Some(last)) if last <= before => TokenReach::Told,
            (_, _, Some(last)) => TokenReach::Ours(last),
            (MayWrite::Since(before), None, None) => TokenReach::CommittedSince(before),
            (_, _, None) => TokenReach::Committed,
        }
    }
}

/// What has to be waited for before the token of a response can name that: what the handler has
/// just read, or another connection has written, may not be counted yet. The wait has a limit.
pub(super) fn counting(shared: &LayerShared, reach: TokenReach) -> Option<Counting> {
    let waits = match reach {
        TokenReach::Told | TokenReach::Ours(_) => false,
        // Capture goes on after the lease has ended.
        TokenReach::Read => true,
        TokenReach::Committed | TokenReach::CommittedSince(_) => !shared.node.is_fenced(),
    };
    if !waits {
        return None;
    }
    let counting = shared.node.counting()?;
    Some(Box::pin(async { tokio::time::timeout(COUNTING_MAX, counting).await.unwrap_or(false) }))
}

/// Puts on a local handler's response what its session says, and what else its token is to name.
pub(super) fn complete(
    shared: &LayerShared,
    session: &Session,
    secure: bool,
    reach: TokenReach,
    status: StatusCode,
    headers: &mut HeaderMap,
) {
    set_outcome(session, status, headers);
    set_lost(session, headers);
    set_token(shared, session, secure, reach, headers);
}

/// Says of a response that tells of a failure what is known of the outcome.
fn set_outcome(session: &Session, status: StatusCode, headers: &mut HeaderMap) {
    let unknown = session.outcome_unknown();
    let says_not = headers.get(OUTCOME).is_some_and(|o| o == Outcome::NotExecuted.as_str());
    // An error's response can't know what was committed before it, to this or another database:
    // sending again would not be safe.
    if says_not && (unknown || session.committed_anywhere()) || unknown && status.is_server_error() {
        headers.insert(OUTCOME, HeaderValue::from_static(Outcome::Unknown.as_str()));
    }
}

/// Says that the request's token counted as absent, because its transaction was lost.
fn set_lost(session: &Session, headers: &mut HeaderMap) {
    if let Some(value) = session.lost_token().and_then(|lost| HeaderValue::from_str(lost.as_str()).ok())
        && !headers.get_all(LOST).iter().any(|said| *said == value)
    {
        // Beside those of other databases.
        headers.append(LOST, value);
    }
}

/// The newest transaction that a read here may have seen. A write that can't be vouched for may not
/// be told, nor what comes after it.
///
/// After the lease has ended no other node may ever have it. Its token is of use all the same: the
/// others wait until they have it, or know that it is lost, and then say so. Without it the client
/// would go back in time and not know.
fn read(shared: &LayerShared, session: &Session) -> Option<Txid> {
    let at = shared.node.applied.position()?;
    (!session.outcome_unknown()).then(|| at.txid())
}

/// The newest transaction, if it was committed while this node had the lease, or has been vouched
/// for since.
fn vouched(shared: &LayerShared, session: &Session) -> Option<Txid> {
    let at = read(shared, session)?;
    // Looked at last: what was here before the lease ended is no more than what was sent to others.
    (!shared.node.is_fenced()).then_some(at)
}

/// The newest transaction that the response's token names.
fn newest(shared: &LayerShared, session: &Session, reach: TokenReach) -> Option<Txid> {
    // A node that leads no more may have taken over a history without what was written here.
    let committed = || vouched(shared, session).filter(|_| shared.node.leads());
    session.seen().max(match reach {
        TokenReach::Told => None,
        TokenReach::Ours(last) => Some(last).filter(|_| vouched(shared, session).is_some()),
        TokenReach::Read => read(shared, session),
        TokenReach::Committed => committed(),
        TokenReach::CommittedSince(before) => committed().filter(|at| *at != before),
    })
}

/// Sets the token of what the request committed, waited for, or read.
fn set_token(
    shared: &LayerShared,
    session: &Session,
    secure: bool,
    reach: TokenReach,
    headers: &mut HeaderMap,
) {
    let committed = session.committed();
    let Some(newest) = newest(shared, session, reach) else { return };
    let place = |txid| shared.node.applied.place(txid);
    let known = session.request_token().map(Token::txid);
    if committed.is_none() && known.is_some_and(|txid| place(txid) == Place::Unknown) {
        // It may be newer than all that is known here: its client keeps it.
        return;
    }
    // A token from a lost branch must not outlive it, however high its number is.
    let known = known.filter(|txid| place(*txid) == Place::OnHistory);
    if committed.is_none() && known >= Some(newest) {
        return;
    }
    let newest = known.map_or(newest, |known| known.max(newest));
    let Some(token) = shared.tokens.sign(newest) else { return };
    // A response of another node's, which another database's layer got, may carry one of this
    // database already.
    let mine = |value: &HeaderValue| value.to_str().ok().and_then(|text| shared.tokens.verify(text));
    let (old, others): (Vec<_>, Vec<_>) =
        headers.get_all(TOKEN).iter().cloned().partition(|v| mine(v).is_some());
    if old.iter().filter_map(mine).any(|old| old.txid() >= token.txid()) {
        return;
    }
    let Ok(value) = HeaderValue::from_str(token.as_str()) else { return };
    headers.insert(TOKEN, value);
    for other in others {
        headers.append(TOKEN, other);
    }
    let cookie = &shared.options.cookie;
    if let Some(name) = &cookie.name
        && make_private(headers)
        && let Ok(value) = HeaderValue::from_str(&cookie_text(cookie, name, &token, secure))
    {
        add_cookie(headers, value);
    }
}

/// What a header says of caches that many clients share.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    Wanted,
    Forbidden,
    /// Nothing: some caches would share it, and may be told not to.
    Open,
}

/// Keeps shared caches from giving one client's cookie to others. False when the app wants the
/// response shared: then there must be no cookie on it.
///
/// Beside `Cache-Control` there are headers for some caches only, which go before it there. They
/// are RFC 9213's `CDN-Cache-Control` and its kin, which all end like that, and older ones.
fn make_private(headers: &mut HeaderMap) -> bool {
    let mut open = Vec::new();
    for name in headers.keys() {
        match sharing(name, headers) {
            Some(Sharing::Wanted) => return false,
            Some(Sharing::Open) => open.push(name.clone()),
            Some(Sharing::Forbidden) | None => {}
        }
    }
    if !headers.contains_key(CACHE_CONTROL) {
        open.push(CACHE_CONTROL);
    }
    for name in open {
        let word = if name == CACHE_CONTROL { "private" } else { "no-store" };
        headers.append(name, HeaderValue::from_static(word));
    }
    true
}

/// None for a header that is not about caches.
fn sharing(name: &HeaderName, headers: &HeaderMap) -> Option<Sharing> {
    let targeted = match name.as_str() {
        "cache-control" => false,
        // Seconds, or an instant after an `@`; nginx's.
        "x-accel-expires" => {
            let off = headers.get_all(name).iter().all(|value| value.as_bytes().trim_ascii() == b"0");
            return Some(if off { Sharing::Forbidden } else { Sharing::Wanted });
        }
        "surrogate-control" | "edge-control" => true,
        name if name.ends_with("-cache-control") => true,
        _ => return None,
    };
    let (mut wanted, mut forbidden, mut off) = (false, false, false);
    for directive in headers.get_all(name).iter().flat_map(|v| v.as_bytes().split(|b| *b == b',')) {
        let directive = directive.trim_ascii();
        let is = |word: &str| {
            let name = directive.split(|b| *b == b'=').next().unwrap_or_default();
            name.trim_ascii().eq_ignore_ascii_case(word.as_bytes())
        };
        wanted |= is("public") || is("s-maxage");
        forbidden |= is("private") || is("no-store");
        off |= is("no-cache") || directive.eq_ignore_ascii_case(b"max-age=0");
    }
    Some(match (wanted, forbidden) {
        (true, _) => Sharing::Wanted,
        (_, true) => Sharing::Forbidden,
        // An app that speaks to shared caches by name means that they store it.
        _ if targeted && !off => Sharing::Wanted,
        _ => Sharing::Open,
    })
}

fn cookie_text(cookie: &Cookie, name: &str, token: &Token, secure: bool) -> String {
    let same_site = match cookie.same_site {
        SameSite::Lax => "Lax",
        SameSite::Strict => "Strict",
        SameSite::None => "None",
    };
    let (path, age) = (&cookie.path, cookie.max_age.as_secs());
    let secure = if cookie.secure.unwrap_or(secure) { "; Secure" } else { "" };
    format!("{name}={token}; Max-Age={age}; Path={path}; HttpOnly; SameSite={same_site}{secure}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_with_a_cookie_is_private_unless_the_app_said_otherwise() {
        for (before, cookie, after) in [
            (None, true, vec!["private"]),
            (Some("max-age=60"), true, vec!["max-age=60", "private"]),
            (Some("no-store"), true, vec!["no-store"]),
            (Some("Private, max-age=1"), true, vec!["Private, max-age=1"]),
            (Some("max-age=1, PUBLIC"), false, vec!["max-age=1, PUBLIC"]),
            (Some("s-maxage=9"), false, vec!["s-maxage=9"]),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(before) = before {
                headers.insert(CACHE_CONTROL, HeaderValue::from_static(before));
            }
            assert_eq!(make_private(&mut headers), cookie, "{before:?}");
            assert_eq!(headers.get_all(CACHE_CONTROL).iter().collect::<Vec<_>>(), after);
        }
    }

    #[test]
    fn headers_for_some_shared_caches_count_like_the_one_for_all() {
        for name in [
            "cdn-cache-control",
            "cloudflare-cdn-cache-control",
            "vercel-cdn-cache-control",
            "netlify-cdn-cache-control",
            "akamai-cache-control",
            "x-litespeed-cache-control",
            "surrogate-control",
            "edge-control",
            "x-accel-expires",
        ] {
            let accel = name == "x-accel-expires";
            for (value, cookie, appended) in [
                (if accel { "60" } else { "max-age=60" }, false, false),
                (if accel { "@1800000000" } else { "max-age=60, stale-while-revalidate=9" }, false, false),
                (if accel { "0" } else { "no-store" }, true, false),
                (if accel { "0" } else { "max-age=0" }, true, !accel),
            ] {
                let mut headers = HeaderMap::new();
                headers.insert(CACHE_CONTROL, HeaderValue::from_static("private"));
                headers.insert(name, HeaderValue::from_static(value));
                assert_eq!(make_private(&mut headers), cookie, "{name}: {value}");
                let mut expected = vec![value];
                expected.extend(appended.then_some("no-store"));
                assert_eq!(headers.get_all(name).iter().collect::<Vec<_>>(), expected, "{name}");
                assert_eq!(headers.get_all(CACHE_CONTROL).iter().collect::<Vec<_>>(), ["private"]);
            }
        }
    }
}
