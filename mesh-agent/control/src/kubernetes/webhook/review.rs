//! Owns the judgement of one AdmissionReview. Pure.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    index::API_SERVER,
    problem::{Level, joined, said},
    resource::{GATEWAY_GROUP, Ownership},
    source::document::{self, Rules, UnknownFields},
};

/// Longest message of a refusal, in bytes: it is printed by kubectl.
const MESSAGE_BYTES_MAX: usize = 4096;
/// Warnings that are passed on; Kubernetes cuts them off at 4 KiB altogether.
const WARNINGS_MAX: usize = 8;
/// Longest warning, in characters.
const WARNING_CHARS_MAX: usize = 250;

/// What the API server asks.
#[derive(Debug, Deserialize)]
struct Review {
    request: Option<Request>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    uid: String,
    #[serde(default)]
    operation: String,
    #[serde(default)]
    sub_resource: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    object: Value,
    #[serde(default)]
    old_object: Value,
}

/// The answer.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Answer {
    api_version: &'static str,
    kind: &'static str,
    pub(super) response: Response,
}

#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Response {
    uid: String,
    pub(super) allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) status: Option<Refusal>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) warnings: Vec<String>,
}

/// Why not.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Refusal {
    code: u16,
    reason: &'static str,
    pub(super) message: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReviewError {
    #[error("not an AdmissionReview: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("an AdmissionReview without a request")]
    Empty,
}

/// Judges what the API server asks about.
pub(super) fn answer(body: &[u8], rules: &Rules) -> Result<Answer, ReviewError> {
    let request = serde_json::from_slice::<Review>(body)?.request.ok_or(ReviewError::Empty)?;
    let writes = matches!(request.operation.as_str(), "CREATE" | "UPDATE") && request.sub_resource.is_empty();
    let judged = writes && !says_nothing_new(&request);
    let uid = request.uid.clone();
    let (status, warnings) = if judged { judge(request, rules) } else { (None, Vec::new()) };
    Ok(Answer {
        api_version: "admission.k8s.io/v1",
        kind: "AdmissionReview",
        response: Response { uid, allowed: status.is_none(), status, warnings },
    })
}

/// Whether a write leaves what the mesh reads as it is, or is about an object that is on its way out. Finalizers and labels come and go by
/// such writes: what is wrong with an object from before must not keep it from being deleted.
fn says_nothing_new(request: &Request) -> bool {
    let deleted_at = request.object.pointer("/metadata/deletionTimestamp");
    let (now, before) = (&request.object, &request.old_object);
    deleted_at.is_some_and(|at| !at.is_null())
        || (request.operation == "UPDATE" && !before.is_null() && now.get("spec") == before.get("spec"))
}

