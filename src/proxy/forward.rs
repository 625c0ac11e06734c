//! Sending a request to the primary, wherever that turns out to be.

use std::ops::ControlFlow;
use std::time::Duration;

use http::Response;

use crate::context::RunningRequest;
use crate::proxy::body::{MadeBody, ReplayRequestBody};
use crate::proxy::channel::LineTarget;
use crate::proxy::connect::SendError;
use crate::proxy::dial::{Passage, Protocol};
use crate::proxy::exchange::{hinted, relay, request, without_path};
use crate::proxy::failure::{Failure, Outcome, Reason};
use crate::proxy::forwarded::Forwarded;
use crate::proxy::head::Head;
use crate::proxy::hop::{About, HOPS_MAX, Hint, Hop};
use crate::proxy::idle::IdleTimeoutBody;
use crate::proxy::intake::take_in;
use crate::proxy::locate::{HoldLimit, RequestTarget, find, look, superseded, wait};
use crate::proxy::redirect::redirect;
use crate::proxy::replay_body::Keep;
use crate::proxy::route::is_safe;
use crate::proxy::shared::LayerShared;
use crate::proxy::shares::Demand;
use crate::report::Condition;
use crate::txid::Epoch;

/// Tries at once on a further connection after one on which the request was not begun.
const STALE_MAX: u8 = 3;
/// The first pause before a primary is tried again that could not be reached; each is twice the one
/// before it.
const PAUSE_FIRST: Duration = Duration::from_millis(10);
/// And the longest.
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// Who sends a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sender {
    /// A client, through the layer: where this node is the primary, the request runs here.
    Client,
    /// The same after the handler ran here in vain, and left nothing to run it with.
    Again,
    /// This process itself: where this node is the primary, its own application is called like any
    /// other.
    Caller,
}

/// What becomes of a request.
pub(super) enum Verdict {
    /// It can run here, with this body; counted where that is because this node is the primary.
    Here(Keep, Option<RunningRequest>),
    /// It is answered.
    Answered(Box<Response<MadeBody>>),
    /// It could not be done.
    Failed(Reason),
}

/// Sends the request to the primary, holding it while there is none. Before that a body is taken in
/// that can be kept, and the request gets a place among those that are on their way.
///
/// It sends the request once more after a broken connection if its method is safe and it is
/// `repeatable`. What has to run on the primary may have effects, whatever its method.
pub(super) async fn forward(
    shared: &LayerShared,
    head: &Head,
    body: Keep,
    sender: Sender,
    repeatable: bool,
) -> Verdict {
    if !head.definite {
        return Verdict::Failed(Reason::Ambiguous);
    }
    let mut hold = HoldLimit::new(shared, head.client.share);
    // What this process makes itself may take its time, up to the idle limit, and so may a stream
    // of messages.
    let at_leisure = sender == Sender::Caller || head.is_grpc();
    body.hurry(if at_leisure { 0 } else { shared.options.least_rate });
    let mut trip = Trip::new(shared, head, body, repeatable);
    loop {
        let on_its_way = shared.node.forward();
        let Some(target) = trip.target() else {
            drop(on_its_way);
            if let Err(reason) = find(shared, &mut hold).await {
                return trip.failed_by(reason);
            }
            continue;
        };
        if sender == Sender::Client && target == RequestTarget::Here {
            match shared.node.request() {
                running @ Some(_) => {
                    trip.body.at_leisure();
                    return Verdict::Here(trip.body, running);
                }
                // It takes none any more since the look.
                None => continue,
            }
        }
        if sender != Sender::Caller
            && trip.hops == 1
            && !trip.taken_in
            && let Some(answer) = redirect(shared, head, &trip.body)
        {
            return Verdict::Answered(Box::new(answer));
        }
        if trip.hops > HOPS_MAX {
            return trip.failed_by(Reason::Apart);
        }
        if !trip.taken_in && !trip.body.is_whole() {
            // It is not on its way yet, and meanwhile another node may become the primary.
            drop(on_its_way);
            trip.taken_in = true;
            if let Err(reason) = take_in(shared, head, &trip.body).await {
                return trip.failed_by(reason);
            }
            // What its client took is not the time that it may be held.
            hold = HoldLimit::new(shared, head.client.share);
            continue;
        }
        if let ControlFlow::Break(verdict) = trip.visit(target).await {
            return verdict;
        }
        drop(on_its_way);
        if let Some((pause, reason)) = trip.rest.take() {
            match wait(shared, &mut hold, pause).await {
                Ok(true) => {}
                Ok(false) => return trip.failed_by(reason),
                Err(too_many) => return trip.failed_by(too_many),
            }
        }
    }
}

