//! Each thing that can be wrong is found, with what to do about it; and what is whole is called whole.

use k8s_openapi::{
    ByteString, api::admissionregistration::v1::ValidatingWebhook,
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use serde_json::json;

use super::*;
use crate::{ctl::install::finding::Grade, view::PodView};

const SPACE: &str = "nodemesh-system";
const LOGS: &str = "kubectl -n nodemesh-system logs deploy/nodemesh-controller";

/// What an agent says to which nothing is amiss.
const WHOLE: &str = r#"{
    "agent": {"version": "0.1.0", "node": "n1", "pid": 7, "uptime_s": 65.0, "phase": "ready", "waiting_for": [],
        "workers": 2, "heartbeat_age_ns": 40000000},
    "kernel": {"release": "6.18.0", "abi": "00000000000000ff", "pins": "/sys/fs/bpf/nodemesh/n1", "cgroup_root": "/sys/fs/cgroup",
        "programs": [
            {"name": "connect4", "id": 11, "attached": true, "adopted": false},
            {"name": "connect6", "id": 12, "attached": true, "adopted": true},
            {"name": "tcp_events", "id": 13, "attached": true, "adopted": false}
        ], "foreign_programs": []},
    "snapshot": {"version": 4, "workloads": 9, "services": 2, "source": "https://10.0.0.1:15012"},
    "identity": {"trust_domain": "cluster.local", "trust_domain_aliases": [], "issuer": "https://10.0.0.1:15012", "wanted": 2,
        "valid": 2, "reason": null},
    "controller": {"url": "https://10.0.0.1:15012", "connected": true, "since_s": 61.0, "last_contact_s": 0.5, "reason": null,
        "attempts": 0, "generation": 4, "refused_resources": 0, "certificate_expires_in_s": null},
    "names": {"needed": 0, "resolved": 0, "left_out": 0, "failing": []},
    "pods": [], "source_errors": [], "maps": []
}"#;

fn whole() -> StatusView {
    let mut view: StatusView = serde_json::from_str(WHOLE).unwrap();
    view.pods = vec![pod("cart", PodState::Enrolled), pod("host", PodState::Skipped)];
    view
}

fn pod(name: &str, state: PodState) -> PodView {
    PodView {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        workload_id: "w0000000000000001".to_owned(),
        addrs: Vec::new(),
        netns: None,
        state,
        pod_id: None,
        netns_cookie: None,
        reason: (state == PodState::Failed).then(|| "port 15001 is taken".to_owned()),
        attempts: 0,
        retry_in_s: None,
    }
}

/// An agent that says this of itself, changed so.
fn judged(change: impl FnOnce(&mut StatusView)) -> Vec<Finding> {
    let mut view = whole();
    change(&mut view);
    judge(&view, "node n1")
}

#[test]
fn an_agent_to_which_nothing_is_amiss_has_one_good_row() {
    let said = "agent 0.1.0, kernel 6.18.0, 1 pods in the mesh";
    assert_eq!(judged(|_| {}), [Finding::good("node n1", said)]);
    // As on a host, where the agent reads manifests itself.
    assert_eq!(judged(|view| view.controller = None), [Finding::good("node n1", said)]);
}

#[test]
fn an_agent_that_is_not_ready_is_an_error_and_says_what_it_waits_for() {
    for phase in [Phase::Starting, Phase::Draining] {
        let found = judged(|view| {
            view.agent.phase = phase;
            view.agent.waiting_for = vec!["the first state".to_owned(), "the CNI plugin".to_owned()];
        });
        let said = "agent is not ready, waits for: the first state; the CNI plugin";
        assert_eq!(found, [Finding::error("node n1", said, "its log says more")], "{phase:?}");
    }
}

#[test]
fn programs_that_are_not_attached_are_named() {
    let found = judged(|view| {
        for program in &mut view.kernel.programs[1..] {
            program.attached = false;
        }
    });
    let advice = "restart the agent; `meshctl status` lists programs of others";
    assert_eq!(found, [Finding::error("node n1", "not attached: connect6, tcp_events", advice)]);
}

#[test]
fn an_agent_with_an_old_state_says_that_it_has_no_link_and_why() {
    let found = judged(|view| {
        let controller = view.controller.as_mut().unwrap();
        controller.connected = false;
        controller.reason = Some("connection refused".to_owned());
    });
    let said = "agent has no link to https://10.0.0.1:15012: connection refused; its last state is in force";
    assert_eq!(found, [Finding::warning("node n1", said, "check the controller, and policies between them")]);
}

#[test]
fn certificates_that_cannot_be_had_are_counted_and_those_being_fetched_are_not() {
    let found = judged(|view| {
        view.identity.valid = 1;
        view.identity.reason = Some("the CA refused: not_hosted".to_owned());
    });
    let said = "1 of 2 certificates are valid: the CA refused: not_hosted";
    assert_eq!(found, [Finding::warning("node n1", said, "`meshctl certificates` lists them all")]);
    let fetched = judged(|view| view.identity.valid = 0);
    assert_eq!((fetched.len(), fetched[0].grade), (1, Grade::Good), "{fetched:?}");
}

