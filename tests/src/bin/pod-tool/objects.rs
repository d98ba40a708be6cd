//! The sockets, servers, captures and loads of this process, by id.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_tests::protocol::{CallFailure, Reply, SocketId};
use socket2::Socket;

use crate::capture::Capture;
use crate::client;
use crate::load::LoadRun;
use crate::server::Server;

/// What an id can stand for.
#[derive(Debug)]
enum Object {
    Socket(Arc<Socket>),
    Server(Arc<Server>),
    Capture(Arc<Capture>),
    Load(Arc<LoadRun>),
}

/// All objects of the process.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    next: AtomicU64,
    by_id: Mutex<HashMap<SocketId, Object>>,
}

impl Objects {
    pub(crate) fn add_opened(&self, socket: Socket) -> Result<Reply, CallFailure> {
        let local = client::names(&socket).local;
        Ok(self.opened(Object::Socket(Arc::new(socket)), local))
    }

    pub(crate) fn add_server(&self, server: Arc<Server>) -> Result<Reply, CallFailure> {
        let local = server.local();
        Ok(self.opened(Object::Server(server), Some(local)))
    }

    pub(crate) fn add_capture(&self, capture: Arc<Capture>) -> Result<Reply, CallFailure> {
        Ok(self.opened(Object::Capture(capture), None))
    }

    pub(crate) fn add_load(&self, load: Arc<LoadRun>) -> Reply {
        self.opened(Object::Load(load), None)
    }

    fn opened(&self, object: Object, local: Option<SocketAddr>) -> Reply {
        let socket = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.by_id).insert(socket, object);
        Reply::Opened { socket, local }
    }

    pub(crate) fn socket(&self, id: SocketId) -> Result<Arc<Socket>, CallFailure> {
        match lock(&self.by_id).get(&id) {
            Some(Object::Socket(socket)) => Ok(Arc::clone(socket)),
            _ => Err(unknown(id)),
        }
    }

    pub(crate) fn take_socket(&self, id: SocketId) -> Result<Arc<Socket>, CallFailure> {
        match lock(&self.by_id).remove(&id) {
            Some(Object::Socket(socket)) => Ok(socket),
            _ => Err(unknown(id)),
        }
    }

    pub(crate) fn server(&self, id: SocketId) -> Result<Arc<Server>, CallFailure> {
        match lock(&self.by_id).get(&id) {
            Some(Object::Server(server)) => Ok(Arc::clone(server)),
            _ => Err(unknown(id)),
        }
    }

    pub(crate) fn capture(&self, id: SocketId) -> Result<Arc<Capture>, CallFailure> {
        match lock(&self.by_id).get(&id) {
            Some(Object::Capture(capture)) => Ok(Arc::clone(capture)),
            _ => Err(unknown(id)),
        }
    }

    pub(crate) fn load(&self, id: SocketId) -> Result<Arc<LoadRun>, CallFailure> {
        match lock(&self.by_id).get(&id) {
            Some(Object::Load(load)) => Ok(Arc::clone(load)),
            _ => Err(unknown(id)),
        }
    }

    pub(crate) fn take_load(&self, id: SocketId) -> Result<Arc<LoadRun>, CallFailure> {
        match lock(&self.by_id).remove(&id) {
            Some(Object::Load(load)) => Ok(load),
            _ => Err(unknown(id)),
        }
    }

    /// Forget an object; one that is gone already is fine.
    pub(crate) fn close(&self, id: SocketId) {
        let object = lock(&self.by_id).remove(&id);
        match object {
            Some(Object::Server(server)) => server.stop(),
            Some(Object::Capture(capture)) => capture.stop(),
            Some(Object::Load(load)) => drop(load.stop()),
            Some(Object::Socket(_)) | None => {}
        }
    }
}

fn unknown(id: SocketId) -> CallFailure {
    CallFailure { errno: None, doing: "find it".to_owned(), text: format!("no such object {id}") }
}

/// Turn an I/O error into the answer's failure.
pub(crate) fn failed(doing: &'static str) -> impl Fn(io::Error) -> CallFailure {
    move |error| CallFailure { errno: error.raw_os_error(), doing: doing.to_owned(), text: error.to_string() }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
