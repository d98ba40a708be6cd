//! Clients that speak WDS and know nothing of ours, as Istio's ztunnel.

use std::{collections::BTreeSet, sync::Arc};

use mesh_control::{
    link::{Kind, WILDCARD},
    publish::{metrics::Client, server::controller_identity},
    subscribe::channel::{ControllerUrl, connect},
};
use mesh_core::{
    mode::{Mode, PortModes},
    snapshot::{Parts, Workload},
};
use mesh_identity::{TrustDomains, bundle::Trust, tls::TlsContext};
use mesh_wire::proto::{
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    workload::{Address, address},
};
use prost::Message as _;
use tokio::{sync::mpsc, time::timeout};
use tonic::{Request, Streaming, codegen::tokio_stream::wrappers::ReceiverStream};

use crate::bed::{Bed, LIMIT, pod, shop};

struct Foreign {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Foreign {
    /// Comes with a node's token, as ztunnel does with the one of its service account.
    async fn come(bed: &Bed, first: DeltaDiscoveryRequest) -> Self {
        let trust = Trust::new(TrustDomains::new("cluster.local"), bed.roots()).unwrap();
        let context = TlsContext { trust: Arc::new(trust), clock: Arc::clone(&bed.clock) as _ };
        let tls = context.client(None, &[controller_identity("cluster.local", "istio-system")]).unwrap();
        let url = ControllerUrl::parse(&format!("https://{}", bed.addr())).unwrap();
        let channel = connect(&url, Arc::new(tls), None).await.unwrap();
        let (requests, outbound) = mpsc::channel(64);
        requests.send(first).await.unwrap();
        let mut call = Request::new(ReceiverStream::new(outbound));
        let bearer = format!("Bearer {}", bed.token("n1"));
        call.metadata_mut().insert("authorization", bearer.parse().unwrap());
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses = client.delta_aggregated_resources(call).await.unwrap().into_inner();
        Self { requests, responses }
    }

