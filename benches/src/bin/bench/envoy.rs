//! Owns the peer: a pair of Envoys as sidecars for TCP or HTTP/1.1 with mutual TLS, a process in the client's pod and one in the server's.
//!
//! The client dials its Envoy on loopback, where a mesh would redirect to it; the server's Envoy dials the server on
//! loopback. So the pair is spared the interception that a sidecar needs, which is in its favour.

use std::ffi::OsString;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::{Place, Pod, eventually};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use serde_json::{Value, json};

use crate::agents::rss;
use crate::paths::Traffic;

/// Where the client's Envoy takes connections.
const OUTBOUND: u16 = 15_001;

/// Where the server's Envoy takes them.
const INBOUND: u16 = 15_006;

/// How long an Envoy may take to listen.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// Threads of an Envoy: as many as an agent has workers here.
const CONCURRENCY: &str = "2";

/// Two Envoys with certificates of one authority.
#[derive(Debug)]
pub(crate) struct EnvoyPair {
    program: PathBuf,
    client_config: PathBuf,
    server_config: PathBuf,
    running: Option<[Process; 2]>,
}

/// An Envoy; killed when dropped.
#[derive(Debug)]
struct Process(Child);

/// The Envoy to measure: the one named, else `envoy` on PATH.
pub(crate) fn find(named: Option<&Path>) -> anyhow::Result<Option<PathBuf>> {
    if let Some(path) = named {
        ensure!(path.is_file(), "--peer-envoy {} is no file", path.display());
        return Ok(Some(path.to_owned()));
    }
    let folders: OsString = std::env::var_os("PATH").unwrap_or_default();
    Ok(std::env::split_paths(&folders).map(|folder| folder.join("envoy")).find(|path| path.is_file()))
}

impl EnvoyPair {
    /// Write certificates and configurations of a pair to `folder`; nothing is started.
    pub(crate) fn new(
        program: &Path,
        folder: &Path,
        server: &Place,
        traffic: Traffic,
        port: u16,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let authority = authority()?;
        write(folder, "root.pem", &authority.pem())?;
        for name in ["client", "server"] {
            let key = KeyPair::generate().context("cannot make a key")?;
            let uri = format!("spiffe://cluster.local/ns/bench/sa/{name}");
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::URI(uri.try_into().context("not a URI")?)];
            let certificate = params.signed_by(&key, &authority).context("cannot sign a certificate")?;
            write(folder, &format!("{name}.pem"), &certificate.pem())?;
            write(folder, &format!("{name}.key"), &key.serialize_pem())?;
        }
        let upstream = SocketAddr::new(IpAddr::V4(server.ip4()), INBOUND);
        let client_config = config(
            SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), OUTBOUND),
            upstream,
            Side::Client,
            traffic,
            folder,
        );
        let server_config = config(
            SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), INBOUND),
            SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
            Side::Server,
            traffic,
            folder,
        );
        Ok(Self {
            program: program.to_owned(),
            client_config: write(folder, "client.json", &client_config.to_string())?,
            server_config: write(folder, "server.json", &server_config.to_string())?,
            running: None,
        })
    }

    /// What the client dials.
    pub(crate) fn front(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), OUTBOUND)
    }

    /// End the running pair, if any, and start another.
    pub(crate) fn restart(&mut self, client: &Pod, server: &Pod) -> anyhow::Result<()> {
        self.running = None;
        let near = self.start(client, &self.client_config)?;
        let far = self.start(server, &self.server_config)?;
        for (place, port) in [(client, OUTBOUND), (server, INBOUND)] {
            let listens = || {
                let to = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
                place.run(|| TcpStream::connect(to).is_ok()).unwrap_or(false)
            };
            eventually(READY_LIMIT, listens, |listens| *listens)
                .with_context(|| format!("the Envoy in {} does not listen", place.name()))?;
        }
        self.running = Some([near, far]);
        Ok(())
    }

    /// Resident memory of each, in bytes.
    pub(crate) fn rss(&self) -> anyhow::Result<Vec<u64>> {
        self.running.iter().flatten().map(|process| rss(process.0.id())).collect()
    }

    fn start(&self, place: &Place, config: &Path) -> anyhow::Result<Process> {
        let mut command = Command::new(&self.program);
        command
            .arg("-c")
            .arg(config)
            .args(["--disable-hot-restart", "--concurrency", CONCURRENCY, "--log-level", "warning"])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if let Ok(log) = place.log_file() {
            command.stderr(log);
        }
        Ok(Process(place.spawn(command)?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already is what was wanted.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[derive(Clone, Copy, Debug)]
enum Side {
    Client,
    Server,
}

fn authority() -> anyhow::Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::OrganizationName, "bench");
    let key = KeyPair::generate().context("cannot make a key")?;
    CertifiedIssuer::self_signed(params, key).context("cannot make an authority")
}

fn write(folder: &Path, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// A proxy that speaks mutual TLS 1.3 on one side, as a sidecar does. For HTTP it has the filters that routing needs and no
/// other, and writes no log, which is in its favour.
fn config(listen: SocketAddr, upstream: SocketAddr, side: Side, traffic: Traffic, folder: &Path) -> Value {
    let file = |name: &str| json!({"filename": folder.join(name)});
    let (name, tls_type) = match side {
        Side::Client => ("client", "UpstreamTlsContext"),
        Side::Server => ("server", "DownstreamTlsContext"),
    };
    let mut tls = json!({
        "@type": format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{tls_type}"),
        "common_tls_context": {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [{
                "certificate_chain": file(&format!("{name}.pem")),
                "private_key": file(&format!("{name}.key")),
            }],
            "validation_context": {"trusted_ca": file("root.pem")},
        },
    });
    if let Side::Server = side {
        tls["require_client_certificate"] = json!(true);
    }
    let socket = json!({"name": "envoy.transport_sockets.tls", "typed_config": tls});
    let address = |addr: SocketAddr| json!({"socket_address": {"address": addr.ip().to_string(), "port_value": addr.port()}});
    let filter = match traffic {
        Traffic::Tcp => json!({
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": name,
                "cluster": "next",
            },
        }),
        Traffic::Http => http_filter(name, side),
    };
    let mut chain = json!({"filters": [filter]});
    let mut cluster = json!({
        "name": "next",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": "next",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(upstream)}}]}],
        },
    });
    match side {
        Side::Client => cluster["transport_socket"] = socket,
        Side::Server => chain["transport_socket"] = socket,
    }
    json!({"static_resources": {
        "listeners": [{"name": "in", "address": address(listen), "filter_chains": [chain]}],
        "clusters": [cluster],
    }})
}

