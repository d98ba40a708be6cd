//! Tests of statuses: what is said of which resource.

use mesh_core::snapshot::Name;

use super::*;
use crate::{
    problem::Problem,
    resource::{Kind, ParentKind, ParentRef},
    source::kubernetes::ParentVerdict,
};

fn key(kind: Kind) -> Key {
    Key { kind, name: Name::new("shop", "web") }
}

fn told(status: Value, parents: Value) -> Told {
    Told {
        api_version: "gateway.networking.k8s.io/v1".into(),
        uid: "u1".into(),
        resource_version: "7".into(),
        generation: 3,
        status: Arc::new(status),
        parents: Arc::new(parents),
        problems: Arc::default(),
    }
}

fn service() -> Value {
    json!({"group": "", "kind": "Service", "name": "web", "port": 80})
}

fn at_web() -> ParentVerdict {
    let name = Name::new("shop", "web");
    let parent = ParentRef { kind: ParentKind::Service, name, port: Some(80), section: None };
    ParentVerdict { parent, not_accepted: None, unresolved: None, partial: None }
}

fn in_force(parents: Vec<ParentVerdict>) -> Verdict {
    Verdict { in_force: true, parents, ..Verdict::default() }
}

fn error(message: &str) -> Problem {
    Problem { level: Level::Error, field: "spec.x".into(), message: message.into() }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn route(told: &Told, verdict: &Verdict) -> Option<Value> {
    desired(&key(Kind::HttpRoute), told, verdict, at(100))
}

fn held(status: &Value) -> Vec<String> {
    let conditions = status["parents"].as_array().unwrap().last().unwrap()["conditions"].as_array().unwrap();
    let text = |c: &Value, field: &str| c[field].as_str().unwrap().to_owned();
    conditions.iter().map(|c| ["type", "status", "reason"].map(|field| text(c, field)).join(" ")).collect()
}

#[test]
fn s116_a_route_in_force_is_accepted_and_resolved_for_the_generation_that_was_judged() {
    let status = route(&told(Value::Null, json!([service()])), &in_force(vec![at_web()])).unwrap();
    assert_eq!(held(&status), ["Accepted True Accepted", "ResolvedRefs True ResolvedRefs"]);
    let parent = &status["parents"][0];
    assert_eq!((&parent["parentRef"], &parent["controllerName"]), (&service(), &json!(CONTROLLER_NAME)));
    assert_eq!(parent["conditions"][0]["observedGeneration"], json!(3));
    assert_eq!(parent["conditions"][0]["lastTransitionTime"], json!("1970-01-01T00:01:40Z"));
}

#[test]
fn s116_reasons_are_those_of_the_api() {
    let told = told(Value::Null, json!([service()]));
    let no_parent = ParentVerdict { not_accepted: Some(("NoMatchingParent", "x".into())), ..at_web() };
    let no_parent_nor_rule = ParentVerdict { partial: Some("x".into()), ..no_parent.clone() };
    let unusable = ParentVerdict { not_accepted: Some(("UnsupportedValue", "x".into())), ..at_web() };
    let refs = ParentVerdict { unresolved: Some(("RefNotPermitted", "x".into())), ..at_web() };
    let partial = ParentVerdict { partial: Some("x".into()), ..at_web() };
    let broken =
        |verdict: Verdict| Verdict { problems: vec![error("bad")], good_generation: Some(2), ..verdict };
    let elsewhere = ParentVerdict {
        parent: ParentRef { name: Name::new("shop", "other"), ..at_web().parent },
        ..at_web()
    };
    for (verdict, wanted) in [
        (
            in_force(vec![no_parent.clone()]),
            &["Accepted False NoMatchingParent", "ResolvedRefs True ResolvedRefs"][..],
        ),
        // What is not accepted is not accepted in part.
        (
            in_force(vec![no_parent_nor_rule]),
            &["Accepted False NoMatchingParent", "ResolvedRefs True ResolvedRefs"],
        ),
        (in_force(vec![unusable]), &["Accepted False UnsupportedValue", "ResolvedRefs True ResolvedRefs"]),
        (in_force(vec![refs]), &["Accepted True Accepted", "ResolvedRefs False RefNotPermitted"]),
        (
            in_force(vec![partial]),
            &[
                "Accepted True Accepted",
                "ResolvedRefs True ResolvedRefs",
                "PartiallyInvalid True UnsupportedValue",
            ],
        ),
        (
            broken(in_force(vec![at_web()])),
            &[
                "Accepted True Accepted",
                "ResolvedRefs True ResolvedRefs",
                "PartiallyInvalid True UnsupportedValue",
            ],
        ),
        // There is nothing to fall back to: no state, none at this parent, none that it took.
        (
            Verdict { problems: vec![error("bad")], ..Verdict::default() },
            &["Accepted False UnsupportedValue", "ResolvedRefs True ResolvedRefs"],
        ),
        (
            broken(in_force(vec![elsewhere])),
            &["Accepted False UnsupportedValue", "ResolvedRefs True ResolvedRefs"],
        ),
        (
            broken(in_force(vec![no_parent])),
            &["Accepted False UnsupportedValue", "ResolvedRefs True ResolvedRefs"],
        ),
    ] {
        assert_eq!(held(&route(&told, &verdict).unwrap()), wanted);
    }
}

#[test]
fn s116_a_route_that_falls_back_is_accepted_as_of_its_last_good_generation() {
    let told = told(Value::Null, json!([service()]));
    let verdict =
        Verdict { problems: vec![error("bad")], good_generation: Some(2), ..in_force(vec![at_web()]) };
    let status = route(&told, &verdict).unwrap();
    let conditions = &status["parents"][0]["conditions"];
    let of = |at: usize| (conditions[at]["type"].clone(), conditions[at]["observedGeneration"].clone());
    assert_eq!(of(0), (json!("Accepted"), json!(2)));
    assert_eq!(of(1), (json!("ResolvedRefs"), json!(2)));
    assert_eq!(of(2), (json!("PartiallyInvalid"), json!(3)));
    let text = conditions[2]["message"].as_str().unwrap();
    assert!(text.starts_with("Fall Back") && text.contains("spec.x: bad"), "{text}");
    // Mended by a change that makes it what it was.
    let mended = Verdict { good_generation: Some(3), ..in_force(vec![at_web()]) };
    assert_eq!(route(&told, &mended).unwrap()["parents"][0]["conditions"][0]["observedGeneration"], json!(3));
}

#[test]
fn s116_a_reference_without_namespace_is_to_the_routes_own() {
    let other = json!({"group": "", "kind": "Service", "name": "web", "namespace": "other", "port": 80});
    let of_other = ParentVerdict {
        parent: ParentRef { name: Name::new("other", "web"), ..at_web().parent },
        not_accepted: Some(("NoMatchingParent", "x".into())),
        ..at_web()
    };
    let own = json!({"group": "", "kind": "Service", "name": "web", "namespace": "shop", "port": 80});
    for (references, wanted) in [
        (json!([other, service()]), ["False", "True"]),
        (json!([service(), other]), ["True", "False"]),
        (json!([other, own]), ["False", "True"]),
    ] {
        let verdict = in_force(vec![of_other.clone(), at_web()]);
        let status = route(&told(Value::Null, references.clone()), &verdict).unwrap();
        let accepted = |at: usize| status["parents"][at]["conditions"][0]["status"].clone();
        assert_eq!([accepted(0), accepted(1)], wanted, "{references}");
    }
}

#[test]
fn what_of_a_route_has_no_effect_is_said_where_it_is_accepted() {
    let noted = Problem { level: Level::Warning, ..error("is not done by the mesh yet") };
    let verdict = Verdict { problems: vec![noted], ..in_force(vec![at_web()]) };
    let status = route(&told(Value::Null, json!([service()])), &verdict).unwrap();
    let accepted = &status["parents"][0]["conditions"][0];
    assert_eq!(accepted["status"], json!("True"));
    assert_eq!(accepted["message"], json!("the route is in force here; spec.x: is not done by the mesh yet"));
}

#[test]
fn what_is_said_already_is_not_written_again_whenever_it_was_said() {
    let verdict = in_force(vec![at_web()]);
    let status = route(&told(Value::Null, json!([service()])), &verdict).unwrap();
    let after = told(status.clone(), json!([service()]));
    assert_eq!(desired(&key(Kind::HttpRoute), &after, &verdict, at(5000)), None);
    // A newer generation is another word; its time stays that of the last turn.
    let newer = Told { generation: 4, ..after };
    let again = desired(&key(Kind::HttpRoute), &newer, &verdict, at(5000)).unwrap();
    let condition = &again["parents"][0]["conditions"][0];
    assert_eq!(
        (&condition["observedGeneration"], &condition["lastTransitionTime"]),
        (&json!(4), &json!("1970-01-01T00:01:40Z"))
    );
}

#[test]
fn s116_what_other_controllers_said_stays_and_their_parents_are_not_ours() {
    let gateway = json!({"name": "edge"});
    let theirs = json!({"parentRef": gateway, "controllerName": "example.com/gateway", "conditions": []});
    let status = json!({"parents": [theirs]});
    let both = told(status.clone(), json!([gateway, service()]));
    let written = route(&both, &in_force(vec![at_web()])).unwrap();
    assert_eq!(written["parents"].as_array().unwrap().len(), 2);
    assert_eq!(written["parents"][0], theirs);
    assert_eq!(route(&told(status, json!([gateway])), &in_force(vec![])), None, "nothing of ours to say");
    assert_eq!(route(&told(Value::Null, json!([gateway])), &in_force(vec![])), None);
}

#[test]
fn a_parent_that_is_no_longer_named_is_no_longer_told_of() {
    let status = route(&told(Value::Null, json!([service()])), &in_force(vec![at_web()])).unwrap();
    let written = route(&told(status, json!([])), &in_force(vec![])).unwrap();
    assert_eq!(written, json!({"parents": []}));
}

#[test]
fn istio_kinds_say_whether_they_are_in_force_and_every_problem() {
    let of = |verdict: &Verdict, status: Value| {
        desired(&key(Kind::VirtualService), &told(status, Value::Null), verdict, at(100))
    };
    let good = of(&in_force(vec![]), Value::Null).unwrap();
    assert_eq!(good["conditions"][0]["status"], json!("True"));
    assert_eq!(of(&in_force(vec![]), good), None);
    // Istio's own types keep the generation in quotes, and other controllers have other conditions.
    let refused = Verdict { problems: vec![error("is 1, wanted 2")], ..in_force(vec![]) };
    let other = json!({"conditions": [{"type": "Other", "status": "True"}], "observedGeneration": "3"});
    let bad = of(&refused, other).unwrap();
    let text = bad["conditions"][1]["message"].as_str().unwrap();
    assert!(text.contains("spec.x: is 1, wanted 2") && text.contains("last state"), "{text}");
    assert_eq!(
        (&bad["conditions"][0]["type"], &bad["validationMessages"][0]["level"]),
        (&json!("Other"), &json!("ERROR"))
    );
    assert!(is_same(&json!({"observedGeneration": 3}), &json!({"observedGeneration": "3"})));
}

#[test]
fn what_a_rule_refers_to_and_is_not_there_is_a_message_of_its_status() {
    let missing = Problem {
        level: Level::Warning,
        field: "spec.host".into(),
        message: "is a, which nobody has".into(),
    };
    let verdict = Verdict { missing: vec![missing], ..in_force(vec![]) };
    let of = told(Value::Null, Value::Null);
    let status = desired(&key(Kind::VirtualService), &of, &verdict, at(1)).unwrap();
    assert_eq!(status["conditions"][0]["status"], json!("True"), "it is in force all the same");
    let said = &status["validationMessages"][0];
    assert_eq!(
        (&said["type"]["name"], &said["level"]),
        (&json!("ReferencedResourceNotFound"), &json!("WARNING"))
    );
    assert_eq!(said["message"], json!("spec.host: is a, which nobody has"));
    assert_eq!(desired(&key(Kind::VirtualService), &told(status, Value::Null), &verdict, at(2)), None);
}

#[test]
fn addresses_that_a_host_was_given_are_told() {
    let verdict = Verdict {
        addresses: vec![("api.example.com".into(), "240.240.0.1".parse().unwrap())],
        ..in_force(vec![])
    };
    let status = desired(&key(Kind::ServiceEntry), &told(Value::Null, Value::Null), &verdict, at(1)).unwrap();
    assert_eq!(status["addresses"], json!([{"value": "240.240.0.1", "host": "api.example.com"}]));
}

#[test]
fn a_message_is_bounded_and_counts_what_it_leaves_out() {
    let problems = (0..100).map(|i| error(&format!("{i}: {}", "é".repeat(100)))).collect();
    let text = message(&Verdict { problems, ..Verdict::default() }, Level::Error);
    assert!(text.len() <= MESSAGE_BYTES_MAX + 30 && text.ends_with("more"), "{} {text}", text.len());
    let long = Verdict { problems: vec![error(&"é".repeat(5000))], ..Verdict::default() };
    assert!(message(&long, Level::Error).len() <= MESSAGE_BYTES_MAX);
}
