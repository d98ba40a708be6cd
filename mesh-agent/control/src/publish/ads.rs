//! Owns the delta xDS service: one task a stream, from requests and a changing world to responses.
//!
//! Invariants:
//! - A stream holds one response at most that was not yet written; the rest of what a slow client misses is in the world.
//! - Streams are bounded in number, by node and in all, and in age: a client comes again with what it has.
//! - The world's lock is held to make one response, never across an await.

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use mesh_wire::{
    encoded::EncodedDeltaResponse,
    proto::{
        discovery::{DeltaDiscoveryRequest, DiscoveryRequest, DiscoveryResponse},
        discovery_server::aggregated_discovery_service_server::AggregatedDiscoveryService,
        node::ControlPlane,
    },
};
use prost::Message as _;
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};
use tonic::{
    Request as Call, Response as Reply, Status, Streaming,
    codegen::{BoxStream, tokio_stream::wrappers::ReceiverStream},
};

use super::{
    auth::{Connection, NodeProof, node_of},
    metrics::{AnswerLabels, KindLabels, PublishMetrics, ReasonLabels},
    seats::{Entry, Seats, SessionView},
    session::{Answer, Request, Response, Session, SessionError},
    world::{Edits, Resource, World},
};
use crate::link::{Kind, SESSION_OLD};

/// How long a stream lives of a client with a certificate, or with a token that only its node has: so that load spreads over controllers.
const SESSION_AGE: Duration = Duration::from_secs(6 * 3600);
/// How long one lives of a client with a service account's token, which is looked at when a stream begins and then no more: it ends within
/// the hour, and before that with its pod. To come again costs little, since the client says what it has.
const SESSION_AGE_OF_TOKENS: Duration = Duration::from_secs(30 * 60);
/// So many hundredths more or less, so that nodes that came together do not come again together.
const SESSION_AGE_SPREAD: u32 = 20;

/// The published world and who watches it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Publication(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    world: RwLock<World>,
    generation: watch::Sender<u64>,
    seats: Arc<Seats>,
    closing: watch::Sender<bool>,
    metrics: PublishMetrics,
}

/// A published resource, for operators.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ResourceView {
    /// Kind.
    pub kind: &'static str,
    /// Name.
    pub name: Arc<str>,
    /// Hash of its contents: equal in controllers that would say the same.
    pub version: String,
    /// Size as it is sent.
    pub bytes: usize,
    /// The nodes that get it; none for all.
    pub nodes: Option<Vec<Arc<str>>>,
}

impl ResourceView {
    fn of(kind: Kind, resource: &Resource) -> Self {
        Self {
            kind: kind.as_str(),
            name: Arc::clone(&resource.name),
            version: resource.version_text(),
            bytes: resource.encoded.len(),
            nodes: resource.reach.names().map(<[_]>::to_vec),
        }
    }
}

impl Publication {
    /// Nothing is known yet; clients wait.
    pub fn new(metrics: PublishMetrics) -> Self {
        Self(Arc::new(Shared {
            world: RwLock::default(),
            generation: watch::Sender::new(0),
            seats: Arc::new(Seats::new(metrics.clone())),
            closing: watch::Sender::new(false),
            metrics,
        }))
    }

    /// Publishes edits. Returns how many resources changed.
    pub fn apply(&self, edits: Edits) -> usize {
        let mut world = self.0.world.write().unwrap_or_else(PoisonError::into_inner);
        let changed = world.apply(edits);
        let generation = world.generation();
        drop(world);
        self.0.metrics.set_generation(generation);
        self.0.generation.send_if_modified(|current| std::mem::replace(current, generation) != generation);
        changed
    }

    /// Number of the newest state.
    pub fn generation(&self) -> u64 {
        *self.0.generation.borrow()
    }

    /// How many resources of a kind there are.
    pub fn count(&self, kind: Kind) -> usize {
        self.0.world.read().unwrap_or_else(PoisonError::into_inner).count(kind)
    }

    /// Ends all streams: their clients go to another controller, or come again when this one is back.
    pub(super) fn close(&self) {
        self.0.closing.send_replace(true);
    }

    /// Becomes true when all streams are to end.
    pub(super) fn closing(&self) -> watch::Receiver<bool> {
        self.0.closing.subscribe()
    }

