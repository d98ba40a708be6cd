//! The harness's API server: a real one, that keeps what it was told and knows who asks.

use mesh_tests::cluster::{ApiServer, KubectlError};
use mesh_tests::{TestResult, require_api_server, test_name};

const AUDIENCE: &str = "nodemesh.dev";

/// Roles, a service account and a pod that is said to run on a node.
const OBJECTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: till, namespace: shop}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reads-services, namespace: shop}
rules:
- {apiGroups: [""], resources: [services], verbs: [get, list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: till-reads-services, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reads-services}
subjects:
- {kind: ServiceAccount, name: till, namespace: shop}
---
apiVersion: v1
kind: Node
metadata: {name: node-a}
---
apiVersion: v1
kind: Pod
metadata: {name: till-0, namespace: shop}
spec:
  serviceAccountName: till
  nodeName: node-a
  containers:
  - {name: app, image: none}
"#;

#[test]
fn what_was_written_outlives_the_server() -> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    api.kubectl().apply(OBJECTS)?;
    api.stop();
    assert!(api.kubectl().run(&["get", "namespace", "shop"]).is_err(), "a stopped server answers");
    api.start_again()?;
    let pod = api.kubectl().json(&["get", "pod", "-n", "shop", "till-0"])?;
    assert_eq!(pod["spec"]["nodeName"], "node-a");
    Ok(())
}

#[test]
fn a_service_account_may_do_what_its_role_says_and_its_token_names_pod_and_node() -> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    api.kubectl().apply(OBJECTS)?;
    let server = format!("--server={}", api.url());
    let authority = format!("--certificate-authority={}", api.ca_file().display());
    let token =
        format!("--token={}", api.token("shop", "till", "https://kubernetes.default.svc.cluster.local")?);
    // An empty kubeconfig, or the administrator's own would be used besides.
    let as_till = |what: &str| {
        api.kubectl().run(&[&server, &authority, &token, "--kubeconfig=/dev/null", "get", "-n", "shop", what])
    };
    as_till("services")?;
    match as_till("secrets") {
        Err(KubectlError::Refused { message, .. }) => assert!(message.contains("Forbidden"), "{message}"),
        other => panic!("secrets were shown: {other:?}"),
    }

    // What a projected volume of the pod would hold.
    let request = ["create", "token", "-n", "shop", "till", "--bound-object-kind=Pod"];
    let bound = ["--bound-object-name=till-0", "--audience=nodemesh.dev"];
    let token = api.kubectl().run(&[&request[..], &bound[..]].concat())?;
    let review = |audience: &str| {
        let review = format!(
            r#"{{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview",
                "spec":{{"token":"{}","audiences":["{audience}"]}}}}"#,
            token.trim()
        );
        let answer = api.kubectl().feed(&["create", "-o", "json", "-f", "-"], &review)?;
        Ok::<serde_json::Value, anyhow::Error>(serde_json::from_str(&answer)?)
    };
    let status = &review(AUDIENCE)?["status"];
    assert_eq!(status["authenticated"], true, "{status}");
    assert_eq!(status["user"]["username"], "system:serviceaccount:shop:till");
    assert_eq!(status["user"]["extra"]["authentication.kubernetes.io/node-name"][0], "node-a", "{status}");
    assert_ne!(review("somebody-else")?["status"]["authenticated"], true);
    Ok(())
}

#[test]
fn servers_side_by_side_know_nothing_of_each_other() -> TestResult {
    require_api_server!();
    let one = ApiServer::start(test_name!())?;
    let other = ApiServer::start(test_name!())?;
    assert_ne!(one.url(), other.url());
    one.kubectl().run(&["create", "namespace", "shop"])?;
    assert!(other.kubectl().run(&["get", "namespace", "shop"]).is_err());
    let directory = other.directory().to_path_buf();
    assert!(directory.is_dir());
    drop(other);
    assert!(!directory.exists(), "{} is still there", directory.display());
    one.kubectl().run(&["get", "namespace", "shop"])?;
    Ok(())
}
