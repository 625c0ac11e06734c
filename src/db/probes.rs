//! The service that answers probes.

use std::sync::{Arc, Weak};

use crate::db::Db;
#[cfg(feature = "prometheus")]
use crate::metrics::NodeFigures;
use crate::node::database::Database;
use crate::probes::{Probed, Probes};
use crate::status::{Health, Status};

impl Db {
    /// `/livez`, `/readyz` and `/healthz` as a service, and `/metrics` with the feature
    /// `prometheus`: what an orchestrator, a balancer and Prometheus ask. See [`Probes`].
    ///
    /// ```
    /// # #[cfg(feature = "axum")]
    /// fn app(db: &replite::Db, routes: axum::Router) -> axum::Router {
    ///     routes
    ///         .layer(db.replay_layer())
    ///         .merge(db.probes()) // after the layer, which they do without
    ///         .nest_service("/_replite", db.service())
    /// }
    /// # #[cfg(feature = "axum")]
    /// # let _ = app;
    /// ```
    ///
    /// From this call on [`Db::replay_layer`] lets `GET` and `HEAD` of these paths pass untouched,
    /// also where the service was put below it.
    pub fn probes(&self) -> Probes {
        self.inner.node.set_probed();
        let name = self.inner.node.database.clone();
        Probes::new(Arc::new(ProbedDatabase { name, database: Arc::downgrade(&self.inner.0) }))
    }
}

/// A database as its probes see it. They keep no database open.
#[derive(Debug)]
struct ProbedDatabase {
    name: String,
    database: Weak<Database>,
}

impl Probed for ProbedDatabase {
    fn database(&self) -> &str {
        &self.name
    }

    fn is_live(&self) -> bool {
        self.database.upgrade().is_some_and(|database| database.is_live())
    }

    fn health(&self) -> Option<(Health, Status)> {
        let database = self.database.upgrade()?;
        let status = database.status();
        Some((database.health(&status), status))
    }

    #[cfg(feature = "prometheus")]
    fn figures(&self) -> Option<NodeFigures> {
        self.database.upgrade().map(|database| database.figures())
    }
}
