//! DNS over TCP: one task per connection, queries answered in order.
//!
//! Invariants:
//! - At most so many connections a pod; more are reset.
//! - A client that sends nothing, or takes nothing, is let go after the idle time-out.

use std::{net::TcpStream as StdStream, rc::Rc, sync::Arc};

use tokio::{net::TcpStream, task::spawn_local, time::timeout};

use super::{Plan, Transport, forward, plan};
use crate::{
    metrics::DnsOutcome,
    stream,
    worker::{Pod, Worker},
};

/// Serves an accepted connection.
pub(crate) fn accept(worker: &Rc<Worker>, pod: &Arc<Pod>, socket: StdStream) {
    if !pod.dns_connections.enter() {
        worker.metrics().dns(DnsOutcome::Overloaded).inc();
        return stream::reset(socket);
    }
    let (worker, pod) = (Rc::clone(worker), Arc::clone(pod));
    // Not owned by anybody: it ends by its own time-outs, and there are only so many.
    drop(spawn_local(async move {
        let _entered = Entered(Arc::clone(&pod));
        if let Ok(mut stream) = TcpStream::from_std(socket) {
            serve(&worker, &pod, &mut stream).await;
        }
    }));
}

/// Answers until the client ends the stream, idles or misbehaves; how it ends matters to nobody.
async fn serve(worker: &Worker, pod: &Arc<Pod>, stream: &mut TcpStream) -> Option<()> {
    let client = stream.peer_addr().ok()?;
    let limit = worker.settings().dns.tcp_idle_timeout;
    loop {
        let query = timeout(limit, forward::read_message(stream)).await.ok()?.ok()?;
        let reply = match plan(worker, pod, &query, Transport::Tcp) {
            Plan::Ignore => return None,
            Plan::Reply(reply) => reply,
            Plan::Forward(question) => forward::ask(worker, pod, client, &question, Transport::Tcp).await,
        };
        timeout(limit, forward::write_message(stream, &reply)).await.ok()?.ok()?;
    }
}

/// Takes a connection off the pod's count.
struct Entered(Arc<Pod>);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.dns_connections.leave();
    }
}
