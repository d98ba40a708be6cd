//! Tests of `validate` and `analyze` over manifests in a temporary folder.

use std::fs;

use clap::Parser;

use super::*;
use crate::ctl::{Args, Command};

/// A folder of manifests that goes away with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let dir = std::env::temp_dir().join(format!("nodemesh-validate-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for (file, text) in files {
            fs::write(dir.join(file), text).unwrap();
        }
        Self(dir)
    }

    fn answer(&self, command: &str) -> Answer {
        let line = ["meshctl", command, self.0.to_str().unwrap()];
        match Args::try_parse_from(line).unwrap().command {
            Command::Validate(args) => validated(&args, &ClusterArgs::default()).unwrap(),
            Command::Analyze(args) => analyzed(&args, &ClusterArgs::default()).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

const SERVICE: &str = "
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}}
---
{apiVersion: apps/v1, kind: Deployment, metadata: {name: web, namespace: shop}}
";

const ROUTE: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: web}]
  rules:
  - backendRefs: [{name: web-v1, port: 80}]
";

#[test]
fn every_row_has_the_eight_fields_and_an_error_makes_the_status_1() {
    let broken = ROUTE.replace("port: 80", "port: 0");
    let folder = Folder::new("rows", &[("a.yaml", SERVICE), ("b.yaml", &broken)]);
    let answer = folder.answer("validate");
    let json = serde_json::to_value(&answer.rows).unwrap();
    let file = folder.0.join("b.yaml");
    assert_eq!(
        json,
        serde_json::json!([{
            "file": file, "document": 1, "kind": "HTTPRoute", "namespace": "shop", "name": "web", "level": "error",
            "field": "spec.rules[0].backendRefs[0].port", "message": "is 0, wanted a number from 1 to 65535",
        }])
    );
    assert_eq!(
        render(&answer.rows),
        format!(
            "FILE{pad}  DOCUMENT  KIND       NAMESPACE  NAME  LEVEL  FIELD                              MESSAGE\n\
             {file}         1  HTTPRoute  shop       web   error  spec.rules[0].backendRefs[0].port  is 0, wanted a number from 1 to 65535\n",
            pad = " ".repeat(file.to_str().unwrap().len() - 4),
            file = file.display(),
        )
    );
    assert_eq!(
        summary(&answer),
        "2 files, 1 resource: 1 error, 0 warnings; not read by the mesh: 1 (apps/v1/Deployment 1)"
    );
    assert!(!show(&answer, Output::Json).unwrap());
}

#[test]
fn what_is_valid_has_no_rows_and_status_0() {
    let folder = Folder::new("valid", &[("a.yaml", SERVICE), ("b.yaml", ROUTE)]);
    let answer = folder.answer("validate");
    assert_eq!(answer.rows, []);
    assert_eq!(render(&answer.rows), "");
    assert!(show(&answer, Output::Text).unwrap());
}

#[test]
fn a_warning_alone_is_no_failure_and_an_unknown_kind_of_a_known_group_is_one() {
    let other =
        "{apiVersion: networking.istio.io/v1alpha3, kind: EnvoyFilter, metadata: {name: x, namespace: shop}}";
    let folder = Folder::new("unread", &[("a.yaml", other)]);
    let answer = folder.answer("validate");
    let [row] = &answer.rows[..] else { panic!("{:?}", answer.rows) };
    assert_eq!((row.level, &*row.field, row.name.as_deref()), (Level::Warning, "kind", Some("x")));
    assert!(show(&answer, Output::Json).unwrap());
}

#[test]
fn analyze_finds_what_is_missing_between_valid_resources() {
    let folder = Folder::new("analyze", &[("a.yaml", SERVICE), ("b.yaml", ROUTE)]);
    let rows = folder.answer("analyze").rows;
    let missing: Vec<&str> = rows
        .iter()
        .filter(|row| row.level == Level::Error && row.field == "spec.rules[0].backendRefs[0]")
        .map(|row| row.message.as_str())
        .collect();
    assert!(
        missing.iter().any(|message| message.starts_with("is Service shop/web-v1, which does not exist")),
        "{rows:?}"
    );
}

#[test]
fn what_cannot_be_read_has_no_answer() {
    let args = |line: &[&str]| match Args::try_parse_from(line).unwrap().command {
        Command::Validate(args) => args,
        other => panic!("{other:?}"),
    };
    let error =
        validated(&args(&["meshctl", "validate", "/nonexistent.yaml"]), &ClusterArgs::default()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent.yaml"), "{error}");
    assert_eq!(Args::try_parse_from(["meshctl", "validate"]).unwrap_err().exit_code(), 2);
}
