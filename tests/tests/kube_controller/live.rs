//! What users are told of a cluster without an agent: by the settings of the mesh that is installed there.

use std::process::Command;

use mesh_tests::{Failure, TestResult, programs, require_agent, require_api_server, test_name};
use serde_json::{Value, json};

use crate::objects;
use crate::scene::{NAMESPACE, Scene};

/// What `meshctl COMMAND --live` says, one line for each problem of the rules for one host and of MeshConfigs.
fn said(scene: &Scene, command: &str) -> Result<Vec<String>, Failure> {
    let mut meshctl = Command::new(programs::meshctl()?);
    meshctl.args([command, "--live", "-o", "json", "--kubeconfig"]).arg(scene.kubectl().kubeconfig());
    let output = meshctl.output()?;
    let rows: Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| anyhow::anyhow!("{error}: {}", String::from_utf8_lossy(&output.stderr)))?;
    let text = |row: &Value, field: &str| row[field].as_str().unwrap_or_default().to_owned();
    let about =
        |row: &&Value| ["first", "second", "nodemesh", "istio"].iter().any(|name| row["name"] == *name);
    let line =
        |row: &Value| format!("{} {}: {}", text(row, "name"), text(row, "field"), text(row, "message"));
    Ok(rows.as_array().into_iter().flatten().filter(about).map(line).collect())
}

fn config(namespace: &str, name: &str, mesh: &str) -> String {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace},
        "data": {"mesh": mesh}})
    .to_string()
}

#[test]
fn live_answers_go_by_the_clusters_own_mesh_config() -> TestResult {
    require_api_server!();
    require_agent!();
    let scene = Scene::open(test_name!())?;
    let kubectl = scene.kubectl();
    kubectl.apply(&objects::crds())?;
    kubectl.apply(&objects::shop())?;
    kubectl.apply(&objects::namespace("else"))?;
    kubectl.apply(&objects::namespace("istio-system"))?;
    // Two for one host, for clients that see both.
    let rule = |namespace: &str, name: &str| {
        json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"hosts": ["api.example.com"], "http": [{"route": [{"destination": {"host": "api.example.com"}}]}]}})
        .to_string()
    };
    kubectl.apply(&rule("shop", "first"))?;
    kubectl.apply(&rule("else", "second"))?;
    // Another mesh's settings are nothing to us, whatever is in them.
    let own_alone = "defaultVirtualServiceExportTo: ['.']";
    kubectl.apply(&config("istio-system", "istio", &format!("{own_alone}\ntrustDomain: '/'")))?;
    let both = said(&scene, "analyze")?;
    let is_one = |only: &str| only.contains("spec.hosts[0]: is api.example.com, which VirtualService");
    assert!(both.iter().any(|said| is_one(said)), "{both:?}");
    assert_eq!(said(&scene, "validate")?, [""; 0]);

    kubectl.apply(&config(NAMESPACE, "nodemesh", &format!("{own_alone}\nrootNamespace: istio-system")))?;
    assert_eq!(said(&scene, "validate")?, [""; 0], "the root namespace is the one that counts");
    assert_eq!(said(&scene, "analyze")?, [""; 0], "nobody sees both");

    kubectl.apply(&config(NAMESPACE, "nodemesh", "trustDomain: '/'"))?;
    let wrong = said(&scene, "validate")?;
    assert!(
        matches!(&wrong[..], [only] if only.starts_with("nodemesh data.mesh.trustDomain: is \"/\"")),
        "{wrong:?}"
    );
    Ok(())
}
