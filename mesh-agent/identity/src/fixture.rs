//! What the tests of this crate share: a clock that is set, forged certificates, and handshakes in memory.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime},
};

use mesh_core::identity::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, ServerConfig, ServerConnection, SideData,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName},
};

use crate::{
    bundle::{Trust, TrustDomains, TrustMaterial},
    ca::{Ca, CaOptions, PluggedIn},
    clock::Clock,
    tls::TlsContext,
};

pub(crate) const DAY: Duration = Duration::from_secs(86_400);

/// A time in 2026 that all tests begin at.
pub(crate) fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

/// A clock that says what it was told.
#[derive(Debug)]
pub(crate) struct SetClock(Mutex<SystemTime>);

impl SetClock {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(start())))
    }

    pub(crate) fn advance(&self, by: Duration) {
        *self.0.lock().unwrap() += by;
    }

    pub(crate) fn set_back(&self, by: Duration) {
        *self.0.lock().unwrap() -= by;
    }
}

impl Clock for SetClock {
    fn now(&self) -> SystemTime {
        *self.0.lock().unwrap()
    }
}

/// A folder of a test, removed with it.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("mesh-identity-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.0.join(name), content).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.0.join(name)).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

pub(crate) fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "shop", account)
}

/// A CA of somebody else's making, which signs anything.
pub(crate) struct Forger {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) pem: String,
    pub(crate) key_pem: String,
    /// From this one up, without a root.
    above: Vec<CertificateDer<'static>>,
}

/// What a forged certificate says.
#[derive(Clone, Debug)]
pub(crate) struct Claims {
    pub(crate) uris: Vec<String>,
    pub(crate) dns: Vec<String>,
    pub(crate) from: SystemTime,
    pub(crate) until: SystemTime,
    pub(crate) serial: u64,
    pub(crate) usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Claims {
    pub(crate) fn of(uri: impl ToString) -> Self {
        Self {
            uris: vec![uri.to_string()],
            dns: Vec::new(),
            from: start() - DAY,
            until: start() + DAY,
            serial: 7,
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        }
    }
}

/// A forged chain with its key.
pub(crate) struct Forged {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (start() - 100 * DAY).into();
    params.not_after = (start() + 1000 * DAY).into();
    params.key_identifier_method = KeyIdMethod::Sha256;
    params.use_authority_key_identifier_extension = true;
    params
}

impl Forger {
    pub(crate) fn root(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = ca_params(name);
        let made = params.self_signed(&key).unwrap();
        let key_pem = key.serialize_pem();
        Self {
            certificate: made.der().clone(),
            pem: made.pem(),
            key_pem,
            issuer: Issuer::new(params, key),
            above: Vec::new(),
        }
    }

    pub(crate) fn intermediate(&self, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = ca_params(name);
        let made = params.signed_by(&key, &self.issuer).unwrap();
        let mut above = vec![made.der().clone()];
        above.extend(self.above.iter().cloned());
        let key_pem = key.serialize_pem();
        Self {
            certificate: made.der().clone(),
            pem: made.pem(),
            key_pem,
            issuer: Issuer::new(params, key),
            above,
        }
    }

    pub(crate) fn leaf(&self, claims: &Claims) -> Forged {
        let key = KeyPair::generate().unwrap();
        let made = params_of(claims).signed_by(&key, &self.issuer).unwrap();
        let mut chain = vec![made.der().clone()];
        chain.extend(self.above.iter().cloned());
        Forged { chain, key: PrivateKeyDer::try_from(key.serialize_der()).unwrap() }
    }

    /// A revocation list of these serials.
    pub(crate) fn revoke(
        &self,
        serials: &[u64],
        next_update: SystemTime,
    ) -> (CertificateRevocationListDer<'static>, String) {
        self.revoke_these(serials.iter().map(|serial| SerialNumber::from(*serial)), next_update)
    }

    /// A revocation list of one serial, as a certificate has it.
    pub(crate) fn revoke_raw(
        &self,
        serial: &[u8],
        next_update: SystemTime,
    ) -> CertificateRevocationListDer<'static> {
        self.revoke_these([SerialNumber::from_slice(serial)], next_update).0
    }