    /// Every resource that is published, by kind and name.
    pub fn resources(&self) -> Vec<ResourceView> {
        let world = self.0.world.read().unwrap_or_else(PoisonError::into_inner);
        let of = |kind: Kind| world.after(kind, None).map(move |resource| ResourceView::of(kind, resource));
        Kind::ALL.into_iter().flat_map(of).collect()
    }

    /// The clients connected now, oldest first.
    pub fn sessions(&self) -> Vec<SessionView> {
        self.0.seats.views(self.generation())
    }
}

/// The service.
#[derive(Debug)]
pub(super) struct Ads {
    pub(super) publication: Publication,
    pub(super) proof: Arc<NodeProof>,
    /// How long streams live, about.
    pub(super) session_age: Duration,
}

/// How long streams live, about, where nodes prove themselves so.
pub(super) const fn session_age(proof: &NodeProof) -> Duration {
    match proof {
        NodeProof::JoinSecret(_) => SESSION_AGE,
        NodeProof::ServiceAccount(_) => SESSION_AGE_OF_TOKENS,
    }
}

/// The age of one stream; `random` is any number.
fn spread(age: Duration, random: u64) -> Duration {
    let hundredths = random % u64::from(2 * SESSION_AGE_SPREAD + 1);
    // At most 120.
    let hundredths = u32::try_from(hundredths).unwrap_or_default() + 100 - SESSION_AGE_SPREAD;
    age * hundredths / 100
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = BoxStream<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = BoxStream<EncodedDeltaResponse>;

    async fn stream_aggregated_resources(
        &self,
        _call: Call<Streaming<DiscoveryRequest>>,
    ) -> Result<Reply<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("only delta xDS is served"))
    }

    async fn delta_aggregated_resources(
        &self,
        call: Call<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Reply<Self::DeltaAggregatedResourcesStream>, Status> {
        let connection = call.extensions().get::<Connection>();
        let remote = connection.map(|connection| connection.remote.to_string()).unwrap_or_default();
        let node = node_of(connection, call.metadata(), &self.proof).await.map_err(|error| {
            self.publication.0.metrics.refuse(error.as_str());
            tracing::warn!(%remote, reason = error.as_str(), "refused a client of xDS");
            Status::from(error)
        })?;
        let entry = self.publication.0.seats.enter(&node, remote.clone())?;
        let (responses, stream) = mpsc::channel(1);
        let publication = self.publication.clone();
        let inbound = call.into_inner();
        let age = spread(self.session_age, RandomState::new().build_hasher().finish());
        tokio::spawn(async move {
            tracing::info!(%node, %remote, "a client of xDS came");
            let ended =
                serve(&publication, &entry, Session::new(Some(Arc::clone(&node))), inbound, &responses, age);
            let ended = ended.await;
            tracing::info!(%node, %remote, reason = ended.as_str(), "a client of xDS went");
            let reason = ReasonLabels { reason: ended.as_str() };
            publication.0.metrics.ended.get_or_create(&reason).inc();
            drop(entry);
            if let Some(status) = ended.status() {
                // A client that is gone needs no reason.
                responses.send(Err(status)).await.ok();
            }
        });
        Ok(Reply::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// Why a stream ended.
#[derive(Debug)]
enum Ended {
    ByClient,
    Broken,
    Age,
    Closing,
    Refused(SessionError),
    UnknownKind,
}

impl Ended {
    const fn as_str(&self) -> &'static str {
        match self {
            Self::ByClient => "closed_by_client",
            Self::Broken => "broken",
            Self::Age => "age",
            Self::Closing => "closing",
            Self::Refused(error) => error.as_str(),
            Self::UnknownKind => "unknown_kind",
        }
    }

    fn status(&self) -> Option<Status> {
        match self {
            Self::ByClient | Self::Broken => None,
            Self::Age => Some(Status::unavailable(SESSION_OLD)),
            Self::Closing => Some(Status::unavailable("the controller is stopping")),
            Self::Refused(SessionError::TooFarBehind) => Some(Status::aborted("too far behind; come again")),
            Self::Refused(error) => Some(Status::resource_exhausted(error.to_string())),
            Self::UnknownKind => Some(Status::invalid_argument("a request without a type")),
        }
    }
}

async fn serve(
    publication: &Publication,
    entry: &Entry,
    mut session: Session,
    mut inbound: Streaming<DeltaDiscoveryRequest>,
    responses: &mpsc::Sender<Result<EncodedDeltaResponse, Status>>,
    age: Duration,
) -> Ended {
    let mut generation = publication.0.generation.subscribe();
    let mut closing = publication.0.closing.subscribe();
    let old = sleep(age);
    tokio::pin!(old);
    let mut room = None;
    let mut named = false;
    loop {
        if let Some(permit) = room.take() {
            generation.mark_unchanged();
            let next = {
                let world = publication.0.world.read().unwrap_or_else(PoisonError::into_inner);
                session.next(&world)
            };
            match next {
                Ok(Some(response)) => {
                    let response = encode(publication, response);
                    mpsc::Permit::send(permit, Ok(response));
                    entry.update(&session);
                    continue;
                }
                Ok(None) => room = Some(permit),
                Err(error) => return Ended::Refused(error),
            }
            entry.update(&session);
        }
        let idle = room.is_some();
        tokio::select! {
            permit = responses.reserve(), if !idle => match permit {
                Ok(permit) => room = Some(permit),
                Err(_gone) => return Ended::ByClient,
            },
            request = inbound.message() => match request {
                Ok(Some(request)) => {
                    if let Some(node) = request.node.as_ref().filter(|_| !named) {
                        named = true;
                        entry.name(node.id.clone());
                    }
                    if let Err(ended) = take(publication, &mut session, request) {
                        return ended;
                    }
                    entry.update(&session);
                }
                Ok(None) => return Ended::ByClient,
                Err(error) => {
                    tracing::debug!(%error, "a stream of xDS broke");
                    return Ended::Broken;
                }
            },
            // The sending side lives as long as the publication, which this function borrows.
            _ = generation.changed(), if idle => {}
            _ = closing.wait_for(|closing| *closing) => return Ended::Closing,
            () = &mut old => return Ended::Age,
        }
    }
}

/// Takes a request. One for a kind that we do not have is answered by silence, as xDS wants.
fn take(
    publication: &Publication,
    session: &mut Session,
    request: DeltaDiscoveryRequest,
) -> Result<(), Ended> {
    if request.type_url.is_empty() {
        return Err(Ended::UnknownKind);
    }
    let Some(kind) = Kind::of(&request.type_url) else {
        tracing::debug!(type_url = request.type_url, "a client asks for a kind that is not served");
        return Ok(());
    };
    let request = Request {
        subscribe: request.resource_names_subscribe,
        unsubscribe: request.resource_names_unsubscribe,
        known: request.initial_resource_versions,
        nonce: request.response_nonce,
        refused: request.error_detail.map(|status| status.message),
    };
    let answer = {
        let world = publication.0.world.read().unwrap_or_else(PoisonError::into_inner);
        session.request(kind, request, &world).map_err(Ended::Refused)?
    };
    let count = |kind: Kind, answer| {
        let labels = AnswerLabels { kind: kind.as_str(), answer };
        publication.0.metrics.answers.get_or_create(&labels).inc();
    };
    match answer {
        None => {}
        Some(Answer::Ack(kind)) => count(kind, "ack"),
        Some(Answer::Nack(kind, detail)) => {
            count(kind, "nack");
            tracing::warn!(kind = kind.as_str(), detail, "a client refused a response");
        }
    }
    Ok(())
}

fn encode(publication: &Publication, response: Response) -> EncodedDeltaResponse {
    let kind = response.kind;
    let system_version_info = response.system_version();
    let touched = response.resources.len() + response.removed.len();
    let message = EncodedDeltaResponse {
        system_version_info,
        resources: response.resources.iter().map(|resource| resource.encoded.clone()).collect(),
        type_url: kind.type_url().to_owned(),
        removed_resources: response.removed,
        nonce: response.nonce,
        control_plane: Some(ControlPlane { identifier: "nodemesh".to_owned() }),
    };
    let metrics = &publication.0.metrics;
    let labels = KindLabels::of(kind);
    metrics.pushes.get_or_create(&labels).inc();
    metrics.resources.get_or_create(&labels).inc_by(touched as u64);
    metrics.bytes.get_or_create(&labels).inc_by(message.encoded_len() as u64);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_that_began_together_do_not_end_together_and_none_lives_much_longer() {
        let age = Duration::from_secs(1000);
        let ages: Vec<u64> = (0..100).map(|random| spread(age, random).as_secs()).collect();
        assert_eq!((ages.iter().min(), ages.iter().max()), (Some(&800), Some(&1200)));
        assert_eq!(spread(age, u64::MAX - u64::MAX % 41), Duration::from_secs(800));
    }
}
