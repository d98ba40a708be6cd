//! Owns `meshctl bug-report`: one archive with what an engineer needs, and nothing that must stay secret.
//!
//! Invariants:
//! - No Secret is ever asked for, no key, token or certificate's key is in what agents answer, and values of environment variables and of
//!   annotations that hold whole objects are left out.
//! - What cannot be had is in the archive as the reason why; the rest is there all the same.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use flate2::{Compression, write::GzEncoder};
use k8s_openapi::api::{
    admissionregistration::v1::ValidatingWebhookConfiguration,
    apps::v1::{DaemonSet, Deployment},
    coordination::v1::Lease,
    core::v1::{ConfigMap, Event, Namespace, Node, Pod, Service},
};
use kube::{
    Api, ResourceExt,
    api::{DynamicObject, LogParams},
};
use serde_json::Value;

use super::{
    CtlError, Output,
    cluster::{self, Cluster, ClusterArgs, ClusterError, Doing, defined, list},
    install::{ObjectKind, of_mesh},
    print,
};
use crate::{report::report, view::paths};

/// Longest wait for an agent's answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// Most bytes of one container's log.
const LOG_BYTES_MAX: i64 = 16 << 20;
/// Annotation with a whole object, secrets of its author included.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Options of `bug-report`.
#[derive(Clone, Debug, clap::Args)]
pub struct BugReportArgs {
    /// Where to write it. [default: nodemesh-bug-report-SECONDS.tar.gz here]
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Seconds of logs, counted back from now.
    #[arg(long, value_name = "SECONDS", default_value_t = 7200, value_parser = clap::value_parser!(i64).range(1..))]
    pub logs_since: i64,
}

/// Why there is no archive.
#[derive(Debug, thiserror::Error)]
enum BugReportError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("write {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Print(#[from] CtlError),
}

/// What was written.
#[derive(Debug, serde::Serialize)]
struct Written {
    file: PathBuf,
    files: usize,
}

/// Answers `bug-report`.
pub(super) fn run(args: &BugReportArgs, of: &ClusterArgs, out: Output) -> ExitCode {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let path = args.file.clone().unwrap_or_else(|| format!("nodemesh-bug-report-{seconds}.tar.gz").into());
    let done = cluster::run(of, async |cluster| {
        let pages = collect(&cluster, args).await;
        write(&path, seconds, &pages)
            .map_err(|source| BugReportError::Write { path: path.clone(), source })?;
        let written = Written { file: path.clone(), files: pages.len() };
        print(out, &written, |written| {
            format!(
                "{} holds {} files. It has no Secrets; look through it before you give it away.\n",
                written.file.display(),
                written.files
            )
        })?;
        Ok::<(), BugReportError>(())
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("meshctl: {}", report(&error));
            ExitCode::FAILURE
        }
    }
}

/// One file of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Page {
    name: String,
    text: String,
}

/// A page, or the reason why there is none.
fn page(name: impl Into<String>, text: Result<String, ClusterError>) -> Page {
    let name = name.into();
    match text {
        Ok(text) => Page { name, text },
        Err(error) => Page { name: format!("{name}.error"), text: report(&error) },
    }
}

async fn collect(cluster: &Cluster, args: &BugReportArgs) -> Vec<Page> {
    let server =
        cluster.client.apiserver_version().await.doing(|| "ask the API server for its version".to_owned());
    let server = server.map(|version| version.git_version);
    let mut pages = vec![
        page("meshctl-version.txt", Ok(env!("CARGO_PKG_VERSION").to_owned())),
        page("kubernetes-version.txt", server),
    ];
    let mesh = Some(cluster.mesh.as_str());
    let kinds = [
        (ObjectKind::of::<Node>(), None),
        (ObjectKind::of::<Namespace>(), None),
        (ObjectKind::of::<Deployment>(), mesh),
        (ObjectKind::of::<DaemonSet>(), mesh),
        (ObjectKind::of::<Pod>(), mesh),
        (ObjectKind::of::<Service>(), mesh),
        (ObjectKind::of::<ConfigMap>(), mesh),
        (ObjectKind::of::<Lease>(), mesh),
        (ObjectKind::of::<Event>(), mesh),
    ];
    for (kind, namespace) in kinds {
        let objects = cluster.list(kind, namespace, "").await;
        pages.push(page(format!("objects/{}.json", kind.plural), objects.map(|objects| text(&objects))));
    }
    let kind = ObjectKind::of::<ValidatingWebhookConfiguration>();
    let objects = cluster.list(kind, None, &of_mesh()).await;
    pages.push(page("objects/webhooks.json", objects.map(|objects| text(&objects))));
    pages.extend(resources(cluster).await);
    pages.extend(agents(cluster).await);
    pages.extend(logs(cluster, args.logs_since).await);
    pages
}

/// The resources that the mesh reads.
async fn resources(cluster: &Cluster) -> Vec<Page> {
    let found = match cluster.definitions().await {
        Ok(found) => found,
        Err(error) => return vec![page("resources", Err(error))],
    };
    let mut pages = Vec::new();
    for wanted in mesh_control::crd::all() {
        let name = wanted.name_any();
        let Some(found) = found.iter().find(|found| found.name_any() == name) else { continue };
        let served = found.spec.versions.iter().find(|version| version.storage && version.served);
        let Some(version) = served.or(found.spec.versions.iter().find(|version| version.served)) else {
            continue;
        };
        let resource = defined(found, &version.name);
        let api: Api<DynamicObject> = Api::all_with(cluster.client.clone(), &resource);
        let objects = list(&api, "").await.doing(|| format!("list {name}"));
        pages.push(page(format!("resources/{name}.json"), objects.map(|objects| text(&objects))));
    }
    pages
}