    fn revoke_these(
        &self,
        serials: impl IntoIterator<Item = SerialNumber>,
        next_update: SystemTime,
    ) -> (CertificateRevocationListDer<'static>, String) {
        let revoked = |serial_number| RevokedCertParams {
            serial_number,
            revocation_time: (start() - DAY).into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: (start() - 10 * DAY).into(),
            next_update: next_update.into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.into_iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).unwrap();
        (list.der().clone(), list.pem().unwrap())
    }
}

fn params_of(claims: &Claims) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names =
        claims.uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().unwrap())).collect();
    params
        .subject_alt_names
        .extend(claims.dns.iter().map(|name| SanType::DnsName(name.as_str().try_into().unwrap())));
    params.not_before = claims.from.into();
    params.not_after = claims.until.into();
    params.serial_number = Some(SerialNumber::from(claims.serial));
    params.extended_key_usages.clone_from(&claims.usages);
    params.use_authority_key_identifier_extension = true;
    params
}

/// A certificate that nobody but itself signed.
pub(crate) fn self_signed(claims: &Claims) -> Forged {
    let key = KeyPair::generate().unwrap();
    let made = params_of(claims).self_signed(&key).unwrap();
    Forged { chain: vec![made.der().clone()], key: PrivateKeyDer::try_from(key.serialize_der()).unwrap() }
}

/// Trust in these roots, at the tests' start.
pub(crate) fn context(roots: &[&Forger], clock: Arc<dyn Clock>) -> TlsContext {
    let material = TrustMaterial {
        roots: roots.iter().map(|root| root.certificate.clone()).collect(),
        ..TrustMaterial::default()
    };
    TlsContext { trust: Arc::new(Trust::new(TrustDomains::new("cluster.local"), material).unwrap()), clock }
}

/// A CA of ours that signs with a forger's key.
pub(crate) fn local_ca(forger: &Forger, clock: Arc<dyn Clock>) -> Ca {
    let folder = Folder::new();
    let options = CaOptions { clock, ..CaOptions::new(folder.path(), "cluster.local") };
    Ca::open_with(options, Some(plugged_in(forger, forger))).unwrap()
}

/// A forger's CA as files, below `root`.
pub(crate) fn plugged_in(forger: &Forger, root: &Forger) -> PluggedIn {
    PluggedIn {
        ca_cert: forger.pem.clone().into_bytes(),
        ca_key: forger.key_pem.clone().into_bytes().into(),
        cert_chain: forger.pem.clone().into_bytes(),
        root_cert: root.pem.clone().into_bytes(),
        crl: Vec::new(),
    }
}

/// Moves everything `from` has to say to `to`. False, if there was nothing.
fn pump<A: SideData, B: SideData>(
    from: &mut ConnectionCommon<A>,
    to: &mut ConnectionCommon<B>,
) -> Result<bool, rustls::Error> {
    let mut moved = false;
    while from.wants_write() {
        let mut wire = Vec::new();
        from.write_tls(&mut wire).unwrap();
        moved |= !wire.is_empty();
        let mut wire = io::Cursor::new(wire);
        while to.read_tls(&mut wire).unwrap() > 0 {
            to.process_new_packets()?;
        }
    }
    Ok(moved)
}

/// The first error of either side.
#[derive(Debug)]
pub(crate) enum Failed {
    Client(rustls::Error),
    Server(rustls::Error),
}

/// A handshake in memory.
pub(crate) fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> Result<(ClientConnection, ServerConnection), Failed> {
    let name = ServerName::try_from("nobody.invalid").unwrap();
    let mut client = ClientConnection::new(client, name).map_err(Failed::Client)?;
    let mut server = ServerConnection::new(server).map_err(Failed::Server)?;
    loop {
        let a = pump(&mut client, &mut server).map_err(Failed::Server)?;
        let b = pump(&mut server, &mut client).map_err(Failed::Client)?;
        if !a && !b {
            assert!(!client.is_handshaking() && !server.is_handshaking());
            return Ok((client, server));
        }
    }
}
