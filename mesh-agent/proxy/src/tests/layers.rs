//! What a policy puts between: TLS to real servers, the PROXY protocol, tunnels through an HTTP proxy.

mod bytes;
mod requests;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use mesh_core::{
    route::{
        Routes,
        cluster::{ClientTls, ClientTlsMode, Cluster, ClusterKey, TrafficPolicy},
        scope::Scoped,
    },
    snapshot::{Mesh, Name, Parts, Service, Snapshot, Traits, Workload},
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair,
    RevokedCertParams, SanType,
};
use rustls::{
    RootCertStore, ServerConfig, crypto::aws_lc_rs::default_provider, pki_types::PrivateKeyDer,
    server::WebPkiClientVerifier,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::spawn_local,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::fixture::{World, endpoint, in_world, service, workload};

const VIP: &str = "10.96.0.1";

fn test<F: Future<Output = ()>>(body: impl FnOnce(World) -> F) {
    in_world(false, |_| {}, body);
}

/// A folder of this test alone.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("mesh-proxy-layers-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Writes a file; its path.
    pub(crate) fn file(&self, name: &str, content: &str) -> Arc<str> {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().into()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// An authority of these tests.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Certificate and key, in PEM, with these names.
    pub(crate) fn issue(
        &self,
        names: &[&str],
        shape: impl FnOnce(&mut CertificateParams),
    ) -> (String, String) {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = names
            .iter()
            .map(|name| match name.parse() {
                Ok(addr) => SanType::IpAddress(addr),
                Err(_) if name.contains("://") => SanType::URI((*name).try_into().unwrap()),
                Err(_) => SanType::DnsName((*name).try_into().unwrap()),
            })
            .collect();
        shape(&mut params);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// A list of certificates that are revoked, by their serial numbers, good until that year; in PEM.
    fn revocations(&self, serials: &[u64], until: i32) -> String {
        let long_ago = rcgen::date_time_ymd(2001, 1, 1);
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: (*serial).into(),
            revocation_time: long_ago,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: long_ago,
            next_update: rcgen::date_time_ymd(until, 1, 1),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(chain(&self.pem));
        roots
    }
}

fn chain(pem: &str) -> Vec<rustls::pki_types::CertificateDer<'static>> {
    use rustls::pki_types::pem::PemObject;
    rustls::pki_types::CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap).collect()
}

fn key(pem: &str) -> PrivateKeyDer<'static> {
    use rustls::pki_types::pem::PemObject;
    PrivateKeyDer::from_pem_slice(pem.as_bytes()).unwrap()
}

/// A TLS server that shows this certificate; with an authority for clients it wants one of theirs.
fn acceptor((cert, own_key): (String, String), clients: Option<&Authority>) -> TlsAcceptor {
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(authority) => {
            let roots = Arc::new(authority.roots());
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain(&cert), key(&own_key)).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

/// What a handshake showed a server.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shown {
    sni: Option<String>,
    alpn: Option<String>,
    has_certificate: bool,
}

/// Servers' notes.
type Notes = Rc<RefCell<Vec<Shown>>>;

/// Serves every TLS connection so.
async fn serve<F>(
    acceptor: TlsAcceptor,
    each: impl Fn(TlsStream<TcpStream>) -> F + 'static,
) -> (SocketAddr, Notes)
where
    F: Future<Output = ()> + 'static,
{
    // No pod's address.
    let listener = TcpListener::bind("127.0.0.3:0").await.unwrap();
    let (addr, notes) = (listener.local_addr().unwrap(), Notes::default());
    let noted = Rc::clone(&notes);
    let each = Rc::new(each);
    spawn_local(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (acceptor, notes, each) = (acceptor.clone(), Rc::clone(&noted), Rc::clone(&each));
            spawn_local(async move {
                let Ok(stream) = acceptor.accept(socket).await else { return };
                let tls = stream.get_ref().1;
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                notes.borrow_mut().push(Shown {
                    sni: tls.server_name().map(str::to_owned),
                    alpn: tls.alpn_protocol().map(text),
                    has_certificate: tls.peer_certificates().is_some(),
                });
                each(stream).await;
            });
        }
    });
    (addr, notes)
}

/// `SIMPLE`, with these roots.
fn simple(roots: &Arc<str>) -> ClientTls {
    ClientTls {
        mode: ClientTlsMode::Simple,
        sni: None,
        subject_alt_names: Vec::new(),
        client_certificate: None,
        ca_certificates: Some(Arc::clone(roots)),
        ca_crl: None,
        credential_name: None,
        insecure_skip_verify: false,
    }
}

fn cluster_key() -> ClusterKey {
    ClusterKey { service: Name::new("default", "web"), port: 80, subset: None }
}

fn cluster(shape: impl FnOnce(&mut TrafficPolicy)) -> Arc<Cluster> {
    let mut policy = TrafficPolicy::default();
    shape(&mut policy);
    Arc::new(Cluster { origin: None, labels: BTreeMap::new(), policy })
}

/// Publishes `web` with one endpoint and a policy; connections are meant for it.
fn publish(world: &World, port_name: &str, at: SocketAddr, shape: impl FnOnce(&mut TrafficPolicy)) {
    publish_with(world, port_name, at, None, shape);
}

/// The same where the endpoint is a pod's, if one is given.
fn publish_with(
    world: &World,
    port_name: &str,
    at: SocketAddr,
    pod: Option<&Workload>,
    shape: impl FnOnce(&mut TrafficPolicy),
) {
    let mut web = service("web", VIP.parse().unwrap(), vec![endpoint(at, pod.map(|pod| pod.id))]);
    web.ports[0].name = port_name.into();
    publish_in(world, Mesh::default(), web, pod, shape);
}

fn publish_in(
    world: &World,
    mesh: Mesh,
    web: Service,
    pod: Option<&Workload>,
    shape: impl FnOnce(&mut TrafficPolicy),
) {
    let clusters = BTreeMap::from([(cluster_key(), Scoped::everywhere(cluster(shape)))]);
    let client = workload("client", "a", "127.0.0.1".parse().unwrap());
    let parts = Parts {
        workloads: [client].into_iter().chain(pod.cloned()).map(Arc::new).collect(),
        services: vec![Arc::new(web)],
        routes: Arc::new(Routes { clusters, ..Routes::default() }),
        mesh: Arc::new(mesh),
        ..Parts::default()
    };
    let version = world.snapshots.borrow().version() + 1;
    world.snapshots.send_replace(Arc::new(Snapshot::new(version, parts)));
    world.dial(SocketAddr::new(VIP.parse().unwrap(), 80));
}

async fn connect(world: &World) -> TcpStream {
    TcpStream::connect(world.outbound).await.unwrap()
}

/// Replaces a file in one step, as those who issue certificates do.
pub(crate) fn replace(path: &str, content: &str) {
    let new = format!("{path}.new");
    fs::write(&new, content).unwrap();
    fs::rename(new, Path::new(path)).unwrap();
}
