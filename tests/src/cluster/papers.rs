//! What the parts of a cluster prove themselves with: certificates, tokens and kubeconfigs.
//!
//! All of it lives in the cluster's private folder and dies with it.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use super::ApiServerError;

/// Names by which pods and people call the API server.
const SERVER_NAMES: [&str; 5] = [
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
];

/// The first address of the service range: that of the API server's own Service.
const SERVICE_IP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1));

/// The administrator's name, and that of the kubeconfig.
pub(crate) const ADMIN: &str = "admin";

/// Somebody who talks to the API server, as the token file has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// File name of the kubeconfig.
    pub(crate) name: String,
    /// User name for RBAC.
    pub(crate) user: String,
    /// Groups for RBAC.
    pub(crate) groups: &'static str,
}

impl Identity {
    /// A part of the control plane whose roles Kubernetes makes by itself.
    pub(crate) fn component(name: &str) -> Self {
        Self { name: name.to_owned(), user: format!("system:{name}"), groups: "" }
    }

    /// A node's kubelet.
    pub(crate) fn node(name: &str) -> Self {
        Self { name: name.to_owned(), user: format!("system:node:{name}"), groups: "system:nodes" }
    }
}

/// How the server is reached.
#[derive(Debug, Clone)]
pub(crate) struct Ways {
    /// The URL that parts of the cluster use.
    pub(crate) inside: String,
    /// The URL that tests and people use.
    pub(crate) outside: String,
    /// What its certificate must hold besides the usual names.
    pub(crate) addresses: Vec<IpAddr>,
}

/// The folder of certificates, keys, tokens and kubeconfigs.
#[derive(Debug, Clone)]
pub(crate) struct Papers {
    folder: PathBuf,
}

impl Papers {
    /// Write everything for a server that is reached like this, for the administrator and these identities.
    pub(crate) fn write(
        folder: PathBuf,
        ways: &Ways,
        identities: &[Identity],
    ) -> Result<Self, ApiServerError> {
        fs::create_dir_all(&folder)
            .map_err(|source| ApiServerError::File { path: folder.clone(), source })?;
        let papers = Self { folder };
        let authority = ClusterAuthority::new()?;
        papers.secret("ca.crt", &authority.pem)?;
        let mut server = CertificateParams::default();
        server.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        for name in SERVER_NAMES {
            server.subject_alt_names.push(SanType::DnsName(Ia5String::try_from(name)?));
        }
        let own = [SERVICE_IP, IpAddr::from([127, 0, 0, 1])];
        server.subject_alt_names.extend(own.iter().chain(&ways.addresses).copied().map(SanType::IpAddress));
        papers.issue(&authority, "server", server)?;
        // By this one the server proves itself to kubelets.
        let mut client = CertificateParams::default();
        client.distinguished_name.push(DnType::CommonName, "kube-apiserver-kubelet-client");
        client.distinguished_name.push(DnType::OrganizationName, "system:masters");
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        papers.issue(&authority, "kubelet-client", client)?;
        let accounts = KeyPair::generate()?;
        papers.secret("service-account.key", &accounts.serialize_pem())?;
        papers.secret("service-account.pub", &accounts.public_key_pem())?;
        let mut tokens = String::new();
        let admin = Identity { name: ADMIN.into(), user: ADMIN.into(), groups: "system:masters" };
        for identity in std::iter::once(&admin).chain(identities) {
            let url = if identity.name == ADMIN { &ways.outside } else { &ways.inside };
            let Identity { name, user, groups } = identity;
            let token = token().map_err(|source| ApiServerError::File { path: papers.path(name), source })?;
            tokens += &format!("{token},{user},{name},\"{groups}\"\n");
            papers.secret(&format!("{name}.token"), &token)?;
            papers.secret(&format!("{name}.kubeconfig"), &kubeconfig(url, &token, &authority))?;
        }
        papers.secret("tokens.csv", &tokens)?;
        Ok(papers)
    }

    /// A file of the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The kubeconfig of an identity.
    pub(crate) fn kubeconfig(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.kubeconfig"))
    }

    fn issue(
        &self,
        authority: &ClusterAuthority,
        name: &str,
        params: CertificateParams,
    ) -> Result<(), ApiServerError> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &authority.issuer)?;
        self.secret(&format!("{name}.crt"), &certificate.pem())?;
        self.secret(&format!("{name}.key"), &key.serialize_pem())
    }

    /// Write a file that only root reads.
    fn secret(&self, name: &str, text: &str) -> Result<(), ApiServerError> {
        write_secret(&self.path(name), text)
            .map_err(|source| ApiServerError::File { path: self.path(name), source })
    }
}

fn kubeconfig(url: &str, token: &str, authority: &ClusterAuthority) -> String {
    let authority = base64::engine::general_purpose::STANDARD.encode(&authority.pem);
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: nodemesh-test\n\
         clusters:\n- name: nodemesh-test\n  cluster:\n    server: {url}\n    certificate-authority-data: {authority}\n\
         users:\n- name: nodemesh-test\n  user:\n    token: {token}\n\
         contexts:\n- name: nodemesh-test\n  context:\n    cluster: nodemesh-test\n    user: nodemesh-test\n"
    )
}

/// 128 random bits.
fn token() -> io::Result<String> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// Signs for one cluster.
struct ClusterAuthority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl ClusterAuthority {
    fn new() -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "nodemesh-test-cluster");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }
}
