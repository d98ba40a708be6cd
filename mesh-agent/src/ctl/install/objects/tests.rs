//! What must be true of the objects whatever the values are.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::{
        admissionregistration::v1::{RuleWithOperations, ValidatingWebhook, ValidatingWebhookConfiguration},
        apps::v1::{DaemonSet, Deployment},
        core::v1::{ConfigMap, PodSpec},
        rbac::v1::{ClusterRole, PolicyRule, Role},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use kube::core::{Selector, SelectorExt as _};
use mesh_control::resource::Kind;
use serde::de::DeserializeOwned;

use super::*;
use crate::ctl::install::values::{Profile, Wishes};

fn made(set: &[&str]) -> Vec<Manifest> {
    let wishes = Wishes {
        set: set.iter().map(ToString::to_string).collect(),
        profile: Profile::Default,
        files: Vec::new(),
    };
    all(&Values::read(&wishes).unwrap(), "nodemesh-system").unwrap()
}

fn get<T: DeserializeOwned>(of: &[Manifest], kind: &str, name: &str) -> T {
    let found = of.iter().find(|manifest| manifest.kind.kind == kind && manifest.name == name);
    serde_json::from_value(found.unwrap_or_else(|| panic!("no {kind} {name}")).object.clone()).unwrap()
}

fn allows(rules: &[PolicyRule], resource: &str) -> Vec<String> {
    let of = |rule: &&PolicyRule| {
        rule.resources
            .iter()
            .flatten()
            .any(|found| found == resource || found == "*" || found.starts_with(&format!("{resource}/")))
    };
    rules.iter().filter(of).flat_map(|rule| rule.verbs.clone()).collect()
}

#[test]
fn every_object_can_be_found_again_and_none_is_there_twice() {
    let all = made(&[]);
    let mut names: Vec<String> = Vec::new();
    for manifest in &all {
        let labels = &manifest.object["metadata"]["labels"];
        assert_eq!(labels[INSTALLED], "true", "{manifest}");
        assert_eq!(labels[PART_OF.0], PART_OF.1, "{manifest}");
        assert_eq!(manifest.kind.namespaced, manifest.namespace.is_some(), "{manifest}");
        names.push(manifest.to_string());
    }
    names.sort();
    let count = names.len();
    names.dedup();
    assert_eq!(names.len(), count);
    assert_eq!(all[0].kind.kind, "Namespace", "the place of the others comes first");
}

#[test]
fn upgrades_look_at_every_kind_that_is_made() {
    let kinds = crate::ctl::install::made_kinds();
    for manifest in made(&[]).iter().filter(|manifest| manifest.kind.kind != "Namespace") {
        assert!(kinds.contains(&manifest.kind), "{manifest}");
    }
}

#[test]
fn an_agent_can_read_no_secrets_and_write_nothing() {
    let all = made(&[]);
    let role: ClusterRole = get(&all, "ClusterRole", AGENT);
    let rules = role.rules.unwrap();
    assert_eq!(allows(&rules, "secrets"), Vec::<String>::new());
    for rule in &rules {
        assert!(rule.verbs.iter().all(|verb| ["get", "list", "watch"].contains(&verb.as_str())), "{rule:?}");
    }
    let roles = all.iter().filter(|manifest| manifest.kind.kind == "Role");
    assert!(roles.into_iter().all(|role| role.name == CONTROLLER), "nothing more at home");
}

#[test]
fn the_controller_has_secrets_in_its_own_namespace_only_and_no_wildcards() {
    let all = made(&[]);
    let everywhere: ClusterRole = get(&all, "ClusterRole", CONTROLLER);
    let at_home: Role = get(&all, "Role", CONTROLLER);
    let everywhere = everywhere.rules.unwrap();
    assert_eq!(allows(&everywhere, "secrets"), Vec::<String>::new());
    assert!(!allows(at_home.rules.as_deref().unwrap(), "secrets").is_empty());
    for rule in everywhere.iter().chain(at_home.rules.iter().flatten()) {
        let words = [rule.api_groups.clone(), rule.resources.clone(), Some(rule.verbs.clone())];
        assert!(!words.iter().flatten().flatten().any(|word| word == "*"), "{rule:?}");
    }
}

#[test]
fn the_controller_is_nobody_and_the_agent_has_named_capabilities_only() {
    let all = made(&[]);
    let pod = |spec: Option<PodSpec>| spec.unwrap();
    let controller: Deployment = get(&all, "Deployment", CONTROLLER);
    let controller = pod(controller.spec.unwrap().template.spec);
    assert_eq!(controller.security_context.as_ref().unwrap().run_as_non_root, Some(true));
    let agent: DaemonSet = get(&all, "DaemonSet", AGENT);
    let agent = pod(agent.spec.unwrap().template.spec);
    for container in controller.containers.iter().chain(&agent.containers) {
        let context = container.security_context.as_ref().unwrap();
        assert_eq!(context.read_only_root_filesystem, Some(true), "{}", container.name);
        assert_eq!(context.privileged, None, "{}", container.name);
        assert_eq!(
            context.capabilities.as_ref().unwrap().drop,
            Some(vec!["ALL".to_owned()]),
            "{}",
            container.name
        );
    }
}

#[test]
fn the_webhook_never_stands_in_the_way_of_the_cluster_itself() {
    let all = made(&[]);
    let webhooks: ValidatingWebhookConfiguration = get(&all, "ValidatingWebhookConfiguration", MESH);
    for webhook in webhooks.webhooks.iter().flatten() {
        let exempt = webhook.namespace_selector.as_ref().unwrap().match_expressions.as_ref().unwrap();
        assert_eq!(exempt[0].operator, "NotIn");
        let exempt = exempt[0].values.as_ref().unwrap();
        assert_eq!(*exempt, ["kube-system", "kube-public", "kube-node-lease", "nodemesh-system"]);
    }
    let without = made(&["webhook.enabled=false"]);
    assert!(!without.iter().any(|manifest| manifest.kind.kind == "ValidatingWebhookConfiguration"));
}

