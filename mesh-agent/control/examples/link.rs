//! What one changed endpoint costs on the controller link of a large mesh: bytes, resources and time from the new snapshot
//! in the controller to the new snapshot in an agent, over loopback TLS.
//!
//! ```text
//! cargo run --release -p mesh-control --example link -- [SERVICES] [CHANGES]
//! ```

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_control::{
    link::{Kind, token::JoinSecret},
    publish::{
        auth::NodeProof,
        metrics::PublishMetrics,
        server::{Controller, OWN_TTL, ServerParts},
    },
    status::SourceStatus,
    subscribe::{self, SubscribeOptions, channel::ControllerUrl},
};
use mesh_core::{
    id::WorkloadId,
    snapshot::{Endpoint, Name, Parts, Protocol, Service, ServicePort, Snapshot, Workload},
};
use mesh_identity::{Ca, ca::CaOptions, clock::SystemClock};
use tokio::{net::TcpListener, sync::watch, time::timeout};
use zeroize::Zeroizing;

const NODES: u32 = 10;
const ENDPOINTS: u32 = 3;
const LIMIT: Duration = Duration::from_secs(120);

type Error = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let services: u32 = args.next().map_or(Ok(10_000), |text| text.parse())?;
    let changes: usize = args.next().map_or(Ok(50), |text| text.parse())?;
    let folder = std::env::temp_dir().join(format!("nodemesh-link-example-{}", std::process::id()));
    let outcome = run(services, changes, &folder).await;
    std::fs::remove_dir_all(&folder)?;
    outcome
}

async fn run(services: u32, changes: usize, folder: &std::path::Path) -> Result<(), Error> {
    let ca = Arc::new(Ca::open(CaOptions::new(folder.join("ca"), "cluster.local"))?);
    let mut parts = world(services);
    let (snapshots, snapshot) = watch::channel(Arc::new(Snapshot::new(1, parts.clone())));
    let (_sources, source) = watch::channel(Arc::new(SourceStatus::default()));
    let secret = JoinSecret::generate()?;
    let token = secret.token("n0");
    let metrics = PublishMetrics::default();
    let started = Instant::now();
    let controller = Controller::new(ServerParts {
        listener: TcpListener::bind("127.0.0.1:0").await?,
        ca: Arc::clone(&ca),
        proof: NodeProof::JoinSecret(Box::new(secret)),
        namespace: "istio-system".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        own_ttl: OWN_TTL,
        session_age: None,
        snapshots: snapshot,
        sources: source,
        clock: Arc::new(SystemClock),
        metrics: metrics.clone(),
    })?;
    println!("{services} services, {} pods: encoded in {:.0} ms", parts.workloads.len(), ms(started));
    let options = SubscribeOptions {
        controller: ControllerUrl::parse(&format!("https://{}", controller.addr()))?,
        identity: controller.identity().clone(),
        roots: ca.trust().borrow().as_ref().clone(),
        node: "n0".to_owned(),
        token: Some(Zeroizing::new(token)),
        state_dir: folder.to_owned(),
    };
    let server = tokio::spawn(controller.run(std::future::pending()));
    let started = Instant::now();
    let mut agent = subscribe::start_with(options, Arc::new(SystemClock), false)?;
    timeout(LIMIT, agent.link.wait_for(|link| link.generation.is_some())).await??;
    let bytes = || Kind::ALL.map(|kind| metrics.bytes_sent(kind)).iter().sum::<u64>();
    let resources = || Kind::ALL.map(|kind| metrics.resources_sent(kind)).iter().sum::<u64>();
    println!(
        "an agent has all of it after {:.0} ms: {} resources, {} bytes",
        ms(started),
        resources(),
        bytes()
    );
    // The first save of the whole state is not what is measured.
    tokio::time::sleep(Duration::from_secs(5)).await;

    let (before, before_resources) = (bytes(), resources());
    let mut times = Vec::with_capacity(changes);
    for round in 0..changes {
        let at = round * 37 % parts.services.len();
        let mut service = (*parts.services[at]).clone();
        service.ports[0].endpoints[0].ready = !service.ports[0].endpoints[0].ready;
        let (name, ready) = (service.name.clone(), service.ports[0].endpoints[0].ready);
        parts.services[at] = Arc::new(service);
        let new = Arc::new(Snapshot::new(round as u64 + 2, parts.clone()));
        let started = Instant::now();
        snapshots.send_replace(new);
        let is_there = |snapshot: &Arc<Snapshot>| {
            snapshot.service(&name).is_some_and(|service| service.ports[0].endpoints[0].ready == ready)
        };
        timeout(LIMIT, agent.snapshots.wait_for(is_there)).await??;
        times.push(ms(started));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    times.sort_by(f64::total_cmp);
    let per_change = |total: u64| total as f64 / changes as f64;
    println!(
        "one changed endpoint: {:.1} ms median, {:.1} ms at most; {:.0} bytes, {:.2} resources",
        times[times.len() / 2],
        times[times.len() - 1],
        per_change(bytes() - before),
        per_change(resources() - before_resources),
    );
    server.abort();
    Ok(())
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Services with three pods each, spread over nodes.
fn world(services: u32) -> Parts {
    let mut parts = Parts::default();
    for number in 0..services {
        let namespace = format!("ns{}", number % 50);
        let pods: Vec<Workload> = (0..ENDPOINTS)
            .map(|replica| {
                let name = format!("app{number}-{replica}");
                Workload {
                    id: WorkloadId::of_pod(&namespace, &name, ""),
                    node: format!("n{}", (number + replica) % NODES).into(),
                    addrs: vec![std::net::Ipv4Addr::from(0x0a00_0000 + number * ENDPOINTS + replica).into()],
                    meshed: true,
                    ready: true,
                    labels: [("app".into(), format!("app{number}").into())].into(),
                    ..Workload::named(Name::new(namespace.as_str(), name))
                }
            })
            .collect();
        let endpoints = pods.iter().map(|pod| Endpoint {
            addr: pod.addrs[0],
            port: 8080,
            workload: Some(pod.id),
            ready: true,
            hostname: None,
            traits: None,
        });
        let port = ServicePort {
            name: "http".into(),
            port: 80,
            protocol: Protocol::Tcp,
            app_protocol: None,
            endpoints: endpoints.collect(),
        };
        parts.services.push(Arc::new(Service {
            vips: vec![std::net::Ipv4Addr::from(0x0b00_0000 + number).into()],
            ports: vec![port],
            ..Service::named(Name::new(namespace, format!("app{number}")))
        }));
        parts.workloads.extend(pods.into_iter().map(Arc::new));
    }
    parts
}
