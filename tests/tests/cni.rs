//! Pods that the container runtime brings: the real CNI plugin, a real agent, and manifests that say neither where a pod's
//! network namespace is nor, at first, its address.

use std::time::Duration;

use mesh_tests::manifests::PodManifest;
use mesh_tests::runtime::{Runtime, previous};
use mesh_tests::shop::{self, TARGET_PORT};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{Agent, Failure, Node, Pod, Shop, TestResult, eventually, require_agent, test_name};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(20);

/// A shop on one node whose runtime has the plugin.
struct Scene {
    shop: Shop,
    runtime: Runtime,
}

impl Scene {
    fn open(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a"])?;
        let runtime = Runtime::of(shop.world().directory(), shop.world().node("a")?)?;
        assert!(runtime.manage("install")?.starts_with("installed"));
        Ok(Self { shop, runtime })
    }

    fn node(&self) -> Result<&Node, Failure> {
        Ok(self.shop.world().node("a")?)
    }

    fn start_agent(&self) -> Result<Agent, Failure> {
        self.start_with(&self.runtime.agent_args())
    }

    fn start_with(&self, args: &[String]) -> Result<Agent, Failure> {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        Ok(self.node()?.agent().args(&args).start()?)
    }

    /// A pod as the API server has it before its network is made: no annotation, no address.
    fn scheduled(&self, name: &str) -> Result<Pod, Failure> {
        let pod = self.node()?.pod(&format!("shop/{name}"))?;
        self.shop.world().manifests().apply(unlocated(&pod).with("/status", json!({"phase": "Pending"})))?;
        Ok(pod)
    }
}

/// A running pod of which the manifest does not say where it is.
fn unlocated(pod: &Pod) -> PodManifest {
    pod.manifest().with("/metadata/annotations", json!({})).port("http", TARGET_PORT)
}

/// Waits until the agent shows the pod in this state.
fn wait_state(agent: &Agent, pod: &Pod, state: &str) -> TestResult {
    eventually(SOON, || agent.pod_status(pod).unwrap_or_default(), |row: &Value| row["state"] == state)?;
    Ok(())
}

#[test]
fn a_pod_whose_first_act_is_to_connect_is_meshed_already() -> TestResult {
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let server = scene.shop.pod("a", "server")?;
    let vip = scene.shop.service("server", 80)?;
    let agent = scene.start_agent()?;
    agent.wait_enrolled([&server])?;
    let _serving = scene.shop.serve(&server)?;

    let client = scene.scheduled("client")?;
    assert_eq!(scene.runtime.add(&client)?, previous(&client), "the result is passed on as it came");
    let answered = client.tool()?.connect(vip.v4)?.who()?;
    assert_eq!(answered.server, "server");
    assert_eq!(
        shop::opened(&agent, &client, &server, "proxy")? + shop::opened(&agent, &client, &server, "direct")?,
        1
    );
    scene.runtime.check(&client)?;

    // The API server hears of the address later, which changes nothing.
    scene.shop.world().manifests().apply(unlocated(&client))?;
    assert_eq!(client.tool()?.connect(vip.v6)?.who()?.server, "server");
    Ok(())
}

#[test]
fn many_pods_at_once_are_all_meshed_before_they_start() -> TestResult {
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let agent = scene.start_agent()?;
    let pods: Vec<Pod> = (0..20).map(|n| scene.scheduled(&format!("p{n}"))).collect::<Result<_, _>>()?;
    let added: Vec<Result<Value, _>> = std::thread::scope(|scope| {
        let adds: Vec<_> = pods.iter().map(|pod| scope.spawn(|| scene.runtime.add(pod))).collect();
        adds.into_iter().map(|add| add.join().expect("the runtime does not panic")).collect()
    });
    for (pod, added) in pods.iter().zip(added) {
        added?;
        assert_eq!(agent.pod_status(pod)?["state"], "enrolled", "{}", pod.name());
    }
    Ok(())
}

#[test]
fn a_pod_that_is_taken_away_is_out_of_the_kernel_when_the_runtime_is_answered() -> TestResult {
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let agent = scene.start_agent()?;
    let (gone, stays) = (scene.scheduled("gone")?, scene.scheduled("stays")?);
    scene.runtime.add(&gone)?;
    scene.runtime.add(&stays)?;
    // Its last process is still there, as it is in a real runtime.
    let _last = gone.tool()?;
    scene.runtime.del(&gone)?;
    assert_ne!(agent.pod_status(&gone)?["state"], "enrolled");
    assert_eq!(agent.pod_status(&stays)?["state"], "enrolled");
    assert!(scene.runtime.check(&gone).is_err());
    scene.runtime.del(&gone)?;

    // Started again in a new sandbox of the same namespace.
    scene.runtime.add(&gone)?;
    scene.runtime.check(&gone)?;
    // What the runtime no longer has is forgotten, the rest is not.
    scene.runtime.gc(&[&stays])?;
    eventually(SOON, || agent.pod_status(&gone).unwrap_or_default(), |row| row["state"] != "enrolled")?;
    scene.runtime.check(&stays)?;
    Ok(())
}

