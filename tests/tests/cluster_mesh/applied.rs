//! What operators apply: a split, a policy, a broken resource, and what the controller says of them. How long after kubectl's return each
//! counts is printed.

use std::net::SocketAddr;
use std::panic;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::ensure;
use mesh_tests::cluster::{Cluster, Kubectl, KubectlError, Mesh, shop};
use mesh_tests::web::messages::{Ask, Mix, MixReport, Script, Told};
use mesh_tests::{TestResult, eventually};

use crate::scene::LIMIT;

/// When kubectl had applied something. Requests of a load say themselves when they were sent and answered, so what is measured from here
/// does not depend on how often a test looks.
#[derive(Debug, Clone, Copy)]
struct Applied {
    /// Microseconds since 1970.
    at_us: u64,
}

impl Applied {
    fn now() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { at_us: u64::try_from(now.as_micros()).unwrap_or(u64::MAX) }
    }

    /// How much later something was; nothing if kubectl had not even returned.
    fn until(self, at_us: u64) -> Duration {
        Duration::from_micros(at_us.saturating_sub(self.at_us))
    }

    /// When this server first answered after it, if it has.
    fn first_answer(self, report: &MixReport, server: &str) -> Option<u64> {
        let mut later = report.turns.iter().filter(|(at_us, _)| *at_us > self.at_us);
        later.find(|(_, who)| who == server).map(|(at_us, _)| *at_us)
    }
}

/// When the last of the requests was sent that one of these servers has answered; 0 if none was.
fn last_sent_us(report: &MixReport, servers: &[&str]) -> u64 {
    let sent = report.last_sent_us.iter().filter(|(server, _)| servers.contains(&server.as_str()));
    sent.map(|(_, at_us)| *at_us).max().unwrap_or_default()
}

/// A split, a policy and a broken resource.
pub(crate) fn what_is_applied_holds(cluster: &Cluster, mesh: &Mesh<'_>, web: SocketAddr) -> TestResult {
    let kubectl = cluster.kubectl();
    let split = |v1: u8, v2: u8| {
        format!(
            "{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: web, namespace: shop}}, spec: {{hosts: [web], \
             http: [{{route: [{{destination: {{host: web-v1}}, weight: {v1}}}, {{destination: {{host: web-v2}}, weight: {v2}}}]}}]}}}}"
        )
    };
    let client = cluster.pod("shop", "client");
    let versions = || -> anyhow::Result<(usize, usize)> {
        let script = Script { to: web, http2: false, requests: vec![Ask::get("web", "/"); 60] };
        let told = client.ask(&script)?;
        ensure!(told.iter().all(|told| told.status == 200), "{told:?}");
        let v2 = told.iter().filter(|told| told.seen().is_ok_and(|seen| seen.server == "v2")).count();
        Ok((told.len() - v2, v2))
    };
    let mix = Mix { keep_alive: 1, short: 1, http2: 0, pause_ms: 10, ..shop::mix(web, "web") };
    let load = client.load(&mix)?;
    load.go_on(20, LIMIT)?;
    kubectl.apply(&split(0, 100))?;
    let applied = Applied::now();
    eventually(LIMIT, versions, |seen| seen.as_ref().is_ok_and(|seen| *seen == (0, 60)))??;
    println!("0/100 counts after {:?}", applied.until(last_sent_us(&load.stop(), &["v1"])));

    // Another load: what the one before remembers of turns has a bound.
    let load = client.load(&mix)?;
    load.go_on(20, LIMIT)?;
    kubectl.apply(&split(90, 10))?;
    let (applied, begun) = (Applied::now(), Instant::now());
    let (answered, judged) = thread::scope(|scope| {
        let judged = scope.spawn(|| is_judged(kubectl, "web").map(|()| begun.elapsed()));
        let first = |report: &MixReport| applied.first_answer(report, "v1");
        let answered = eventually(LIMIT, || load.report(), |report| first(report).is_some());
        (answered.map(|report| first(&report)), judged.join().unwrap_or_else(|why| panic::resume_unwind(why)))
    });
    let (answered, judged) = (answered?.unwrap_or_default(), judged?);
    println!("90/10 counts after {:?}, and its status says so after {judged:?}", applied.until(answered));
    eventually(LIMIT, versions, |seen| seen.as_ref().is_ok_and(|(v1, v2)| v1 > v2 && *v2 > 0))??;
    drop(load);

    // The other namespace joins too, and is let in until a policy says otherwise.
    mesh.enrol("outside")?;
    let neighbour = || cluster.pod("outside", "client").get(web, "web", "/");
    let let_in = |told: &anyhow::Result<Told>| told.as_ref().is_ok_and(|told| told.status == 200);
    eventually(LIMIT, neighbour, let_in)??;
    let load = cluster.pod("outside", "client").load(&mix)?;
    let before = load.go_on(20, LIMIT)?;
    kubectl.apply(
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: not-you, namespace: shop}, spec: {action: DENY, \
         rules: [{from: [{source: {namespaces: [outside]}}]}]}}",
    )?;
    let applied = Applied::now();
    eventually(LIMIT, neighbour, |told| !let_in(told))??;
    eventually(LIMIT, || load.report().failures(), |failed| *failed > before.failures())?;
    println!("a policy refuses after {:?}", applied.until(last_sent_us(&load.stop(), &["v1", "v2"])));
    kubectl.run(&["delete", "authorizationpolicy", "-n", "shop", "not-you"])?;
    eventually(LIMIT, neighbour, let_in)??;

    let broken = split(90, 10).replace("weight: 90", "weight: 90, weigth: 1");
    let refused = kubectl.apply(&broken).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(refused.contains("weigth"), "{refused}");
    let broken = split(90, 10).replace("host: web-v1", "host: ''");
    let refused = kubectl.apply(&broken).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(refused.contains("spec.http[0].route[0].destination.host"), "{refused}");
    Ok(())
}

/// Waits until the leading controller has said of a VirtualService, as it is now, that it is used. kubectl watches, so it is told at once.
pub(crate) fn is_judged(kubectl: &Kubectl, name: &str) -> Result<(), KubectlError> {
    let what = format!("virtualservice/{name}");
    let wait = ["wait", &what, "-n", "shop", "--for=condition=Reconciled", "--timeout=120s"];
    kubectl.run(&wait).map(drop)
}