#[test]
fn pods_that_cannot_be_enrolled_are_counted_and_the_first_are_named() {
    let found = judged(|view| {
        view.pods.extend(["a", "b", "c", "d"].map(|name| pod(name, PodState::Failed)));
        view.pods[3].reason = None;
    });
    let said = "4 pods cannot be enrolled, e.g. shop/a: port 15001 is taken; shop/b: no reason; shop/c: port 15001 is taken";
    assert_eq!(found, [Finding::error("node n1", said, "`meshctl status` lists them all")]);
}

#[test]
fn everything_that_is_wrong_with_an_agent_is_said_and_nothing_good_beside_it() {
    let found = judged(|view| {
        view.agent.phase = Phase::Starting;
        view.kernel.programs[0].attached = false;
        view.controller.as_mut().unwrap().connected = false;
        view.pods.push(pod("odd", PodState::Failed));
    });
    let grades: Vec<Grade> = found.iter().map(|finding| finding.grade).collect();
    assert_eq!(grades, [Grade::Error, Grade::Error, Grade::Warning, Grade::Error], "{found:?}");
    assert!(found.iter().all(|finding| !finding.advice.is_empty()), "{found:?}");
}

fn node(name: &str, pool: &str) -> Node {
    serde_json::from_value(json!({"metadata": {"name": name, "labels": {"pool": pool}}})).unwrap()
}

fn agent_pod(node: &str, reason: Option<&str>) -> (String, AgentPod) {
    let pod = AgentPod {
        name: format!("nodemesh-agent-{node}"),
        node: node.to_owned(),
        ready: reason.is_none(),
        image: "nodemesh:1".to_owned(),
        reason: reason.map(ToOwned::to_owned),
    };
    (node.to_owned(), pod)
}

#[test]
fn a_node_whose_agent_cannot_be_asked_says_why() {
    let labels = [("pool".to_owned(), "mesh".to_owned())].into();
    let wanted =
        Selector::try_from(LabelSelector { match_labels: Some(labels), match_expressions: None }).unwrap();
    let agents: BTreeMap<String, AgentPod> =
        [agent_pod("good", None), agent_pod("bad", Some("container agent waits: CrashLoopBackOff"))].into();
    let of = |name: &str, pool: &str| {
        agent_of(&node(name, pool), &wanted, &agents, SPACE).map(|agent| agent.name.clone())
    };

    assert_eq!(of("good", "mesh"), Ok("nodemesh-agent-good".to_owned()));
    let advice = "kubectl -n nodemesh-system describe daemonset nodemesh-agent";
    assert_eq!(of("new", "mesh"), Err(Finding::error("node new", "has no agent", advice)));
    let said = "agent nodemesh-agent-bad: container agent waits: CrashLoopBackOff";
    let advice = "kubectl -n nodemesh-system logs nodemesh-agent-bad";
    assert_eq!(of("bad", "mesh"), Err(Finding::error("node bad", said, advice)));
    let said = "is not to have an agent: its pods are not in the mesh";
    let advice = "values agent.nodeSelector and agent.nodeExpressions leave it out";
    assert_eq!(of("good", "other"), Err(Finding::warning("node good", said, advice)));
}

#[test]
fn an_agent_of_another_image_is_told_from_one_of_the_wanted() {
    assert_eq!(of_image("node n1", "nodemesh:1", Some("nodemesh:1")), None);
    let found = of_image("node n1", "nodemesh:1", Some("nodemesh:2")).unwrap();
    assert_eq!((found.subject.as_str(), found.grade), ("node n1", Grade::Warning));
    assert_eq!(found.message, "its agent runs nodemesh:1, wanted nodemesh:2");
    assert!(found.advice.contains("agent.maxSurge"), "{found:?}");
}

#[test]
fn a_controller_without_all_of_its_replicas_is_judged_by_how_many_there_are() {
    let all = Progress { wanted: 2, updated: 2, old: 0, available: 2, seen: true };
    let of = |progress: Progress| of_controller(Some(progress), SPACE);
    assert_eq!(of(all), Finding::good("controller", "2 of 2 replicas ready"));
    let some = Progress { available: 1, ..all };
    assert_eq!(of(some), Finding::warning("controller", "1 of 2 replicas ready", LOGS));
    let none = Progress { available: 0, ..all };
    assert_eq!(of(none), Finding::error("controller", "0 of 2 replicas ready", LOGS));

    let rolls = of(Progress { old: 1, available: 3, ..all });
    assert_eq!((rolls.grade, rolls.advice.contains("rollout status")), (Grade::Warning, true), "{rolls:?}");
    let down = of(Progress { wanted: 0, updated: 0, available: 0, ..all });
    assert_eq!((down.grade, down.advice.contains("scale")), (Grade::Error, true), "{down:?}");
    let gone = of_controller(None, SPACE);
    let said = "Deployment nodemesh-system/nodemesh-controller is not there";
    assert_eq!(gone, Finding::error("controller", said, "meshctl upgrade makes it"));
}