#[test]
fn without_an_agent_only_pods_outside_the_mesh_start() -> TestResult {
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let agent = scene.start_agent()?;
    let known = scene.runtime.state_dir().join("cni-pods.json");
    let server = scene.shop.pod("a", "server")?;
    agent.wait_enrolled([&server])?;
    let meshed = |text: &String| text.contains("shop");
    eventually(SOON, || std::fs::read_to_string(&known).unwrap_or_default(), meshed)?;
    let (outside, inside) = (scene.node()?.pod("plain/outside")?, scene.scheduled("inside")?);
    agent.kill9();

    assert_eq!(scene.runtime.add(&outside)?, previous(&outside));
    let refused = scene.runtime.add(&inside).expect_err("a meshed pod waits for its agent");
    assert_eq!(refused.code(), Some(11), "{refused}");
    assert!(refused.to_string().contains("shop/inside"), "{refused}");
    scene.runtime.del(&inside)?;
    scene.runtime.gc(&[])?;
    assert_eq!(scene.runtime.ask("STATUS")?, Value::Null);
    assert_eq!(scene.runtime.ask("VERSION")?["supportedVersions"][4], "1.1.0");

    // The kubelet tries again, and the next agent takes it in.
    let _agent = scene.start_agent()?;
    scene.runtime.add(&inside)?;
    scene.runtime.check(&inside)?;
    Ok(())
}

#[test]
fn a_pod_that_cannot_be_enrolled_starts_outside_the_mesh_only_where_that_is_allowed() -> TestResult {
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let allow = ["--cni-unenrolled", "allow"];
    let agent = scene.start_agent()?;
    let pod = scene.scheduled("pod")?;
    // Somebody has the place of the mesh's listener.
    let squatter = pod.tool()?.serve(pod.at4(15001), ServerOptions::named("squatter"))?;
    let refused = scene.runtime.add(&pod).expect_err("it cannot be enrolled").to_string();
    assert!(
        refused.contains("shop/pod cannot be brought into the mesh") && refused.contains("15001"),
        "{refused}"
    );
    scene.runtime.del(&pod)?;
    let log = agent.log_text();
    assert!(log.contains("a pod does not start: it cannot be enrolled"), "{log}");
    assert_eq!(scene.runtime.said()?, "");

    scene.runtime.manage_with("install", &allow)?;
    assert_eq!(scene.runtime.add(&pod)?, previous(&pod));
    let said = scene.runtime.said()?;
    assert!(
        said.contains("shop/pod") && said.contains("15001") && said.contains("starts outside the mesh"),
        "{said}"
    );
    assert_ne!(agent.pod_status(&pod)?["state"], "enrolled");
    drop(squatter);
    wait_state(&agent, &pod, "enrolled")?;

    // The same without an agent.
    let known = scene.runtime.state_dir().join("cni-pods.json");
    let meshed = |text: &String| text.contains("shop");
    eventually(SOON, || std::fs::read_to_string(&known).unwrap_or_default(), meshed)?;
    agent.kill9();
    let late = scene.scheduled("late")?;
    assert_eq!(scene.runtime.add(&late)?, previous(&late));
    let said = scene.runtime.said()?;
    assert!(
        said.contains("pod shop/late is to be meshed, and the node's mesh agent does not answer"),
        "{said}"
    );

    // The next agent finds it by its processes, and says of others what becomes of them.
    let _running = late.tool()?;
    scene.shop.world().manifests().apply(unlocated(&late))?;
    let agent =
        scene.start_with(&[scene.runtime.agent_args(), allow.map(str::to_owned).to_vec()].concat())?;
    wait_state(&agent, &late, "enrolled")?;
    let third = scene.scheduled("third")?;
    let _squatter = third.tool()?.serve(third.at4(15001), ServerOptions::named("squatter"))?;
    scene.runtime.add(&third)?;
    let log = agent.log_text();
    assert!(log.contains("a pod starts outside the mesh: it cannot be enrolled"), "{log}");
    Ok(())
}

#[test]
fn a_node_that_the_mesh_has_left_starts_every_pod() -> TestResult {
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let inside = scene.scheduled("inside")?;
    // Nothing but the plugin is left: no agent, no state.
    assert_eq!(scene.runtime.add(&inside)?, previous(&inside));
    assert_eq!(scene.runtime.manage("uninstall")?, "uninstalled");
    assert!(!scene.runtime.program().exists());
    assert_eq!(scene.runtime.chain()?, [json!({"type": "ptp"})]);
    assert_eq!(scene.runtime.manage("uninstall")?, "nothing to uninstall");
    Ok(())
}

