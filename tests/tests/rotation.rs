//! Certificates that are replaced while traffic runs: a new root, short lives, a plugged-in authority.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use mesh_tests::authority::{Authority, Leaf, spiffe_of};
use mesh_tests::hbone::{Connect, PORT, Session};
use mesh_tests::manifests::MtlsMode;
use mesh_tests::protocol::{Exchange, Load};
use mesh_tests::{
    Agent, Failure, Pod, Server, Shop, TestResult, eventually, limit, programs, require_agent, test_name,
};

const SOON: Duration = Duration::from_secs(5);

/// Long enough for a rotation, and some.
const ROTATED: Duration = Duration::from_secs(30);

/// Connections that are kept open all the while.
const KEPT: u32 = 200;

/// New connections a second.
const NEW_PER_SECOND: u32 = 100;

struct Scene {
    shop: Shop,
    web: Pod,
    far: Pod,
    agents: Vec<Agent>,
    _server: Server,
}

impl Scene {
    /// Two nodes, STRICT, whose certificates live as long as `ttl`.
    fn set(test: &str, ttl: &str, prepare: impl FnOnce(&Path) -> TestResult) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        shop.mode(MtlsMode::Strict)?;
        prepare(&shop.world().ca_dir())?;
        let (web, far) = (shop.pod("a", "web")?, shop.pod("b", "far")?);
        let _server = shop.serve(&web)?;
        let launch = |node: &mesh_tests::Node| node.agent().args(&["--certificate-ttl", ttl]).launch();
        let agents = shop.world().nodes().map(launch).collect::<Result<Vec<_>, _>>()?;
        for agent in &agents {
            agent.wait_ready()?;
        }
        Ok(Self { shop, web, far, agents, _server })
    }

    /// Run old connections, new connections and new handshakes while `meanwhile` happens: nothing fails.
    fn under_load(&self, meanwhile: impl FnOnce() -> TestResult) -> TestResult {
        let load = |exchange, workers, per_second| Load {
            targets: vec![self.web.at4(8080), self.web.at6(8080)],
            per_second,
            workers,
            duration_ms: 0,
            exchange,
            timeout_ms: u64::try_from(limit(SOON).as_millis()).unwrap_or(u64::MAX),
        };
        let kept = self.far.new_tool()?.start_load(load(Exchange::KeepOpen, KEPT, KEPT * 2))?;
        let new = self.far.tool()?.start_load(load(Exchange::ConnectAndAsk, 20, NEW_PER_SECOND))?;
        let handshakes = Handshakes::start(&self.shop, &self.far, &self.web)?;
        let running = || kept.report().is_ok_and(|report| report.ok > u64::from(KEPT) * 2);
        eventually(SOON, running, |running| *running)?;
        meanwhile()?;
        let (kept, new, handshakes) = (kept.stop()?, new.stop()?, handshakes.stop()?);
        assert_eq!(kept.failures(), 0, "{kept:?}");
        assert_eq!(kept.connects, u64::from(KEPT), "a kept connection was opened anew: {kept:?}");
        assert_eq!(new.failures(), 0, "{new:?}");
        assert!(handshakes > 0, "no handshake was made meanwhile");
        for agent in &self.agents {
            for reason in ["tls_", "certificate_"] {
                let refusals =
                    agent.metric(&["mesh_proxy_connections_closed", &format!("reason=\"{reason}")])?;
                assert!(refusals < 0.5, "{refusals} of {reason}*: {}", agent.http("/metrics")?.1);
            }
        }
        Ok(())
    }

    /// Fingerprint of the certificate above an agent's leaf: of the root itself where that signs leaves, the roots that
    /// are trusted otherwise tell them apart.
    fn roots(&self) -> Result<Vec<Vec<String>>, Failure> {
        let of = |agent: &Agent| -> Result<Vec<String>, Failure> {
            let view = agent.admin("/certificates")?;
            let roots = view["roots"].as_array().cloned().unwrap_or_default();
            Ok(roots.iter().filter_map(|root| root.as_str().map(str::to_owned)).collect())
        };
        self.agents.iter().map(of).collect()
    }

    fn switches(&self) -> Result<Vec<f64>, Failure> {
        let of = |agent: &Agent| {
            Ok(agent.metric(&["mesh_ca_root_switches"])? + agent.metric(&["mesh_ca_reloads_total"])?)
        };
        self.agents.iter().map(of).collect()
    }

    fn serials(&self) -> Result<Vec<String>, Failure> {
        let of = |agent: &Agent| -> Result<String, Failure> {
            let view = agent.admin("/certificates")?;
            Ok(view["certificates"][0]["serial"].as_str().unwrap_or_default().to_owned())
        };
        self.agents.iter().map(of).collect()
    }
}

/// One full handshake after the other with the server's agent, by another make of client whose certificate is of the
/// authority there was at the start.
struct Handshakes {
    stopped: Arc<AtomicBool>,
    made: Arc<AtomicUsize>,
    thread: std::thread::JoinHandle<Result<(), String>>,
}