fn judge(request: Request, rules: &Rules) -> (Option<Refusal>, Vec<String>) {
    let mut object = request.object;
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        // Both come from the API server later.
        if !metadata.contains_key("name")
            && let Some(Value::String(prefix)) = metadata.get("generateName")
        {
            let name = format!("{prefix}x");
            metadata.insert("name".to_owned(), name.into());
        }
        if !request.namespace.is_empty() {
            metadata.entry("namespace").or_insert_with(|| request.namespace.into());
        }
    }
    let ownership = Ownership::of(&object);
    let group = object.get("apiVersion").and_then(Value::as_str).and_then(|version| version.split_once('/'));
    let is_of_gateways = group.is_some_and(|(group, _)| group == GATEWAY_GROUP);
    let mut parsed = document::read_object(Path::new(API_SERVER), object, rules, UnknownFields::Warn);
    // Kinds of the Gateway API that the mesh does not have are other controllers'.
    if is_of_gateways && !parsed.unread.is_empty() {
        return (None, Vec::new());
    }
    ownership.leave_to_others(&mut parsed.problems);
    let of =
        |level| parsed.problems.iter().filter(move |p| p.level == level).map(|p| said(&p.field, &p.message));
    let errors: Vec<String> = of(Level::Error).collect();
    let warnings = of(Level::Warning)
        .take(WARNINGS_MAX)
        .map(|warning| warning.chars().take(WARNING_CHARS_MAX).collect())
        .collect();
    let refusal = (!errors.is_empty()).then(|| Refusal {
        code: 422,
        reason: "Invalid",
        message: joined(&errors, MESSAGE_BYTES_MAX),
    });
    (refusal, warnings)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ask(operation: &str, sub_resource: &str, object: Value) -> Response {
        ask_after(operation, sub_resource, Value::Null, object)
    }

    fn ask_after(operation: &str, sub_resource: &str, before: Value, object: Value) -> Response {
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
            "uid": "u1", "operation": operation, "subResource": sub_resource, "namespace": "shop", "object": object, "oldObject": before}});
        answer(review.to_string().as_bytes(), &Rules::default()).unwrap().response
    }

    fn split(weight: Value) -> Value {
        json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"generateName": "web-"},
            "spec": {"hosts": ["web"], "http": [{"route": [
                {"destination": {"host": "web", "subset": "v1"}, "weight": 90},
                {"destination": {"host": "web", "subset": "v2"}, "weight": weight}]}]}})
    }

    #[test]
    fn what_the_mesh_can_use_is_let_through() {
        let response = ask("CREATE", "", split(json!(10)));
        assert_eq!((response.allowed, response.status, &*response.uid), (true, None, "u1"));
    }

    #[test]
    fn a_refusal_names_the_field_what_was_found_and_what_is_wanted() {
        let response = ask("UPDATE", "", split(json!("ten")));
        let message = response.status.unwrap().message;
        assert!(!response.allowed);
        assert!(message.starts_with("spec.http[0].route[1].weight: is "), "{message}");
        assert!(message.contains("wanted"), "{message}");
    }

    #[test]
    fn deletions_status_and_other_kinds_are_let_through() {
        assert!(ask("DELETE", "", Value::Null).allowed);
        assert!(ask("UPDATE", "status", split(json!(-1))).allowed);
        let other =
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a"}, "spec": 7});
        assert!(ask("CREATE", "", other).allowed);
    }

    #[test]
    fn what_has_no_effect_is_let_through_with_a_word() {
        let mut object = split(json!(10));
        object["spec"]["htpp"] = json!([]);
        object["spec"]["hosts_"] = json!(["a"]);
        let response = ask("CREATE", "", object);
        assert!(response.allowed || response.status.is_some());
        let words = response.warnings.join(" ") + &response.status.map(|s| s.message).unwrap_or_default();
        assert!(words.contains("hosts_"), "{words}");
    }

    #[test]
    fn an_object_that_was_let_in_before_can_be_marked_and_deleted_and_not_made_worse() {
        let old = split(json!("ten"));
        let mut marked = old.clone();
        marked["metadata"]["labels"] = json!({"team": "till"});
        assert!(ask_after("UPDATE", "", old.clone(), marked.clone()).allowed, "its spec stays");
        marked["spec"]["hosts"] = json!(["web", "till"]);
        assert!(!ask_after("UPDATE", "", old.clone(), marked).allowed, "another spec is judged");
        assert!(!ask_after("UPDATE", "", Value::Null, old.clone()).allowed, "nothing to compare with");
        assert!(!ask_after("CREATE", "", old.clone(), old.clone()).allowed);
        // Finalizers are taken away one by one, perhaps with a change of the spec.
        let mut leaving = old.clone();
        leaving["metadata"]["deletionTimestamp"] = json!("2026-11-22T10:00:00Z");
        leaving["spec"]["hosts"] = json!([]);
        assert!(ask_after("UPDATE", "", old.clone(), leaving.clone()).allowed);
        leaving["metadata"]["deletionTimestamp"] = Value::Null;
        assert!(!ask_after("UPDATE", "", old, leaving).allowed);
    }

    #[test]
    fn what_other_controllers_carry_out_is_theirs_to_judge() {
        let gateway = json!({"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "edge"});
        let service = json!({"group": "", "kind": "Service", "name": "web"});
        // No regular expression of ours; a filter from next year; a field that we do not know.
        let newer = json!([{"matches": [{"path": {"type": "RegularExpression", "value": "^/(?!api).*"}}],
            "filters": [{"type": "OfNextYear", "ofNextYear": {}}], "backendRefs": [{"name": "web", "port": 80}]}]);
        let plain = json!([{"backendRefs": [{"name": "web", "port": 80}]}]);
        let of = |version: &str, parents: Value, rules: &Value| {
            let answer = ask(
                "CREATE",
                "",
                json!({"apiVersion": format!("gateway.networking.k8s.io/{version}"),
                "kind": "HTTPRoute", "metadata": {"name": "r"}, "spec": {"parentRefs": parents, "rules": rules}}),
            );
            (answer.allowed, answer.warnings)
        };
        assert_eq!(of("v1", json!([gateway]), &newer), (true, vec![]));
        assert_eq!(of("v1", json!([{"name": "edge"}]), &newer), (true, vec![]), "a Gateway is the default");
        assert_eq!(of("v9", json!([gateway]), &newer), (true, vec![]), "nor is its version ours to know");
        assert_eq!(of("v1", json!([gateway, service]), &plain), (true, vec![]));
        assert!(!of("v1", json!([gateway, service]), &newer).0);
        assert!(!of("v1", json!([{"kind": "Service", "name": "web"}]), &plain).0, "the group was forgotten");
        let (allowed, warnings) = of("v1", json!([]), &newer);
        let first = warnings.first().unwrap();
        assert!(allowed && first.starts_with("spec.parentRefs: is empty"), "{warnings:?}");
        let edge = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"name": "edge"}, "spec": {}});
        assert_eq!(ask("CREATE", "", edge).warnings, Vec::<String>::new());
        // Of Istio's kinds there is nobody else to carry them out.
        let filter = json!({"apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter", "metadata": {"name": "a"}, "spec": {}});
        assert_eq!(ask("CREATE", "", filter).warnings.len(), 1);
    }

    #[test]
    fn what_is_no_review_is_no_answer() {
        for body in ["", "[]", "{}", "{\"request\": {}}", "{\"request\": 1}"] {
            assert!(answer(body.as_bytes(), &Rules::default()).is_err(), "{body}");
        }
    }
}
