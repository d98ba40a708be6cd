//! A way to an API server that lets so many writes through and answers none after that: whoever waits for the answer can be killed
//! between what it wrote and what it would have done next.

use std::io::{self, BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use mesh_tests::cluster::Kubectl;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// What went through, and what may.
#[derive(Debug, Default)]
struct Writes {
    /// So many more.
    left: usize,
    /// Each as `METHOD PATH?QUERY`, without those that were held back.
    done: Vec<String>,
}

/// The gate, and the `kubectl proxy` behind it, which has the administrator's rights. Both end with this value.
#[derive(Debug)]
pub(crate) struct Gate {
    address: SocketAddr,
    writes: Arc<Mutex<Writes>>,
    proxy: Child,
    _stop: oneshot::Sender<()>,
}

impl Gate {
    pub(crate) fn start(kubectl: &Kubectl) -> anyhow::Result<Self> {
        let mut proxy = kubectl.command(&["proxy", "--port=0"]).stdout(Stdio::piped()).spawn()?;
        let mut said = String::new();
        let stdout = proxy.stdout.take().context("the proxy has no standard output")?;
        BufReader::new(stdout).read_line(&mut said)?;
        let upstream = said.trim().rsplit(' ').next().and_then(|address| address.parse().ok());
        let writes = Arc::<Mutex<Writes>>::default();
        let (stop, stopped) = oneshot::channel();
        // From here on its end is ours.
        let mut gate = Self { address: (Ipv4Addr::LOCALHOST, 0).into(), writes, proxy, _stop: stop };
        let upstream = upstream.with_context(|| format!("kubectl proxy said {said:?}"))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        gate.address = listener.local_addr()?;
        let writes = Arc::clone(&gate.writes);
        std::thread::Builder::new().name("gate".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve(listener, upstream, writes) => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(gate)
    }

    /// Writes a kubeconfig of this way in a folder.
    pub(crate) fn kubeconfig(&self, folder: &Path) -> anyhow::Result<PathBuf> {
        let path = folder.join("gate.kubeconfig");
        let text = format!(
            "{{apiVersion: v1, kind: Config, current-context: gate, clusters: [{{name: gate, cluster: {{server: 'http://{}'}}}}], \
             users: [{{name: gate, user: {{}}}}], contexts: [{{name: gate, context: {{cluster: gate, user: gate}}}}]}}",
            self.address
        );
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// So many writes more; the last of them is not answered.
    pub(crate) fn allow(&self, writes: usize) {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner).left = writes;
    }

    /// Whether they are used up.
    pub(crate) fn is_shut(&self) -> bool {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner).left == 0
    }

    /// All writes so far, as `METHOD PATH?QUERY`.
    pub(crate) fn writes(&self) -> Vec<String> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner).done.clone()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.proxy.kill());
        drop(self.proxy.wait());
    }
}

async fn serve(listener: TcpListener, upstream: SocketAddr, writes: Arc<Mutex<Writes>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let writes = Arc::clone(&writes);
        tokio::spawn(async move {
            let service = service_fn(|request| pass(request, upstream, Arc::clone(&writes)));
            // A client that was killed is an error here.
            drop(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await,
            );
        });
    }
}

async fn pass(
    request: Request<Incoming>,
    upstream: SocketAddr,
    writes: Arc<Mutex<Writes>>,
) -> anyhow::Result<Response<Full<Bytes>>> {
    let is_write = request.method() != Method::GET;
    let lock = || writes.lock().unwrap_or_else(PoisonError::into_inner);
    if is_write && lock().left == 0 {
        return never().await;
    }
    let shown = format!("{} {}", request.method(), request.uri());
    let answer = ask(request, upstream).await?;
    if is_write {
        let shut = {
            let mut writes = lock();
            writes.left = writes.left.saturating_sub(1);
            writes.done.push(shown);
            writes.left == 0
        };
        if shut {
            return never().await;
        }
    }
    Ok(answer)
}

async fn never() -> anyhow::Result<Response<Full<Bytes>>> {
    std::future::pending::<()>().await;
    Err(anyhow!("unreachable"))
}

async fn ask(request: Request<Incoming>, upstream: SocketAddr) -> anyhow::Result<Response<Full<Bytes>>> {
    let stream = TcpStream::connect(upstream).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let (head, body) = request.into_parts();
    let body = Full::new(body.collect().await?.to_bytes());
    let mut request = Request::from_parts(head, body);
    for name in [CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING] {
        request.headers_mut().remove(name);
    }
    let (mut head, body) = sender.send_request(request).await?.into_parts();
    let body = body.collect().await?.to_bytes();
    for name in [CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING] {
        head.headers.remove(name);
    }
    drop(sender);
    connection.await.map_err(io::Error::other)??;
    Ok(Response::from_parts(head, Full::new(body)))
}