#[test]
fn an_agent_puts_the_plugin_in_place_and_keeps_it_there_until_the_mesh_leaves() -> TestResult {
    require_agent!();
    let scene = Scene::open(test_name!())?;
    scene.runtime.manage("uninstall")?;
    let agent = scene.start_with(&scene.runtime.installing_agent_args())?;
    let types = || -> Vec<Value> {
        scene.runtime.chain().unwrap_or_default().iter().map(|plugin| plugin["type"].clone()).collect()
    };
    assert_eq!(types(), ["ptp", "nodemesh-cni"], "ready means that it is there");
    let pod = scene.scheduled("pod")?;
    scene.runtime.add(&pod)?;
    // Another tool rewrites the chain, and somebody clears the folder of plugins.
    scene.runtime.configure(&["ptp", "portmap"])?;
    std::fs::remove_file(scene.runtime.program())?;
    eventually(SOON, types, |now| *now == ["ptp", "portmap", "nodemesh-cni"])?;
    eventually(SOON, || scene.runtime.program().exists(), |there| *there)?;
    // An agent that goes leaves it to the next one, unless it was told that there is none.
    agent.terminate(SOON)?;
    assert_eq!(types().len(), 3);
    let agent = scene.start_with(&scene.runtime.installing_agent_args())?;
    std::fs::write(scene.runtime.state_dir().join("uninstall"), "")?;
    agent.terminate(SOON)?;
    assert_eq!(types(), ["ptp", "portmap"]);
    assert!(!scene.runtime.program().exists());
    Ok(())
}

/// As the configurations of some networks are written to this day.
#[test]
fn a_chain_by_the_oldest_version_that_has_chains_takes_the_plugin() -> TestResult {
    require_agent!();
    let scene = Scene::open(test_name!())?;
    scene.runtime.manage("uninstall")?;
    scene.runtime.configure_as("0.3.0", &["ptp"])?;
    let agent = scene.start_with(&scene.runtime.installing_agent_args())?;
    let pod = scene.scheduled("pod")?;
    let mut made = previous(&pod);
    made["cniVersion"] = "0.3.0".into();
    // Results of that time said of each address which family it is of.
    for (at, family) in ["4", "6"].into_iter().enumerate() {
        made["ips"][at]["version"] = family.into();
    }
    assert_eq!(scene.runtime.add_after(&pod, &made)?, made, "the result is passed on as it came");
    assert_eq!(agent.pod_status(&pod)?["state"], "enrolled");
    scene.runtime.del(&pod)?;
    assert_ne!(agent.pod_status(&pod)?["state"], "enrolled");
    Ok(())
}

#[test]
fn the_next_agent_knows_the_pods_of_the_one_before() -> TestResult {
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let agent = scene.start_agent()?;
    let pod = scene.scheduled("pod")?;
    scene.runtime.add(&pod)?;
    let before = agent.pod_status(&pod)?;
    agent.kill9();
    // No process of the pod runs: only the runtime ever said where it is.
    let agent = scene.start_agent()?;
    let after = agent.pod_status(&pod)?;
    assert_eq!((&after["state"], &after["pod_id"]), (&json!("enrolled"), &before["pod_id"]), "{after}");
    Ok(())
}

#[test]
fn pods_that_ran_before_the_agent_came_are_found_and_their_connections_live_on() -> TestResult {
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let (client, server) = (scene.node()?.pod("shop/client")?, scene.node()?.pod("shop/server")?);
    let _serving = scene.shop.serve(&server)?;
    let early = client.tool()?.connect(server.at4(TARGET_PORT))?;
    assert_eq!(early.who()?.server, "server");
    let agent = scene.start_agent()?;
    let plain = |pod: &Pod| unlocated(pod).label("nodemesh.dev/mesh", "disabled");
    for pod in [&client, &server] {
        scene.shop.world().manifests().apply(plain(pod))?;
    }
    // Opting in needs no restart of anything.
    for pod in [&client, &server] {
        scene.shop.world().manifests().apply(unlocated(pod))?;
        wait_state(&agent, pod, "enrolled")?;
    }
    let late = client.tool()?.connect(server.at4(TARGET_PORT))?;
    assert_eq!((early.who()?.server, late.who()?.server), ("server".to_owned(), "server".to_owned()));
    assert!(shop::opened(&agent, &client, &server, "proxy")? >= 1);
    // And opting out breaks nothing either.
    scene.shop.world().manifests().apply(plain(&client))?;
    eventually(SOON, || agent.pod_status(&client).unwrap_or_default(), |row| row["state"] != "enrolled")?;
    assert_eq!(early.who()?.server, "server");
    Ok(())
}
