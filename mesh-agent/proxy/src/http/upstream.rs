//! The upstream side of HTTP: from a request and its plan to an answer.
//!
//! The server side ([`super`]) decides where a request goes and what is changed about it; here an endpoint is chosen, a
//! connection to it is found or made, and the request is tried as often as its plan allows.
//!
//! - [`cluster`]: a destination's connections as one worker has them; [`pool`]: those to one endpoint; [`connect`] makes them, [`connection`]
//!   drives them, and [`endable`] lets it end what the HTTP library holds.
//! - [`attempt`]: one request from its first try to its answer; [`replay`] keeps its body, [`clock`] its time.
//!
//! Invariants:
//! - Every request gets exactly one [`Answer`]; what fails here fails as it would in Istio's proxy.
//! - Nothing of a body is gathered beyond what a retry may need.
//! - Dropping the future or the response's body ends the request at the endpoint.
//!
//! Not here: matching, rewriting, faults, and anything about the client's connection.

mod attempt;
mod clock;
mod cluster;
mod connect;
mod connection;
mod endable;
mod pool;
mod replay;
mod reply;
mod response;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
};

use hyper::Request;
use mesh_core::id::WorkloadId;

use self::{attempt::Exchange, cluster::Site, replay::Kept};
use super::{
    body::Body,
    exchange::{Answer, Plan},
};
use crate::{
    destination::{Destination, limits::Scope},
    worker::Worker,
};

/// Destinations that a worker keeps pools for.
const SITES_MAX: usize = 16_384;

/// What one worker knows of destinations.
#[derive(Debug, Default)]
pub(crate) struct Sites {
    all: RefCell<HashMap<Scope, Rc<Site>>>,
    kept: Kept,
    mirrors: Cell<u32>,
    draining: Cell<bool>,
}

/// Sends requests of a worker's pods.
#[derive(Clone)]
pub(crate) struct Upstreams {
    worker: Rc<Worker>,
}

impl Upstreams {
    /// Those of a worker.
    pub(crate) fn of(worker: &Rc<Worker>) -> Self {
        Self { worker: Rc::clone(worker) }
    }

    /// Sends a request and its copies as the plan says.
    ///
    /// Cancel safety: dropping the future ends the request.
    pub(crate) async fn send(&self, request: Request<Body>, plan: Plan) -> Answer {
        Exchange::new(&self.worker, plan).run(request).await
    }
}

impl Sites {
    /// The destination of a plan, for the plan's pod.
    fn site(&self, worker: &Worker, pod: u32, destination: &Destination) -> Rc<Site> {
        let endpoints = worker.destinations.of(worker, pod, destination);
        let mut all = self.all.borrow_mut();
        if let Some(site) = all.get(&endpoints.scope) {
            return Rc::clone(site);
        }
        if all.len() >= SITES_MAX {
            // Addresses come from apps: what nobody waits for makes room.
            all.retain(|_, site| Rc::strong_count(site) > 1);
        }
        let scope = endpoints.scope.clone();
        let site = Rc::new(Site::new(endpoints));
        all.insert(scope, Rc::clone(&site));
        site
    }

    /// Closes connections that nobody has used for long, and forgets destinations.
    pub(crate) fn sweep(&self, tick: u32) {
        self.all.borrow_mut().retain(|_, site| site.sweep(tick) || Rc::strong_count(site) > 1);
    }

    /// Closes a pod's connections once they are not in use.
    pub(crate) fn leave_pod(&self, pod: u32) {
        self.all
            .borrow()
            .values()
            .filter(|site| site.endpoints.scope.pod == pod)
            .for_each(|site| site.close());
    }

    /// Closes connections that nobody uses, now and from now on.
    pub(crate) fn drain(&self) {
        self.draining.set(true);
        self.all.borrow().values().for_each(|site| site.close());
    }

    /// A request waits for a connection to a workload's port, which has as many as it may: gives up one that nobody uses here.
    pub(crate) fn make_room_at(&self, server: WorkloadId, port: u16) -> bool {
        self.all.borrow().values().any(|site| site.evict_at(server, port))
    }

    /// A client of the workloads' own sides is gone: closes what was made for it.
    pub(crate) fn leave_client(&self, client: SocketAddr) {
        self.all.borrow().values().for_each(|site| site.leave_client(client));
    }

    /// Another worker waits for a connection to a destination: gives up one that nobody uses here.
    pub(crate) fn make_room(&self, scope: &Scope) {
        if let Some(site) = self.all.borrow().get(scope) {
            site.evict();
        }
    }
}