    async fn next(&mut self) -> DeltaDiscoveryResponse {
        let next = timeout(LIMIT, self.responses.message()).await.expect("a response comes");
        let response = next.unwrap().expect("the stream goes on");
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(ack).await.unwrap();
        response
    }
}

fn ask(kind: Kind, names: &[&str], without: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: kind.type_url().to_owned(),
        resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
        resource_names_unsubscribe: without.iter().map(|name| (*name).to_owned()).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn address(body: &[u8]) -> address::Type {
    Address::decode(body).unwrap().r#type.unwrap()
}

#[tokio::test]
async fn a_foreign_client_gets_plain_wds_and_nothing_of_ours() {
    let mut bed = Bed::new("wds", shop());
    let controller = bed.controller().await;
    let mut client = Foreign::come(&bed, ask(Kind::Address, &[WILDCARD], &[])).await;
    let response = client.next().await;
    assert_eq!(response.type_url, Kind::Address.type_url());
    assert!(response.system_version_info.is_empty(), "a commit is for our agents");
    let mut found = BTreeSet::new();
    for resource in &response.resources {
        match address(&resource.resource.as_ref().unwrap().value) {
            address::Type::Workload(workload) => {
                assert_eq!(resource.name, workload.uid);
                assert!(!resource.aliases.is_empty());
                found.insert(workload.name);
            }
            address::Type::Service(service) => {
                assert_eq!(resource.name, format!("{}/{}", service.namespace, service.hostname));
                found.insert(service.hostname);
            }
        }
    }
    let wanted = ["cart", "front.shop.svc.cluster.local", "web"].map(str::to_owned);
    assert_eq!(found, BTreeSet::from(wanted));
    let sessions = controller.publication.sessions();
    assert_eq!((sessions.len(), sessions[0].client), (1, Client::Foreign));
}

#[tokio::test]
async fn a_strict_port_reaches_a_foreign_client_as_an_authorization() {
    let strict = PortModes { default: Mode::Strict, ..PortModes::default() };
    let cart = Workload { modes: strict, ..pod("cart", "n1", "10.1.0.1") };
    let mut bed = Bed::new("strict", Parts { workloads: vec![Arc::new(cart)], ..Parts::default() });
    let _controller = bed.controller().await;
    let mut client = Foreign::come(&bed, ask(Kind::Authorization, &[], &[])).await;
    let response = client.next().await;
    assert_eq!(response.resources.len(), 1);
    let mut client = Foreign::come(&bed, ask(Kind::Address, &[], &[])).await;
    let addresses = client.next().await;
    let address::Type::Workload(cart) = address(&addresses.resources[0].resource.as_ref().unwrap().value)
    else {
        panic!("{addresses:?}")
    };
    assert_eq!(cart.authorization_policies, [response.resources[0].name.clone()]);
}

#[tokio::test]
async fn a_client_on_demand_is_answered_by_address_and_told_of_changes() {
    let mut bed = Bed::new("demand", shop());
    let _controller = bed.controller().await;
    // Nothing yet, in the way ztunnel says it.
    let mut client = Foreign::come(&bed, ask(Kind::Address, &[WILDCARD], &[WILDCARD])).await;
    client.requests.send(ask(Kind::Address, &["/10.1.0.1", "/10.9.9.9"], &[])).await.unwrap();
    let response = client.next().await;
    assert_eq!(response.resources.len(), 1);
    assert_eq!(response.removed_resources, ["/10.9.9.9"], "an answer, not silence");
    let uid = response.resources[0].name.clone();
    let mut parts = shop();
    let cart = Workload { ready: false, ..(*parts.workloads[0]).clone() };
    parts.workloads[0] = Arc::new(cart);
    bed.publish(parts);
    let response = client.next().await;
    assert_eq!(response.resources[0].name, uid);
    bed.publish(Parts::default());
    let response = client.next().await;
    assert_eq!(response.removed_resources, [uid]);
}

#[tokio::test]
async fn a_client_that_does_not_answer_gets_the_newest_state_when_it_does() {
    let mut bed = Bed::new("slow", shop());
    let controller = bed.controller().await;
    let mut client = Foreign::come(&bed, ask(Kind::Address, &[WILDCARD], &[])).await;
    let mut held = Vec::new();
    held.push(timeout(LIMIT, client.responses.message()).await.unwrap().unwrap().unwrap());
    for round in 0..200_u32 {
        let mut parts = shop();
        let labels = [("round".into(), round.to_string().into())].into();
        parts.workloads[0] = Arc::new(Workload { labels, ..(*parts.workloads[0]).clone() });
        let before = controller.publication.generation();
        bed.publish(parts);
        crate::bed::eventually("the generation", || controller.publication.generation() > before).await;
    }
    let sent = controller.publication.sessions()[0].kinds["address"].sent;
    assert!(sent <= mesh_control::publish::session::OUTSTANDING_MAX as u64, "{sent}");
    while (held.len() as u64) < sent {
        held.push(timeout(LIMIT, client.responses.message()).await.unwrap().unwrap().unwrap());
    }
    for response in held {
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            ..DeltaDiscoveryRequest::default()
        };
        client.requests.send(ack).await.unwrap();
    }
    let newest = client.next().await;
    let address::Type::Workload(_) = address(&newest.resources[0].resource.as_ref().unwrap().value) else {
        panic!("{newest:?}")
    };
    crate::bed::eventually("up to date", || controller.publication.sessions()[0].behind == 0).await;
    let sent = controller.publication.sessions()[0].kinds["address"].sent;
    assert!(
        sent <= 2 + mesh_control::publish::session::OUTSTANDING_MAX as u64,
        "200 changes, {sent} responses"
    );
}

#[tokio::test]
async fn a_node_has_only_so_many_streams() {
    let mut bed = Bed::new("streams", shop());
    let controller = bed.controller().await;
    let mut clients = Vec::new();
    for _ in 0..mesh_control::publish::seats::SESSIONS_PER_NODE_MAX {
        clients.push(Foreign::come(&bed, ask(Kind::Address, &[WILDCARD], &[])).await);
    }
    let trust = Trust::new(TrustDomains::new("cluster.local"), bed.roots()).unwrap();
    let context = TlsContext { trust: Arc::new(trust), clock: Arc::clone(&bed.clock) as _ };
    let tls = context.client(None, &[controller_identity("cluster.local", "istio-system")]).unwrap();
    let url = ControllerUrl::parse(&format!("https://{}", bed.addr())).unwrap();
    let channel = connect(&url, Arc::new(tls), None).await.unwrap();
    let (_requests, outbound) = mpsc::channel(1);
    let mut call = Request::new(ReceiverStream::new(outbound));
    let bearer = format!("Bearer {}", bed.token("n1"));
    call.metadata_mut().insert("authorization", bearer.parse().unwrap());
    let refused = AggregatedDiscoveryServiceClient::new(channel).delta_aggregated_resources(call).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::ResourceExhausted);
    assert_eq!(controller.metrics.refusals("too_many_sessions"), 1);
}
