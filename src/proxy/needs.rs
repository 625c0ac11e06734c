//! What a handler's response says of the primary: that its request needs it.

use std::error::Error as StdError;

use http::Response;

use crate::error::Error;
use crate::peer::NodeId;
use crate::proxy::shared::LayerShared;
use crate::session::Session;

/// A mark on a response, in its extensions: the handler could not do what the request asks for,
/// because this node is not the primary. The replay layer then sends the request to the primary,
/// and drops the response, as it does when [`Db::write`](crate::Db::write) fails on the request's
/// task.
///
/// With the feature `axum` the response that axum makes of an [`Error`] has the mark by itself.
/// Other responses are marked by the application: those of another framework, and those that it
/// makes of errors of its own. It does not matter which thread or task found out.
///
/// The layer sends nothing on when the request's session committed something, and not from a node
/// that is the primary. To mark a response that came from a write of another library, see
/// [`ReplayLayer::replay_when`](crate::ReplayLayer::replay_when).
///
/// ```
/// use axum::http::StatusCode;
/// use axum::response::{IntoResponse, Response};
/// use replite::{Error, NeedsPrimary};
///
/// /// The application's error, such as a thread that owns the database sends it back.
/// struct AppError(Box<dyn std::error::Error + Send + Sync>);
///
/// impl IntoResponse for AppError {
///     fn into_response(self) -> Response {
///         let mut response = (StatusCode::INTERNAL_SERVER_ERROR, "sorry").into_response();
///         if let Some(mark) = NeedsPrimary::of(&*self.0) {
///             response.extensions_mut().insert(mark);
///         }
///         response
///     }
/// }
/// # let marked = AppError(Box::new(Error::NotPrimary { primary: None })).into_response();
/// # assert!(marked.extensions().get::<NeedsPrimary>().is_some());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NeedsPrimary {
    primary: Option<NodeId>,
}

impl NeedsPrimary {
    /// The mark of a response for which there is no error of ours. Below the layers of several
    /// databases it means that of the innermost one which is not the primary.
    pub fn new() -> NeedsPrimary {
        NeedsPrimary::default()
    }

    /// The mark for an error that is [`Error::NotPrimary`], or whose sources lead to that one. None
    /// for any other. An error that hides the one inside of it, such as a transparent one or
    /// [`std::io::Error`], leads past it: give the one inside.
    pub fn of(error: &(dyn StdError + 'static)) -> Option<NeedsPrimary> {
        match error.downcast_ref() {
            Some(Error::NotPrimary { primary }) => {
                Some(NeedsPrimary { primary: primary.as_ref().map(|primary| primary.node) })
            }
            // What is below another error of ours is about something else.
            Some(_) => None,
            None => NeedsPrimary::of(error.source()?),
        }
    }

    #[cfg(feature = "axum")]
    pub(crate) fn primary(&self) -> Option<NodeId> {
        self.primary
    }
}

/// Reports to the session what a handler's response says. The mark is for the innermost layer,
/// which knows all sessions. `led`: this node was the primary when the handler began.
pub(super) fn heed<B>(
    shared: &LayerShared,
    session: &Session,
    led: bool,
    mut response: Response<B>,
) -> Response<B> {
    if let Some(NeedsPrimary { primary }) = response.extensions_mut().remove()
        && !session.answered_needy(primary)
        && !led
    {
        // It has become the primary since.
        session.need_primary();
    }
    // On a primary the same response may come after a write that went well.
    let Some(needs) = shared.options.replay_when.as_ref().filter(|_| !led) else { return response };
    let (parts, body) = response.into_parts();
    if needs(&parts) {
        session.need_primary();
    }
    Response::from_parts(parts, body)
}
