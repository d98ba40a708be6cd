//! Owns certificates over the network: requests to the controller, in the words of Istio's certificate service.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use mesh_core::identity::Identity;
use mesh_identity::{
    bundle::TrustMaterial,
    issuer::{IssueError, Issued, Issuer, Issuing},
};
use mesh_wire::proto::ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use prost_types::{Struct, Value, value::Kind as ValueKind};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio::{sync::watch, time::timeout};
use tonic::{Code, Request, Status, metadata::MetadataValue, transport::Channel};

use super::credentials::Credentials;
use crate::publish::certificates::IMPERSONATED_IDENTITY;

/// How long one request may take, waiting for a connection included.
const ISSUE_WITHIN: Duration = Duration::from_secs(10);
/// Certificates in one answer.
const CERTIFICATES_MAX: usize = 64;
/// Bytes of one answer.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Asks the controller. Shared by all who need certificates.
pub struct RemoteIssuer {
    channel: watch::Receiver<Option<Channel>>,
    trust: watch::Receiver<Arc<TrustMaterial>>,
    credentials: Arc<Credentials>,
}

impl RemoteIssuer {
    pub(super) fn new(
        channel: watch::Receiver<Option<Channel>>,
        trust: watch::Receiver<Arc<TrustMaterial>>,
        credentials: Arc<Credentials>,
    ) -> Self {
        Self { channel, trust, credentials }
    }

    async fn ask(&self, csr: String, identity: Identity, ttl: Duration) -> Result<Issued, IssueError> {
        let away = || IssueError::Unavailable("the controller is away".to_owned());
        let mut channel = self.channel.clone();
        let asked = timeout(ISSUE_WITHIN, async {
            let channel = channel.wait_for(Option::is_some).await.map_err(|_| away())?.clone();
            let channel = channel.ok_or_else(away)?;
            request(channel, &self.credentials, csr, &identity.to_string(), ttl).await
        });
        asked.await.map_err(|_late| away())?
    }
}

impl Issuer for RemoteIssuer {
    fn issue(&self, csr_pem: String, identity: Identity, ttl: Duration) -> Issuing<'_> {
        Box::pin(self.ask(csr_pem, identity, ttl))
    }

    fn trust(&self) -> watch::Receiver<Arc<TrustMaterial>> {
        self.trust.clone()
    }
}

impl fmt::Debug for RemoteIssuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteIssuer").field("credentials", &self.credentials).finish_non_exhaustive()
    }
}

/// Sends one request over `channel`.
pub(super) async fn request(
    channel: Channel,
    credentials: &Credentials,
    csr: String,
    identity: &str,
    ttl: Duration,
) -> Result<Issued, IssueError> {
    let asked = Value { kind: Some(ValueKind::StringValue(identity.to_owned())) };
    let message = IstioCertificateRequest {
        csr,
        validity_duration: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
        metadata: Some(Struct { fields: BTreeMap::from([(IMPERSONATED_IDENTITY.to_owned(), asked)]) }),
        ..IstioCertificateRequest::default()
    };
    let mut request = Request::new(message);
    authorise(&mut request, credentials);
    let mut client = IstioCertificateServiceClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
    let answer = client.create_certificate(request).await.map_err(|status| error_of(&status))?;
    issued_of(&answer.into_inner().cert_chain)
}

/// Adds the token, unless the connection's certificate says who we are.
pub(super) fn authorise<T>(request: &mut Request<T>, credentials: &Credentials) {
    if credentials.certificate().is_some() {
        return;
    }
    if let Some(mut value) =
        credentials.bearer().and_then(|bearer| MetadataValue::try_from(bearer.as_str()).ok())
    {
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
    }
}

fn error_of(status: &Status) -> IssueError {
    let message = status.message().to_owned();
    match status.code() {
        Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated => {
            // Our own controller begins with the reason's label.
            let label = message.split_once(": ").map(|(label, _)| label.to_owned());
            IssueError::Refused(label.unwrap_or(message))
        }
        code => IssueError::Unavailable(format!("{code:?}: {message}")),
    }
}

/// The leaf and intermediates come one a text; the last text holds the roots.
fn issued_of(chain: &[String]) -> Result<Issued, IssueError> {
    let unusable = |what: &str| IssueError::Unusable(what.to_owned());
    let (roots, chain) = chain.split_last().ok_or_else(|| unusable("it is empty"))?;
    let mut found = Vec::new();
    for text in chain {
        read(text, &mut found)?;
    }
    let mut trusted = Vec::new();
    read(roots, &mut trusted)?;
    if found.is_empty() || trusted.is_empty() {
        return Err(unusable("it has no certificate or no root"));
    }
    Ok(Issued { chain: found, roots: trusted })
}

fn read(text: &str, into: &mut Vec<CertificateDer<'static>>) -> Result<(), IssueError> {
    for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
        into.push(certificate.map_err(|error| IssueError::Unusable(error.to_string()))?);
        if into.len() > CERTIFICATES_MAX {
            return Err(IssueError::Unusable(format!("more than {CERTIFICATES_MAX} certificates")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::files::pem;

    #[test]
    fn an_answer_is_a_chain_and_then_the_roots() {
        let texts = [pem(b"leaf"), pem(b"intermediate"), pem(b"old root") + &pem(b"new root")];
        let issued = issued_of(&texts).unwrap();
        assert_eq!((issued.chain.len(), issued.roots.len()), (2, 2));
        assert_eq!(issued.chain[0].as_ref(), b"leaf");
        assert_eq!(issued.roots[1].as_ref(), b"new root");
    }

    #[test]
    fn an_answer_without_a_leaf_or_root_is_unusable() {
        for texts in
            [vec![], vec![pem(b"alone")], vec![pem(b"leaf"), String::new()], vec!["x".into(), pem(b"r")]]
        {
            assert!(matches!(issued_of(&texts), Err(IssueError::Unusable(_))), "{texts:?}");
        }
        let many = vec![pem(b"leaf"), pem(b"r").repeat(CERTIFICATES_MAX + 1)];
        assert!(matches!(issued_of(&many), Err(IssueError::Unusable(_))));
    }

    #[test]
    fn a_refusal_keeps_its_reason_and_a_failure_is_worth_another_try() {
        let refused = error_of(&Status::permission_denied("not_hosted: no such pod there"));
        assert_eq!(refused, IssueError::Refused("not_hosted".into()));
        assert!(matches!(error_of(&Status::unavailable("internal: x")), IssueError::Unavailable(_)));
    }
}