/// A request on its way, and what may still be tried.
struct Trip<'a> {
    shared: &'a LayerShared,
    head: &'a Head,
    body: Keep,
    /// The node that is asked now is the first, second, ... of all that the request was sent to.
    hops: u8,
    /// The node does not speak HTTP/2, which was only wished for.
    http1: bool,
    stale: u8,
    /// How often the request may be sent again though it may have run.
    again: u8,
    /// A connection broke while it may have run.
    broke: bool,
    /// Where another node said to go.
    next: Option<RequestTarget>,
    /// How long the next pause is.
    pause: Duration,
    /// A pause that is due, and what is said when it is the last one.
    rest: Option<(Duration, Reason)>,
    /// Of the body as much came in as was to.
    taken_in: bool,
    /// It was reported that the primary can't be reached.
    unreachable: bool,
    /// It was reported that two nodes disagree on the primary.
    disputed: bool,
    /// This node forwards on the private channel.
    on_channel: bool,
    /// The application that is reached by its address all the same.
    by_address: Option<String>,
    /// It was reported that the channel is not served.
    unserved: bool,
}

type Step = ControlFlow<Verdict>;

impl<'a> Trip<'a> {
    fn new(shared: &'a LayerShared, head: &'a Head, body: Keep, repeatable: bool) -> Trip<'a> {
        Trip {
            shared,
            head,
            body,
            hops: head.came.saturating_add(1),
            http1: false,
            stale: STALE_MAX,
            again: u8::from(repeatable && is_safe(&head.method)),
            broke: false,
            next: None,
            pause: PAUSE_FIRST,
            rest: None,
            taken_in: false,
            unreachable: false,
            disputed: false,
            on_channel: shared.forwards_on_channel(),
            by_address: None,
            unserved: false,
        }
    }

    /// Where to go: where another node said, until this one itself knows as new a primary.
    fn target(&mut self) -> Option<RequestTarget> {
        match (self.next.take(), look(self.shared)) {
            (Some(hinted), Some(known)) if !known.is_as_new_as(&hinted) => Some(hinted),
            (hinted, known) => known.or(hinted),
        }
    }

    async fn visit(&mut self, target: RequestTarget) -> Step {
        let shared = self.shared;
        // What waits for its client must not take the places of what does not.
        let demand = if self.body.is_whole() { Demand::All } else { Demand::Unreserved };
        let Some(place) = shared.forwards.place(self.head.client.share, demand) else {
            self.rest(Reason::TooManyForwarded);
            self.next = hinted_at(target);
            return ControlFlow::Continue(());
        };
        if target == RequestTarget::Here
            && let Some(step) = self.call_here().await
        {
            return step;
        }
        let (url, hop) = match &target {
            RequestTarget::There { url, epoch, .. } => (url.as_str(), Some((*epoch, self.hop(*epoch)))),
            RequestTarget::Here => (shared.node.me.addresses.app.as_str(), None),
        };
        let line = self.line(&target);
        let passage = match (&line, shared.app.lines()) {
            (Some(line), Some(lines)) => Passage::Channel(lines, line),
            _ if self.head.protocol != Protocol::Http1 && !self.http1 => Passage::Http2,
            _ => Passage::Http1,
        };
        let on_channel = matches!(passage, Passage::Channel(..));
        // On the channel the application's own path is the request's, and it needs no address.
        let base = match without_path(url) {
            "" if on_channel => "http://localhost",
            host if on_channel => host,
            _ => url,
        };
        let request = match request(self.head, !on_channel, base, hop.as_ref().map(|(_, text)| text.as_str()))
        {
            Ok(request) => request,
            Err(error) => {
                shared.node.report(Condition::AppAddressInvalid { error: &error, url });
                return self.fail(Reason::Unreachable);
            }
        };
        let (idle, answer) = (shared.options.idle_timeout, shared.options.response_timeout);
        let sent = shared.dialer.send(request, passage, &self.body, idle, answer);
        let sent = tokio::select! {
            biased;
            sent = sent => sent,
            () = superseded(shared, &target) => Err(SendError::Superseded),
        };
        let (response, on_line) = match sent {
            Ok(sent) => sent,
            Err(error) => return self.failed(target, error),
        };
        if let Some((epoch, hop)) = hop
            && let Some(hint) = hinted(&response, shared, &hop)
        {
            return self.misdirected(target, epoch, hint);
        }
        self.body.release();
        ControlFlow::Break(Verdict::Answered(Box::new(relay(shared, self.head, response, place, on_line))))
    }

    /// Where a request goes on the private channel, if it goes there.
    fn line(&self, target: &RequestTarget) -> Option<LineTarget> {
        let RequestTarget::There { url, replication, run, .. } = target else { return None };
        let on_channel = self.on_channel && self.by_address.as_ref() != Some(url);
        on_channel.then(|| LineTarget { url: replication.clone(), run: *run })
    }

    /// Calls this node's own application, where it was given: not over the network, which would
    /// take this node for the client.
    async fn call_here(&mut self) -> Option<Step> {
        let (shared, head) = (self.shared, self.head);
        let (idle, limit) = (shared.options.idle_timeout, shared.options.response_timeout);
        if !shared.app.serves() {
            return None;
        }
        if head.upgrade.is_some() {
            return Some(self.fail(Reason::NoPrimary));
        }
        let url = without_path(shared.node.me.addresses.app.as_str());
        let url = if url.is_empty() { "http://localhost" } else { url };
        let Ok(request) = request(head, false, url, None) else { return Some(self.fail(Reason::Ambiguous)) };
        let body = IdleTimeoutBody::new(ReplayRequestBody::kept(self.body.clone()), Some(idle));
        let forwarded = Forwarded::here(head.client.address, head.scheme, shared.node.me.node);
        let answer = shared.app.answer_here(request.map(|()| body), forwarded)?;
        let answered = match tokio::time::timeout(limit, answer).await {
            Ok(Ok(response)) => {
                self.body.release();
                Verdict::Answered(Box::new(response.map(MadeBody::App)))
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "this node's own application has no answer");
                Verdict::Failed(Reason::Broken)
            }
            Err(_) => Verdict::Failed(Reason::NoAnswer),
        };
        Some(ControlFlow::Break(answered))
    }

    /// The proof that the request comes from this node.
    fn hop(&self, epoch: Epoch) -> String {
        let about = About {
            keys: &self.shared.node.keys,
            tag: self.shared.tokens.tag(),
            method: &self.head.method,
            target: &self.head.target,
        };
        let hop = Hop {
            count: self.hops,
            from: self.shared.node.me.node,
            epoch,
            client: self.head.client.address,
            scheme: self.head.scheme,
            taken_by: self.head.taken_by,
        };
        hop.text(about)
    }

    /// The node that was asked does not lead, or not any more, and has done nothing.
    fn misdirected(&mut self, asked: RequestTarget, epoch: Epoch, hint: Hint) -> Step {
        let shared = self.shared;
        // The epoch in which this node is about to lead is its own.
        let here = !hint.url.is_empty() && hint.url == shared.node.me.addresses.app;
        if !here {
            shared.node.hear_aside(hint.epoch.number());
        }
        if hint.url.is_empty() || here {
            // It knows no better, or is about to lead itself; or this node is.
            self.rest(Reason::NoPrimary);
            return self.retry(asked, Reason::BodyTooLarge);
        }
        if self.hops == HOPS_MAX {
            return self.fail(Reason::Loop);
        }
        if hint.epoch.number() > epoch.number() {
            self.hops += 1;
            let Hint { epoch, url, replication } = hint;
            self.next = Some(RequestTarget::There { url, replication, epoch, run: None });
            return self.recall(Reason::BodyTooLarge);
        }
        // One of the two nodes has not heard yet who leads.
        if !self.disputed {
            shared.node.report(Condition::PrimaryDisputed { asked: &asked, hint: &hint });
            self.disputed = true;
        }
        self.rest(Reason::Loop);
        self.retry(asked, Reason::BodyTooLarge)
    }

    /// A pause before the next try.
    fn rest(&mut self, reason: Reason) {
        self.rest = Some((self.pause, reason));
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    fn failed(&mut self, target: RequestTarget, error: SendError) -> Step {
        match error {
            SendError::NoHttp2(error) if !self.http1 && self.head.protocol == Protocol::Http2IfSpoken => {
                tracing::debug!(%error, ?target, "the request goes in HTTP/1.1");
                self.http1 = true;
                self.retry(target, Reason::Unreachable)
            }
            SendError::NotBegun(error) if self.stale > 0 => {
                tracing::debug!(
                    %error,
                    ?target,
                    "a connection was closed before the request was begun; another is tried"
                );
                self.stale -= 1;
                self.retry(target, Reason::Unreachable)
            }
            SendError::NotBegun(error) | SendError::NoHttp2(error) | SendError::Unreachable(error) => {
                if !self.unreachable {
                    let unreachable = Condition::PrimaryUnreachable { error: &*error, target: &target };
                    self.shared.node.report(unreachable);
                    self.unreachable = true;
                }
                self.http1 = false;
                self.rest(Reason::Unreachable);
                self.retry(target, Reason::Unreachable)
            }
            SendError::NotServed => self.unserved(target),
            SendError::BadHost => self.fail(Reason::Ambiguous),
            SendError::SlowClient => self.fail(Reason::SlowClient),
            SendError::BadBody(error) => {
                // Not louder: any client can do this.
                tracing::debug!(error = &*error as &dyn std::error::Error, ?target, "a request's body broke");
                self.fail(Reason::BadBody)
            }
            SendError::NoAnswer => {
                self.shared.node.report(Condition::PrimarySilent { target: &target });
                self.fail(Reason::NoAnswer)
            }
            SendError::Superseded => {
                self.shared.node.report(Condition::PrimarySuperseded { target: &target });
                self.break_off(target)
            }
            SendError::Broken(error) => {
                self.shared.node.report(Condition::PrimaryBroke { error: &*error, target: &target });
                self.break_off(target)
            }
        }
    }

    /// The node there has not been given its application yet, or never will be.
    fn unserved(&mut self, target: RequestTarget) -> Step {
        let RequestTarget::There { url, .. } = &target else { return self.fail(Reason::Unreachable) };
        if self.shared.options.clear || url.starts_with("https:") {
            self.by_address = Some(url.clone());
        } else {
            if !self.unserved {
                self.shared.node.report(Condition::ForwardsNotServed { target: &target });
                self.unserved = true;
            }
            self.rest(Reason::Unreachable);
        }
        self.retry(target, Reason::Unreachable)
    }

    /// What may have run is sent again only where that changes nothing.
    fn break_off(&mut self, target: RequestTarget) -> Step {
        self.broke = true;
        if self.again == 0 {
            return self.fail(Reason::Broken);
        }
        self.again -= 1;
        self.retry(target, Reason::Broken)
    }

    /// Another try. It looks up again where to, because another node may lead by then, or the
    /// primary has said that it takes no more. It keeps an address that another node gave.
    fn retry(&mut self, target: RequestTarget, or: Reason) -> Step {
        self.next = hinted_at(target);
        self.recall(or)
    }

    /// Takes the body back for another try.
    fn recall(&mut self, or: Reason) -> Step {
        match self.body.recall() {
            Some(body) => {
                self.body = body;
                ControlFlow::Continue(())
            }
            None => self.fail(or),
        }
    }

    fn fail(&self, reason: Reason) -> Step {
        ControlFlow::Break(self.failed_by(reason))
    }

    /// What is said in the end. After a connection that broke, this node does not know any more
    /// that the request did not run.
    fn failed_by(&self, reason: Reason) -> Verdict {
        let forgets = self.broke && Failure::new(reason).outcome == Outcome::NotExecuted;
        Verdict::Failed(if forgets { Reason::Broken } else { reason })
    }
}

/// The address again, if another node gave it.
fn hinted_at(target: RequestTarget) -> Option<RequestTarget> {
    Some(target).filter(|to| matches!(to, RequestTarget::There { run: None, .. }))
}
