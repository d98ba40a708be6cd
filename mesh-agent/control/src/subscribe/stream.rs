//! Owns one stream of delta xDS as the agent reads it: what it asks for, what it answers, and when a state is whole.
//!
//! Invariant: what is claimed to be held at the beginning of a stream is exactly what the store holds; so nothing is sent
//! twice, and nothing is missed.

use std::sync::Arc;

use mesh_wire::proto::{
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    node::Node,
    rpc::Status as WireStatus,
};
use tokio::sync::mpsc;
use tonic::{
    Code, Request, Status, Streaming, codegen::tokio_stream::wrappers::ReceiverStream, transport::Channel,
};

use super::{credentials::Credentials, issuer::authorise, store::Holder};
use crate::link::{Kind, MESSAGE_BYTES_MAX, WILDCARD, commit_of};

/// Requests on their way: one of each kind, and answers to what the controller may have sent.
const REQUESTS_MAX: usize = 32;
/// Longest detail of a refusal that is sent, in bytes.
const DETAIL_BYTES_MAX: usize = 4096;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The controller ended it, or the connection broke.
    #[error("the controller ended the stream: {}", said(.0))]
    Ended(Box<Status>),
    /// The controller ended it without a word.
    #[error("the controller ended the stream")]
    Closed,
}

impl From<Status> for StreamError {
    fn from(status: Status) -> Self {
        Self::Ended(Box::new(status))
    }
}

fn said(status: &Status) -> String {
    match status.message() {
        "" => format!("{:?}", status.code()),
        message => format!("{:?}, {message}", status.code()),
    }
}

/// What came of a message.
#[derive(Debug, PartialEq, Eq)]
pub struct Received {
    /// Resources that were refused.
    pub refused: usize,
    /// The store now holds the whole of this generation.
    pub commit: Option<u64>,
}

/// An open stream.
#[derive(Debug)]
pub struct Stream {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Stream {
    /// Opens a stream and asks for everything that `store` does not hold.
    ///
    /// # Errors
    /// The controller refused it, or the connection broke.
    pub async fn open(
        channel: Channel,
        credentials: &Credentials,
        store: &impl Holder,
    ) -> Result<Self, StreamError> {
        let (requests, outbound) = mpsc::channel(REQUESTS_MAX);
        let id = format!("nodemesh~{}", credentials.node());
        for kind in Kind::ALL {
            let node = Node { id: id.clone(), user_agent_name: "nodemesh".to_owned(), ..Node::default() };
            let request = DeltaDiscoveryRequest {
                node: (kind == Kind::ALL[0]).then_some(node),
                type_url: kind.type_url().to_owned(),
                resource_names_subscribe: vec![WILDCARD.to_owned()],
                initial_resource_versions: store.versions(kind),
                ..DeltaDiscoveryRequest::default()
            };
            // There is room for one of each kind.
            requests.send(request).await.map_err(|_gone| StreamError::Closed)?;
        }
        let mut call = Request::new(ReceiverStream::new(outbound));
        authorise(&mut call, credentials);
        let mut client = AggregatedDiscoveryServiceClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let responses = client.delta_aggregated_resources(call).await?.into_inner();
        Ok(Self { requests, responses })
    }

    /// Waits for the next message, takes it into `store` and answers it.
    ///
    /// Cancel safe: it waits for the message alone.
    ///
    /// # Errors
    /// The stream has ended.
    pub async fn next(&mut self, store: &mut impl Holder) -> Result<Received, StreamError> {
        let response = self.responses.message().await?.ok_or(StreamError::Closed)?;
        let DeltaDiscoveryResponse {
            system_version_info, resources, type_url, removed_resources, nonce, ..
        } = response;
        let mut errors = Vec::new();
        match Kind::of(&type_url) {
            None => errors.push(format!("nobody asked for {type_url}")),
            Some(kind) => {
                for resource in resources {
                    let (name, version) = (Arc::from(resource.name), Arc::from(resource.version));
                    let body = resource.resource.unwrap_or_default().value.into();
                    errors.extend(store.set(kind, name, version, body).err().map(|error| error.to_string()));
                }
                for name in &removed_resources {
                    store.remove(kind, name);
                }
            }
        }
        let refused = errors.len();
        let answer = DeltaDiscoveryRequest {
            type_url,
            response_nonce: nonce,
            error_detail: (refused > 0).then(|| WireStatus {
                code: Code::InvalidArgument as i32,
                message: detail(&errors),
                ..WireStatus::default()
            }),
            ..DeltaDiscoveryRequest::default()
        };
        // It is full only if the connection takes nothing; a controller has fewer responses unanswered than there is room.
        self.requests.try_send(answer).map_err(|_stuck| StreamError::Closed)?;
        Ok(Received { refused, commit: commit_of(&system_version_info) })
    }
}

/// The first errors, as many as fit, and how many more there are.
fn detail(errors: &[String]) -> String {
    let mut text = String::new();
    for (index, error) in errors.iter().enumerate() {
        if text.len() + error.len() > DETAIL_BYTES_MAX && index > 0 {
            text.push_str(&format!("; and {} more", errors.len() - index));
            break;
        }
        if index > 0 {
            text.push_str("; ");
        }
        text.extend(error.chars().take(DETAIL_BYTES_MAX));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_first_resources_and_counts_the_rest() {
        assert_eq!(detail(&["a".into(), "b".into()]), "a; b");
        let many: Vec<String> = (0..1000).map(|i| format!("resource {i}: {}", "x".repeat(50))).collect();
        let text = detail(&many);
        assert!(
            text.starts_with("resource 0: ") && text.ends_with(" more") && text.len() < 2 * DETAIL_BYTES_MAX
        );
    }
}
