//! Owns the judgement of one AdmissionReview. Pure.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    index::API_SERVER,
    problem::{Level, joined, said},
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
    let uid = request.uid.clone();
    let (status, warnings) = if writes { judge(request, rules) } else { (None, Vec::new()) };
    Ok(Answer {
        api_version: "admission.k8s.io/v1",
        kind: "AdmissionReview",
        response: Response { uid, allowed: status.is_none(), status, warnings },
    })
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
    let parsed = document::read_object(Path::new(API_SERVER), object, rules, UnknownFields::Warn);
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
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
            "uid": "u1", "operation": operation, "subResource": sub_resource, "namespace": "shop", "object": object}});
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
    fn what_is_no_review_is_no_answer() {
        for body in ["", "[]", "{}", "{\"request\": {}}", "{\"request\": 1}"] {
            assert!(answer(body.as_bytes(), &Rules::default()).is_err(), "{body}");
        }
    }
}