/// What reads, routes and forwards requests. The client's side has the rules of the mesh beside it.
fn http_filter(name: &str, side: Side) -> Value {
    let everyone = json!({"match": {"prefix": "/"}, "route": {
        "cluster": "next",
        "timeout": "15s",
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,retriable-status-codes",
            "retriable_status_codes": [503],
            "num_retries": 2,
            "per_try_timeout": "5s",
        },
    }});
    let testers = json!({"match": {
        "prefix": "/load",
        "headers": [{"name": "end-user", "string_match": {"exact": "tester"}}],
    }, "route": {"cluster": "next"}});
    let routes = match side {
        Side::Client => json!([testers, everyone]),
        Side::Server => json!([{"match": {"prefix": "/"}, "route": {"cluster": "next", "timeout": "0s"}}]),
    };
    json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": name,
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
            "http_filters": [{
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
                },
            }],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_side_towards_the_other_envoy_speaks_tls() {
        let here = SocketAddr::from(([127, 0, 0, 1], 1));
        let client = config(here, here, Side::Client, Traffic::Tcp, Path::new("x"));
        let server = config(here, here, Side::Server, Traffic::Tcp, Path::new("x"));
        let tls_in = |config: &Value, pointer: &str| config.pointer(pointer).is_some();
        let (chain, cluster) = (
            "/static_resources/listeners/0/filter_chains/0/transport_socket",
            "/static_resources/clusters/0/transport_socket",
        );
        assert!(tls_in(&client, cluster) && !tls_in(&client, chain));
        assert!(tls_in(&server, chain) && !tls_in(&server, cluster));
        assert_eq!(
            server.pointer(&format!("{chain}/typed_config/require_client_certificate")),
            Some(&json!(true))
        );
    }

    #[test]
    fn an_envoy_that_was_named_and_is_not_there_is_an_error() {
        assert!(find(Some(Path::new("/nowhere/envoy"))).is_err());
    }
}