#[test]
fn roots_that_are_missing_or_empty_are_an_error() {
    let map = |data: serde_json::Value| -> ConfigMap {
        serde_json::from_value(json!({"metadata": {"name": ROOTS}, "data": data})).unwrap()
    };
    let good = map(json!({ROOTS_KEY: "-----BEGIN CERTIFICATE-----"}));
    assert_eq!(of_roots(Some(&good), SPACE).grade, Grade::Good);
    let said = format!("ConfigMap nodemesh-system/{ROOTS} has no {ROOTS_KEY}");
    for bad in
        [None, Some(map(json!({}))), Some(map(json!({"other": "x"}))), Some(map(json!({ROOTS_KEY: "\n"})))]
    {
        assert_eq!(of_roots(bad.as_ref(), SPACE), Finding::error("roots", said.as_str(), LOGS), "{bad:?}");
    }
}

#[test]
fn a_webhook_without_a_certificate_or_without_rules_is_found() {
    let of = |bundles: &[Option<&str>]| {
        let webhook = |bundle: &Option<&str>| {
            let mut webhook = ValidatingWebhook::default();
            webhook.client_config.ca_bundle = bundle.map(|text| ByteString(text.into()));
            webhook
        };
        let webhooks = Some(bundles.iter().map(webhook).collect());
        let found = ValidatingWebhookConfiguration { webhooks, ..Default::default() };
        of_webhook(Some(&found), SPACE)
    };
    assert_eq!(of(&[Some("PEM")]), Finding::good("webhook", "has the controller's certificate"));
    let said = "has no certificate yet: resources of the mesh are refused while failurePolicy is Fail";
    for bundles in [&[None][..], &[Some("")], &[Some("PEM"), None]] {
        assert_eq!(of(bundles), Finding::warning("webhook", said, LOGS), "{bundles:?}");
    }
    let empty = of(&[]);
    assert_eq!((empty.grade, empty.advice.as_str()), (Grade::Warning, "meshctl upgrade makes it whole"));
    let none = of_webhook(None, SPACE);
    assert_eq!((none.grade, none.message.contains("there is none")), (Grade::Good, true), "{none:?}");
}

#[test]
fn what_is_left_of_an_unfinished_uninstallation_is_found() {
    let found = of_cleanup();
    assert_eq!((found.subject.as_str(), found.grade), ("uninstallation", Grade::Warning));
    assert!(found.message.contains("DaemonSet nodemesh-cleanup"), "{found:?}");
    assert!(found.advice.contains("meshctl uninstall") && found.advice.contains("meshctl install"));
}

/// All definitions as an API server has them, changed so.
fn defined(change: impl FnOnce(&mut Vec<CustomResourceDefinition>)) -> Vec<Finding> {
    let mut all = mesh_control::crd::all();
    for definition in &mut all {
        definition.status = serde_json::from_value(json!({"conditions": [
            {"type": "NamesAccepted", "status": "True"}, {"type": "Established", "status": "True"},
        ]}))
        .unwrap();
    }
    change(&mut all);
    definitions(&all)
}

#[test]
fn definitions_that_are_missing_refused_or_of_other_versions_are_told_apart() {
    let kinds = mesh_control::crd::all().len();
    let good = |count: usize| Finding::good("definitions", format!("{count} kinds are served"));
    assert_eq!(defined(|_| {}), [good(kinds)]);

    let name = "sidecars.networking.istio.io";
    let at = |all: &[CustomResourceDefinition]| all.iter().position(|one| one.name_any() == name).unwrap();
    let absent = defined(|all| all.retain(|one| one.name_any() != name));
    let subject = format!("definition {name}");
    let said = "is not there: this kind cannot be used";
    let wanted = Finding::warning(subject.as_str(), said, "meshctl upgrade makes it");
    assert_eq!(absent, [good(kinds - 1), wanted]);

    let older = defined(|all| {
        let at = at(all);
        all[at].spec.versions.truncate(2);
        all[at].spec.versions[0].name = "v0".to_owned();
        // It is there and not served, so it does not help.
        all[at].spec.versions[1].served = false;
    });
    let said = "serves v0, the mesh reads v1, v1beta1, v1alpha3";
    let advice = "use definitions of a version that the mesh knows";
    assert_eq!(older, [good(kinds - 1), Finding::error(subject.as_str(), said, advice)]);

    let refused = defined(|all| {
        let at = at(all);
        all[at].status = serde_json::from_value(json!({"conditions": [
            {"type": "NamesAccepted", "status": "False", "message": "\"sc\" is taken"},
        ]}))
        .unwrap();
    });
    let said = "not NamesAccepted: \"sc\" is taken";
    let advice = format!("kubectl describe crd {name}");
    assert_eq!(refused, [good(kinds - 1), Finding::error(subject.as_str(), said, advice)]);
}
