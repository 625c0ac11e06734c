//! What a process has for its node as a whole: the listener of its own, and when it may go.

use std::sync::Arc;

use tokio_util::task::TaskTracker;

use crate::context::NodeContext;
use crate::members::MembersDoor;
use crate::net::Listener;
use crate::primary::ReplicaServer;
use crate::proxy::AppDoor;
use crate::server::{Mount, ReplicationService};

/// The node's own listener, which may be served before the node is complete. Dropped before
/// `leave_open`, it ends.
pub(crate) struct ListenerGuard {
    pub(crate) node: Arc<NodeContext>,
    pub(crate) replica_server: Arc<ReplicaServer>,
    members: MembersDoor,
    app: AppDoor,
    tracker: TaskTracker,
    listener: Option<Listener>,
    /// Whether there is one, which may be open by now.
    pub(crate) has_listener: bool,
    left_open: bool,
}

impl ListenerGuard {
    pub(crate) fn new(
        node: &Arc<NodeContext>,
        replica_server: &Arc<ReplicaServer>,
        (members, app): (&MembersDoor, &AppDoor),
        tracker: &TaskTracker,
        listener: Option<Listener>,
    ) -> ListenerGuard {
        let (node, replica_server, tracker) = (node.clone(), replica_server.clone(), tracker.clone());
        let has_listener = listener.is_some();
        let (members, app) = (members.clone(), app.clone());
        ListenerGuard {
            node,
            replica_server,
            members,
            app,
            tracker,
            listener,
            has_listener,
            left_open: false,
        }
    }

    pub(crate) fn open(&mut self) {
        let Some(listener) = self.listener.take() else { return };
        let ListenerGuard { node, replica_server, members, app, tracker, .. } = self;
        let service =
            ReplicationService::new(node.clone(), replica_server.clone(), tracker.clone(), Mount::Own);
        let service = service.with_members(members.clone()).with_app(app.clone());
        let (channel, of, stop) = (node.channel.clone(), tracker.clone(), node.stop.clone());
        tracker.spawn(listener.serve(channel, move |inside| service.on(inside), of, stop));
    }

    pub(crate) fn leave_open(&mut self) {
        self.left_open = true;
    }

    /// Returns when the address is free again.
    pub(crate) async fn close(mut self) {
        self.end();
        drop(self.listener.take());
        self.tracker.close();
        self.tracker.wait().await;
    }

    pub(crate) fn end(&self) {
        self.node.stop.cancel();
        self.replica_server.set(None);
    }
}

impl Drop for ListenerGuard {
    fn drop(&mut self) {
        if !self.left_open {
            self.end();
        }
    }
}