impl Handshakes {
    fn start(shop: &Shop, from: &Pod, to: &Pod) -> Result<Self, Failure> {
        let credentials = Authority::of_agents(&shop.world().ca_dir())?.issue(&Leaf::of(spiffe_of(from)))?;
        // It trusts what the agents come to trust.
        let ca_dir = shop.world().ca_dir();
        let (stopped, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (from, to, until, count) = (from.place(), to.clone(), Arc::clone(&stopped), Arc::clone(&made));
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Acquire) {
                let trust = Authority::of_agents(&ca_dir).map_err(|error| error.to_string())?;
                let credentials = credentials.clone().also_trusting(&trust);
                let session = Session::open(&from, to.at4(PORT), &credentials);
                let tunnel = session.and_then(|session| session.connect(&Connect::to(to.at4(8080))));
                tunnel
                    .and_then(|mut tunnel| tunnel.who())
                    .map_err(|error| format!("a handshake: {error}"))?;
                count.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        Ok(Self { stopped, made, thread })
    }

    fn stop(self) -> Result<usize, Failure> {
        self.stopped.store(true, Ordering::Release);
        let ended = self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ended.map_err(anyhow::Error::msg)?;
        Ok(self.made.load(Ordering::Relaxed))
    }
}

#[test]
fn a_root_is_replaced_under_load_without_a_failed_handshake() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), "6s", |_| Ok(()))?;
    let before = scene.roots()?;
    scene.under_load(|| {
        let mut rotate = Command::new(programs::agent()?);
        rotate.args(["ca", "rotate", "--announce", "2s", "--ca-dir"]).arg(scene.shop.world().ca_dir());
        let output = rotate.output()?;
        assert!(output.status.success(), "{output:?}");
        eventually(
            ROTATED,
            || scene.roots().map_err(|error| format!("{error:?}")),
            |roots| roots.as_ref().is_ok_and(|roots| roots.iter().all(|roots| roots.len() == 2)),
        )?
        .map_err(anyhow::Error::msg)?;
        eventually(
            ROTATED,
            || scene.switches().map_err(|error| format!("{error:?}")),
            |switches| {
                switches.as_ref().is_ok_and(|switches| switches.iter().all(|switches| *switches >= 1.0))
            },
        )?
        .map_err(anyhow::Error::msg)?;
        // Until the certificates in use are of the new root, on both nodes.
        let old = scene.serials()?;
        eventually(
            ROTATED,
            || scene.serials().map_err(|error| format!("{error:?}")),
            |serials| serials.as_ref().is_ok_and(|now| now.iter().zip(&old).all(|(now, old)| now != old)),
        )?
        .map_err(anyhow::Error::msg)?;
        Ok(())
    })?;
    let after = scene.roots()?;
    assert!(after[0].contains(&before[0][0]), "the old root is still trusted: {after:?}");
    Ok(())
}

#[test]
fn certificates_that_live_for_seconds_are_renewed_under_load() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!(), "4s", |_| Ok(()))?;
    scene.under_load(|| {
        let renewed = || -> Result<f64, Failure> {
            let of = |agent: &Agent| agent.metric(&["mesh_certificate_attempts", "outcome=\"renewed\""]);
            Ok(scene
                .agents
                .iter()
                .map(of)
                .collect::<Result<Vec<_>, _>>()?
                .into_iter()
                .fold(f64::MAX, f64::min))
        };
        eventually(
            ROTATED,
            || renewed().map_err(|error| format!("{error:?}")),
            |renewed| renewed.as_ref().is_ok_and(|renewed| *renewed >= 2.0),
        )?
        .map_err(anyhow::Error::msg)?;
        Ok(())
    })
}

#[test]
fn a_plugged_in_intermediate_issues_and_is_shown() -> TestResult {
    require_agent!();
    let root = Authority::root("corporate root")?;
    let intermediate = root.intermediate("mesh intermediate")?;
    let scene = Scene::set(test_name!(), "1h", |ca_dir| Ok(intermediate.plug_in(ca_dir, &[])?))?;
    assert_eq!(scene.far.tool()?.who(scene.web.at4(8080))?.server, "web");
    let view = scene.agents[0].meshctl(&["certificates"])?;
    assert_eq!(view["certificates"][0]["chain_depth"], 2, "{view:#}");
    // A client whose certificate is of another intermediate of the same root is as good.
    let other = root.intermediate("another intermediate")?;
    let credentials = other.issue(&Leaf::of(spiffe_of(&scene.far)))?;
    let session = Session::open(&scene.far, scene.web.at4(PORT), &credentials)?;
    assert_eq!(session.connect(&Connect::to(scene.web.at4(8080)))?.who()?.server, "web");
    Ok(())
}

#[test]
fn nodes_with_keys_of_different_kinds_are_one_mesh() -> TestResult {
    require_agent!();
    let kinds = [("a", "ed25519"), ("b", "ecdsa-p384"), ("c", "rsa-2048")];
    let shop = Shop::open(test_name!(), &kinds.map(|(node, _)| node))?;
    shop.mode(MtlsMode::Strict)?;
    let pods = kinds.map(|(node, _)| shop.pod(node, &format!("web-{node}")));
    let pods = pods.into_iter().collect::<Result<Vec<_>, _>>()?;
    let _servers = pods.iter().map(|pod| shop.serve(pod)).collect::<Result<Vec<_>, _>>()?;
    let agents = kinds
        .iter()
        .map(|(node, kind)| Ok(shop.world().node(node)?.agent().args(&["--key-algorithm", kind]).launch()?))
        .collect::<Result<Vec<_>, Failure>>()?;
    for agent in &agents {
        agent.wait_ready()?;
    }
    for from in &pods {
        for to in pods.iter().filter(|to| to.name() != from.name()) {
            assert_eq!(from.tool()?.who(to.at4(8080))?.server, to.name(), "from {}", from.name());
        }
    }
    for (agent, (_, kind)) in agents.iter().zip(kinds) {
        let view = agent.meshctl(&["certificates"])?;
        // Any RSA key has the name of its family: authorities bring longer ones.
        assert_eq!(view["certificates"][0]["key"], kind.trim_end_matches("-2048"), "{view:#}");
    }
    Ok(())
}
