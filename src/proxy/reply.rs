//! What a local handler's response gets from its session: the token, as header and cookie.

use http::header::CACHE_CONTROL;
use http::{HeaderMap, HeaderValue, StatusCode};

use crate::proxy::failure::Outcome;
use crate::proxy::headers::{OUTCOME, TOKEN, add_cookie};
use crate::proxy::layer::{Cookie, SameSite, SessionTokens, Shared};
use crate::session::Session;
use crate::token::Token;
use crate::txid::Place;

/// Says of a response that tells of a failure what is known of the outcome.
pub(super) fn set_outcome(session: &Session, status: StatusCode, headers: &mut HeaderMap) {
    let unknown = session.outcome_unknown();
    let says_not = headers.get(OUTCOME).is_some_and(|o| o == Outcome::NotExecuted.as_str());
    // An error's response can't know what was committed before it: sending again would not be safe.
    if says_not && (unknown || session.committed().is_some()) || unknown && status.is_server_error() {
        headers.insert(OUTCOME, HeaderValue::from_static(Outcome::Unknown.as_str()));
    }
}

/// Sets the token of what the request committed, waited for, or read.
pub(super) fn set_token(shared: &Shared, session: &Session, secure: bool, headers: &mut HeaderMap) {
    let committed = session.committed();
    let newest = match shared.options.session {
        SessionTokens::Writes => session.seen(),
        SessionTokens::Monotonic => session.seen().max(shared.node.applied.position().map(|p| p.txid())),
    };
    let Some(newest) = newest else { return };
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
    let token = shared.tokens.sign(known.map_or(newest, |known| known.max(newest)));
    let Ok(value) = HeaderValue::from_str(token.as_str()) else { return };
    headers.insert(TOKEN, value);
    let cookie = &shared.options.cookie;
    if let Some(name) = &cookie.name
        && make_private(headers)
        && let Ok(value) = HeaderValue::from_str(&cookie_text(cookie, name, &token, secure))
    {
        add_cookie(headers, value);
    }
}

/// Keeps shared caches from giving one client's cookie to others. False when the app wants the response shared:
/// then there must be no cookie on it.
fn make_private(headers: &mut HeaderMap) -> bool {
    let mut said = false;
    for value in headers.get_all(CACHE_CONTROL) {
        let text = value.to_str().unwrap_or_default();
        for directive in text.split(',') {
            let name = directive.split('=').next().unwrap_or_default().trim();
            if name.eq_ignore_ascii_case("public") || name.eq_ignore_ascii_case("s-maxage") {
                return false;
            }
            said |= ["private", "no-store"].iter().any(|word| name.eq_ignore_ascii_case(word));
        }
    }
    if !said {
        headers.append(CACHE_CONTROL, HeaderValue::from_static("private"));
    }
    true
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
}