#[test]
fn the_webhook_may_refuse_what_the_mesh_reads_and_nothing_else() {
    let webhooks: ValidatingWebhookConfiguration = get(&made(&[]), "ValidatingWebhookConfiguration", MESH);
    let webhooks = webhooks.webhooks.unwrap();
    let names = |rules: &[RuleWithOperations]| -> BTreeSet<String> {
        let of = |rule: &RuleWithOperations| {
            let (groups, resources) = (rule.api_groups.clone().unwrap(), rule.resources.clone().unwrap());
            assert_eq!(groups.len(), 1, "{rule:?}");
            resources.into_iter().map(move |resource| format!("{resource}.{}", groups[0]))
        };
        rules.iter().flat_map(of).collect()
    };
    let definitions = mesh_control::crd::all();
    let is_read = |definition: &&CustomResourceDefinition| {
        let spec = &definition.spec;
        Kind::ALL.iter().any(|kind| kind.as_str() == spec.names.kind && kind.group() == spec.group)
    };
    let read: BTreeSet<String> = definitions
        .iter()
        .filter(is_read)
        .map(|definition| definition.metadata.name.clone().unwrap())
        .collect();
    assert!(read.len() >= 12, "{read:?}");
    let by_policy = |policy: &str| {
        let of = |webhook: &&ValidatingWebhook| webhook.failure_policy.as_deref() == Some(policy);
        let rules: Vec<_> = webhooks.iter().filter(of).flat_map(|of| of.rules.clone().unwrap()).collect();
        names(&rules)
    };
    assert_eq!(by_policy("Fail"), read);
    let told = by_policy("Ignore");
    assert!(told.contains("telemetries.telemetry.istio.io") && told.is_disjoint(&read), "{told:?}");
}

#[test]
fn the_controller_is_told_on_which_nodes_agents_run() {
    let told = |objects: &[Manifest]| {
        let controller: Deployment = get(objects, "Deployment", CONTROLLER);
        let containers = controller.spec.and_then(|spec| spec.template.spec).unwrap().containers;
        let env = containers.into_iter().flat_map(|container| container.env.unwrap_or_default());
        let mut nodes = env.filter(|variable| variable.name == "MESH_AGENT_NODES");
        let text = nodes.next()?.value.unwrap();
        Some(Selector::try_from(serde_json::from_str::<LabelSelector>(&text).unwrap()).unwrap())
    };
    let of = |set: &[&str]| {
        let objects = made(set);
        let agents: DaemonSet = get(&objects, "DaemonSet", AGENT);
        (nodes_of(&agents), told(&objects))
    };
    let (run, told) = of(&[r"agent.nodeSelector.pool=mesh"]);
    assert_eq!(run, told);
    let labels = |more: &[(&str, &str)]| {
        let all = [&[("kubernetes.io/os", "linux"), ("pool", "mesh")], more].concat();
        all.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<BTreeMap<_, _>>()
    };
    let told = told.unwrap();
    assert!(told.matches(&labels(&[])));
    for other in [("kubernetes.io/os", "windows"), ("pool", "other"), ("type", "virtual-kubelet")] {
        assert!(!told.matches(&labels(&[other])), "{other:?}");
    }
    assert!(!told.matches(&labels(&[("eks.amazonaws.com/compute-type", "fargate")])));
    assert_eq!(
        of(&["agent.nodeSelector=null", "agent.nodeExpressions=null"]),
        (Some(Selector::default()), None)
    );
}

#[test]
fn values_reach_the_objects() {
    let all = made(&[
        "image=registry/mesh:x",
        "agent.cgroupRoot=/sys/fs/cgroup/unified/$(NODE_NAME)",
        "agent.env.MESH_WORKERS=1",
        "meshConfig.trustDomain=prod.example",
    ]);
    let agent: DaemonSet = get(&all, "DaemonSet", AGENT);
    let pod = agent.spec.unwrap().template.spec.unwrap();
    let container = &pod.containers[0];
    assert_eq!(container.image.as_deref(), Some("registry/mesh:x"));
    let args = container.args.clone().unwrap();
    assert!(args.contains(&"--cgroup-root=/sys/fs/cgroup/unified/$(NODE_NAME)".to_owned()), "{args:?}");
    let env = container.env.clone().unwrap();
    assert!(env.iter().any(|env| env.name == "MESH_WORKERS" && env.value.as_deref() == Some("1")));
    let config: ConfigMap = get(&all, "ConfigMap", MESH);
    assert_eq!(config.data.unwrap()["mesh"].trim(), "trustDomain: prod.example");
}

/// Written by `MESH_BLESS=1 cargo test -p mesh-agent`.
#[test]
fn the_charts_definitions_are_what_the_types_say() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/nodemesh/crds");
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for definition in definitions().unwrap() {
        let (_, group) = definition.name.split_once('.').unwrap();
        let text = files.entry(format!("{group}.yaml")).or_default();
        text.push_str("---\n");
        text.push_str(&serde_saphyr::to_string(&definition.object).unwrap());
    }
    let mut found: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    for (name, text) in &files {
        let path = folder.join(name);
        if std::env::var_os("MESH_BLESS").is_some() {
            std::fs::write(&path, text).unwrap();
        }
        let there = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(there == *text, "{name} is old; MESH_BLESS=1 cargo test -p mesh-agent writes it");
    }
    if std::env::var_os("MESH_BLESS").is_none() {
        assert_eq!(found, files.into_keys().collect::<Vec<_>>());
    }
}