/// What each agent says of itself.
async fn agents(cluster: &Cluster) -> Vec<Page> {
    let agents = match cluster.agents().await {
        Ok(agents) => agents,
        Err(error) => return vec![page("nodes", Err(error))],
    };
    let questions = [
        ("status", paths::STATUS),
        ("certificates", paths::CERTIFICATES),
        ("connections", paths::CONNECTIONS),
        ("edges", paths::EDGES),
        ("routes", paths::ROUTES),
        ("clusters", paths::CLUSTERS),
        ("endpoints", paths::ENDPOINTS),
    ];
    let mut pages = Vec::new();
    for agent in &agents {
        for (name, path) in questions {
            let answer = cluster.ask::<Value>(agent, path, &[], ANSWER_WITHIN).await;
            let text = answer.map(|answer| format!("{answer:#}\n"));
            let missing = text.is_err();
            pages.push(page(format!("nodes/{}/{name}.json", agent.node), text));
            // An agent that cannot be asked one thing will not answer the others either.
            if missing {
                break;
            }
        }
    }
    pages
}

/// Logs of the mesh's containers, also of those that ended before.
async fn logs(cluster: &Cluster, since: i64) -> Vec<Page> {
    let api = cluster.own::<Pod>();
    let pods = match cluster.pods(&of_mesh()).await {
        Ok(pods) => pods,
        Err(error) => return vec![page("logs", Err(error))],
    };
    let mut pages = Vec::new();
    for pod in pods {
        let name = pod.name_any();
        let statuses = pod.status.and_then(|status| status.container_statuses).unwrap_or_default();
        for container in statuses {
            let mut params = LogParams {
                container: Some(container.name.clone()),
                since_seconds: Some(since),
                limit_bytes: Some(LOG_BYTES_MAX),
                timestamps: true,
                ..LogParams::default()
            };
            let file = format!("logs/{name}.{}", container.name);
            let log = api.logs(&name, &params).await.doing(|| format!("get the log of {name}"));
            pages.push(page(format!("{file}.log"), log));
            if container.restart_count > 0 {
                params.previous = true;
                let log = api
                    .logs(&name, &params)
                    .await
                    .doing(|| format!("get the log of {name} before its restart"));
                pages.push(page(format!("{file}.previous.log"), log));
            }
        }
    }
    pages
}

/// Objects without what may be secret and what is only long.
fn text(objects: &[DynamicObject]) -> String {
    let clean = |object: &DynamicObject| {
        let mut object = object.clone();
        object.metadata.managed_fields = None;
        if let Some(annotations) = &mut object.metadata.annotations {
            annotations.remove(LAST_APPLIED);
        }
        let mut value = serde_json::to_value(&object).unwrap_or(Value::Null);
        without_values(&mut value);
        value
    };
    let all: Vec<Value> = objects.iter().map(clean).collect();
    format!("{:#}\n", Value::Array(all))
}

/// Takes the values of environment variables away, except those of our own that are on the command line too.
fn without_values(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::Array(variables)) = fields.get_mut("env") {
                for variable in variables {
                    let ours = variable
                        .get("name")
                        .and_then(Value::as_str)
                        .is_some_and(|name| name.starts_with("MESH_"));
                    if let (false, Some(value)) = (ours, variable.get_mut("value")) {
                        *value = Value::from("(left out)");
                    }
                }
            }
            fields.values_mut().for_each(without_values);
        }
        Value::Array(items) => items.iter_mut().for_each(without_values),
        _ => {}
    }
}

/// Writes the archive beside its place and moves it there whole, readable for its owner only.
fn write(path: &PathBuf, seconds: u64, pages: &[Page]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut beside = path.clone().into_os_string();
    beside.push(".part");
    let file: File =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    for page in pages {
        let mut header = tar::Header::new_gnu();
        header.set_size(page.text.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(seconds);
        archive.append_data(
            &mut header,
            format!("nodemesh-bug-report/{}", page.name),
            page.text.as_bytes(),
        )?;
    }
    archive.into_inner()?.finish()?.sync_all()?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_of_variables_and_whole_objects_in_annotations_are_left_out() {
        let object: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "a", "annotations": {LAST_APPLIED: "hunter2", "b": "c"}, "managedFields": [{"manager": "x"}]},
            "spec": {"containers": [{"env": [{"name": "PASSWORD", "value": "hunter2"}, {"name": "MESH_LOG", "value": "info"}]}]},
        }))
        .unwrap();
        let text = text(&[object]);
        assert!(!text.contains("hunter2") && !text.contains("manager"), "{text}");
        assert!(
            text.contains("PASSWORD") && text.contains("\"info\"") && text.contains("\"b\": \"c\""),
            "{text}"
        );
    }

    #[test]
    fn what_could_not_be_had_is_in_the_archive_as_the_reason() {
        let folder = std::env::temp_dir().join(format!("mesh-bug-report-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("report.tar.gz");
        let pages =
            [page("a.json", Ok("{}".to_owned())), page("b", Err(ClusterError::Said("forbidden".to_owned())))];
        write(&path, 1, &pages).unwrap();
        let file = flate2::read::GzDecoder::new(File::open(&path).unwrap());
        let mut archive = tar::Archive::new(file);
        let found: Vec<(String, String)> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut text = String::new();
                io::Read::read_to_string(&mut entry, &mut text).unwrap();
                (entry.path().unwrap().display().to_string(), text)
            })
            .collect();
        fs::remove_dir_all(&folder).unwrap();
        let wanted = [("nodemesh-bug-report/a.json", "{}"), ("nodemesh-bug-report/b.error", "forbidden")];
        assert_eq!(found, wanted.map(|(name, text)| (name.to_owned(), text.to_owned())));
    }
}
