//! The webhook's certificate: renewed by the controller itself before it ends, and the API server notices nothing.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_tests::{Failure, TestResult, eventually, require_agent, require_api_server, test_name};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use serde_json::json;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::scene::{NAMESPACE, Scene, ServiceAddress};
use crate::{SOON, objects};

/// Life of the controller's certificate here; by itself it is a day.
const LIFE: Duration = Duration::from_secs(60);

/// A certificate that a server showed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shown {
    serial: String,
    not_after: SystemTime,
}

/// Shakes hands as an API server does: the chain must lead to these roots, and be valid now, for this name.
fn shake_hands(addr: SocketAddr, roots: &str, name: &str) -> Result<Shown, Failure> {
    let mut store = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        store.add(root?)?;
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_no_client_auth();
    let mut connection = ClientConnection::new(Arc::new(config), ServerName::try_from(name.to_owned())?)?;
    let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    let leaf = connection.peer_certificates().and_then(<[_]>::first);
    let leaf = leaf.ok_or_else(|| anyhow::anyhow!("{addr} showed no certificate"))?;
    let (_, certificate) = X509Certificate::from_der(leaf)?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp())?;
    let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    Ok(Shown { serial: certificate.raw_serial_as_string(), not_after })
}

#[test]
fn the_webhooks_certificate_is_renewed_before_it_ends_and_the_api_server_goes_on_asking() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    scene.kubectl().apply(&objects::crds())?;
    scene.kubectl().apply(&objects::namespace("shop"))?;
    let life = format!("{}s", LIFE.as_secs());
    let controller = scene.controller("a", &["--own-certificate-ttl", &life])?;
    let addr = ServiceAddress::take("10.96.255.80")?;
    scene.kubectl().apply(&objects::webhook(addr.as_str(), controller.webhook_port()))?;
    let refused =
        || scene.kubectl().apply(&objects::split(json!("ten"))).err().map(|error| error.to_string());
    let is_judged = |error: &Option<String>| {
        error.as_ref().is_some_and(|text| text.contains("spec.http[0].route[1].weight"))
    };
    eventually(SOON, refused, is_judged)?;

    let bundle = || {
        let template = "go-template={{(index .webhooks 0).clientConfig.caBundle | base64decode}}";
        let get = ["get", "validatingwebhookconfigurations", "nodemesh", "-o", template];
        scene.kubectl().run(&get)
    };
    let webhook = SocketAddr::new(addr.as_str().parse()?, controller.webhook_port());
    let name = format!("nodemesh-controller.{NAMESPACE}.svc");
    let look = || shake_hands(webhook, &bundle()?, &name);
    let first = look()?;
    assert!(first.not_after <= SystemTime::now() + LIFE, "it lives longer than asked for: {first:?}");
    let mut seen_at = SystemTime::now();
    let other = |shown: &Result<Shown, String>| shown.as_ref().is_ok_and(|shown| *shown != first);
    let second = eventually(
        LIFE * 2,
        || {
            let shown = look().map_err(|error| format!("{error:?}"));
            // While the first one is shown this is a time before the renewal.
            if shown.as_ref().is_ok_and(|shown| *shown == first) {
                seen_at = SystemTime::now();
            }
            shown
        },
        other,
    )?
    .map_err(anyhow::Error::msg)?;
    assert!(second.not_after > first.not_after, "{first:?} {second:?}");
    assert!(seen_at < first.not_after, "it was shown until after its end: {first:?}");

    // The first one has ended, and the API server has to shake hands anew.
    eventually(LIFE * 2, SystemTime::now, |now| *now > first.not_after)?;
    scene.restart_api_server()?;
    eventually(SOON, refused, is_judged)?;
    scene.kubectl().apply(&objects::split(json!(10)))?;
    // For as long as it runs.
    let third = look()?;
    assert!(third.not_after > SystemTime::now(), "{third:?}");
    Ok(())
}
