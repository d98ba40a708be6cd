//! Owns what can be set: the values of the chart, which are those of `meshctl install` too.
//!
//! Invariants:
//! - Every default stands in the chart's `values.yaml`, and each profile in a file beside it. A map or list that is taken away by `null` is empty.
//! - A value that is not known is an error that names it.

use std::{collections::BTreeMap, fs, io, path::PathBuf, time::Duration};

use k8s_openapi::{
    api::core::v1::{LocalObjectReference, ResourceRequirements, Toleration},
    apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement},
};
use kube::core::Selector;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::cli::duration;

/// What an agent needs to end besides the drain of its connections. The chart's template for agents has it too.
const END_WITHIN: Duration = Duration::from_secs(5);

/// The chart's defaults.
const DEFAULTS: &str = include_str!("../../../../deploy/helm/nodemesh/values.yaml");

/// A set of values for a purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Profile {
    /// As little as works: one controller, small requests. For small clusters and CI.
    Minimal,
    /// For production.
    #[default]
    Default,
    /// Everything visible: verbose logs, access logs of every request. For trying it out.
    Demo,
}

impl Profile {
    /// Its file in the chart.
    const fn text(self) -> &'static str {
        match self {
            Self::Minimal => include_str!("../../../../deploy/helm/nodemesh/profiles/minimal.yaml"),
            Self::Default => include_str!("../../../../deploy/helm/nodemesh/profiles/default.yaml"),
            Self::Demo => include_str!("../../../../deploy/helm/nodemesh/profiles/demo.yaml"),
        }
    }
}

/// All that can be set.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Values {
    pub(crate) image: String,
    pub(crate) image_pull_policy: String,
    #[serde(default)]
    pub(crate) image_pull_secrets: Vec<LocalObjectReference>,
    pub(crate) cluster_domain: String,
    pub(crate) root_namespace: String,
    pub(crate) listen_address: String,
    #[serde(default)]
    pub(crate) mesh_config: Map<String, Value>,
    pub(crate) logging: Logging,
    pub(crate) controller: Controller,
    pub(crate) agent: Agent,
    pub(crate) cni: Cni,
    pub(crate) webhook: Webhook,
}

/// How controller and agents log.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Logging {
    pub(crate) level: String,
    pub(crate) format: String,
}

/// The controller's pods.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Controller {
    pub(crate) replicas: i32,
    /// Secrets that DestinationRules name are read.
    #[serde(default)]
    pub(crate) read_secrets: bool,
    #[serde(default)]
    pub(crate) resources: ResourceRequirements,
    #[serde(default)]
    pub(crate) node_selector: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) tolerations: Vec<Toleration>,
    pub(crate) priority_class_name: String,
    #[serde(default)]
    pub(crate) pod_annotations: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "texts")]
    pub(crate) env: BTreeMap<String, String>,
}

/// The agents' pods.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Agent {
    #[serde(default)]
    pub(crate) resources: ResourceRequirements,
    #[serde(default)]
    pub(crate) node_selector: BTreeMap<String, String>,
    /// What is asked of their nodes' labels beside that.
    #[serde(default)]
    pub(crate) node_expressions: Vec<LabelSelectorRequirement>,
    #[serde(default)]
    pub(crate) tolerations: Vec<Toleration>,
    pub(crate) priority_class_name: String,
    #[serde(default)]
    pub(crate) pod_annotations: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "texts")]
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) cgroup_root: String,
    pub(crate) prober_cgroup: String,
    pub(crate) drain: String,
    pub(crate) termination_grace_period_seconds: i64,
    pub(crate) max_surge: i32,
}

impl Agent {
    /// An agent that drains for longer than Kubernetes waits is killed in the middle of it.
    fn check_drain(&self) -> Result<(), ValuesError> {
        let (found, grace_s) = (&self.drain, self.termination_grace_period_seconds);
        let wrong = |wanted: String| ValuesError::Value {
            field: "agent.drain".to_owned(),
            reason: format!("is {found:?}, wanted {wanted}"),
        };
        let drain = duration(found).map_err(|_| wrong("a duration such as 500ms, 30s or 2m".to_owned()))?;
        let grace = Duration::from_secs(u64::try_from(grace_s).unwrap_or(0));
        if drain.saturating_add(END_WITHIN) > grace {
            return Err(wrong(format!(
                "{} s less than agent.terminationGracePeriodSeconds, which is {grace_s}: an agent is killed when that is over",
                END_WITHIN.as_secs(),
            )));
        }
        Ok(())
    }

    /// The nodes that have one.
    pub(crate) fn nodes(&self) -> LabelSelector {
        LabelSelector {
            match_expressions: (!self.node_expressions.is_empty()).then(|| self.node_expressions.clone()),
            match_labels: (!self.node_selector.is_empty()).then(|| self.node_selector.clone()),
        }
    }
}

/// Where container runtimes look for CNI plugins, and what becomes of pods that cannot be enrolled.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Cni {
    pub(crate) bin_dir: String,
    pub(crate) conf_dir: String,
    pub(crate) unenrolled: String,
}

/// The admission webhook.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Webhook {
    pub(crate) enabled: bool,
    pub(crate) failure_policy: String,
    pub(crate) timeout_seconds: i32,
}

/// Texts, numbers and truth values, all as text: `--set` makes numbers of what looks like one.
fn texts<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    let map = BTreeMap::<String, Value>::deserialize(deserializer)?;
    let text = |(name, value)| match value {
        Value::String(text) => Ok((name, text)),
        Value::Number(number) => Ok((name, number.to_string())),
        Value::Bool(truth) => Ok((name, truth.to_string())),
        other => Err(serde::de::Error::custom(format!("{name} is {other}, wanted text"))),
    };
    map.into_iter().map(text).collect()
}

/// Why values cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ValuesError {
    #[error("read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{origin} is no YAML")]
    Parse {
        origin: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{origin} is no map of values")]
    NoMap { origin: String },
    #[error("--set {text:?}: want NAME=VALUE, e.g. agent.cgroupRoot=/sys/fs/cgroup")]
    Set { text: String },
    #[error("--set {text:?}: {part} is no map that has {rest:?}")]
    NotInside { text: String, part: String, rest: String },
    #[error("{field}: {reason}; see `helm show values deploy/helm/nodemesh`, or values.yaml of the chart")]
    Value { field: String, reason: String },
}

/// What a user asks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wishes {
    pub(crate) profile: Profile,
    pub(crate) files: Vec<PathBuf>,
    /// `a.b=c`, later ones win.
    pub(crate) set: Vec<String>,
}

impl Values {
    /// The values for these wishes: defaults, then the profile, then files, then single values.
    pub(crate) fn read(wishes: &Wishes) -> Result<Self, ValuesError> {
        Self::of(merged(wishes)?)
    }

    /// Checks a whole tree of values.
    pub(crate) fn of(tree: Map<String, Value>) -> Result<Self, ValuesError> {
        let values: Self = serde_path_to_error::deserialize(Value::Object(tree)).map_err(|error| {
            ValuesError::Value { field: error.path().to_string(), reason: error.inner().to_string() }
        })?;
        let words: [(&str, &str, &[&str]); 4] = [
            ("imagePullPolicy", &values.image_pull_policy, &["Always", "IfNotPresent", "Never"]),
            ("logging.format", &values.logging.format, &["text", "json"]),
            ("cni.unenrolled", &values.cni.unenrolled, &["fail", "allow"]),
            ("webhook.failurePolicy", &values.webhook.failure_policy, &["Fail", "Ignore"]),
        ];
        for (field, found, wanted) in words {
            if !wanted.contains(&found) {
                let reason = format!("is {found:?}, wanted {}", wanted.join(" or "));
                return Err(ValuesError::Value { field: field.to_owned(), reason });
            }
        }
        if let Err(error) = Selector::try_from(values.agent.nodes()) {
            let field = "agent.nodeExpressions".to_owned();
            return Err(ValuesError::Value { field, reason: error.to_string() });
        }
        if values.image.is_empty() {
            return Err(ValuesError::Value { field: "image".to_owned(), reason: "is empty".to_owned() });
        }
        let numbers = [
            ("controller.replicas", i64::from(values.controller.replicas), 1..=100),
            ("agent.maxSurge", i64::from(values.agent.max_surge), 1..=1000),
            ("agent.terminationGracePeriodSeconds", values.agent.termination_grace_period_seconds, 1..=3600),
            ("webhook.timeoutSeconds", i64::from(values.webhook.timeout_seconds), 1..=30),
        ];
        for (field, found, wanted) in numbers {
            if !wanted.contains(&found) {
                let reason =
                    format!("is {found}, wanted a number from {} to {}", wanted.start(), wanted.end());
                return Err(ValuesError::Value { field: field.to_owned(), reason });
            }
        }
        values.agent.check_drain()?;
        Ok(values)
    }
}

/// The tree of values for these wishes, unchecked.
pub(crate) fn merged(wishes: &Wishes) -> Result<Map<String, Value>, ValuesError> {
    let mut tree = parse(DEFAULTS, "values.yaml of the chart")?;
    merge(&mut tree, parse(wishes.profile.text(), "the profile")?);
    for path in &wishes.files {
        let text =
            fs::read_to_string(path).map_err(|source| ValuesError::Read { path: path.clone(), source })?;
        merge(&mut tree, parse(&text, &path.display().to_string())?);
    }
    for text in &wishes.set {
        set(&mut tree, text)?;
    }
    Ok(tree)
}

fn parse(text: &str, origin: &str) -> Result<Map<String, Value>, ValuesError> {
    let value: Option<Value> = serde_saphyr::from_str(text)
        .map_err(|source| ValuesError::Parse { origin: origin.to_owned(), source: Box::new(source) })?;
    match value {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map),
        Some(_) => Err(ValuesError::NoMap { origin: origin.to_owned() }),
    }
}

/// Lays `over` over `under`, maps into maps; `null` takes a value away, as Helm does.
fn merge(under: &mut Map<String, Value>, over: Map<String, Value>) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (_, Value::Null) => {
                under.remove(&key);
            }
            (Some(Value::Object(under)), Value::Object(over)) => merge(under, over),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// Carries out one `a.b.c=value`; a dot within a name is written `\.`.
fn set(tree: &mut Map<String, Value>, text: &str) -> Result<(), ValuesError> {
    let wrong = || ValuesError::Set { text: text.to_owned() };
    let (path, value) = text.split_once('=').ok_or_else(wrong)?;
    let names = names(path);
    if names.iter().any(String::is_empty) {
        return Err(wrong());
    }
    let mut at = tree;
    let (last, way) = names.split_last().ok_or_else(wrong)?;
    for (depth, name) in way.iter().enumerate() {
        at = match at.entry(name.clone()).or_insert_with(|| Value::Object(Map::new())) {
            Value::Object(map) => map,
            _ => {
                return Err(ValuesError::NotInside {
                    text: text.to_owned(),
                    part: names[..=depth].join("."),
                    rest: names[depth + 1..].join("."),
                });
            }
        };
    }
    match scalar(value) {
        Value::Null => at.remove(last),
        value => at.insert(last.clone(), value),
    };
    Ok(())
}

fn names(path: &str) -> Vec<String> {
    let mut names = vec![String::new()];
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        let next = match c {
            '.' => {
                names.push(String::new());
                continue;
            }
            '\\' => chars.next().unwrap_or('\\'),
            c => c,
        };
        if let Some(name) = names.last_mut() {
            name.push(next);
        }
    }
    names
}

/// As Helm's `--set` reads it: whole numbers, truth values and `null`; all else is text.
fn scalar(text: &str) -> Value {
    match text {
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        "null" => Value::Null,
        "{}" => Value::Object(Map::new()),
        // `007` and `+1` are text.
        number if number == "0" || !number.starts_with(['0', '+']) => {
            number.parse::<i64>().map_or_else(|_| Value::from(number), Value::from)
        }
        text => Value::from(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(set: &[&str]) -> Result<Values, ValuesError> {
        Values::read(&Wishes { set: set.iter().map(ToString::to_string).collect(), ..Wishes::default() })
    }

    #[test]
    fn every_profile_is_a_good_set_of_values() {
        for profile in [Profile::Minimal, Profile::Default, Profile::Demo] {
            assert!(Values::read(&Wishes { profile, ..Wishes::default() }).is_ok(), "{profile:?}");
        }
    }

    /// Values that Helm would refuse: the schema has no place for them.
    fn unknown_to(schema: &Value, values: &Value, at: &str) -> Vec<String> {
        let (Some(values), Some(known)) = (values.as_object(), schema["properties"].as_object()) else {
            return Vec::new();
        };
        let of = |(name, value): (&String, &Value)| {
            let at = format!("{at}.{name}");
            known.get(name).map_or_else(|| vec![at.clone()], |schema| unknown_to(schema, value, &at))
        };
        values.iter().flat_map(of).collect()
    }

    #[test]
    fn helm_takes_every_value_that_has_a_default() {
        let schema = include_str!("../../../../deploy/helm/nodemesh/values.schema.json");
        let schema = Value::Object(parse(schema, "values.schema.json").unwrap());
        let defaults = Value::Object(parse(DEFAULTS, "values.yaml").unwrap());
        assert_eq!(unknown_to(&schema, &defaults, ""), Vec::<String>::new());
        let wrong = serde_json::json!({"controller": {"replica": 1}});
        assert_eq!(unknown_to(&schema, &wrong, ""), [".controller.replica"]);
    }

    #[test]
    fn the_default_image_is_of_this_version() {
        assert_eq!(read(&[]).unwrap().image, format!("nodemesh:{}", env!("CARGO_PKG_VERSION")));
    }

    #[test]
    fn single_values_reach_any_depth_and_keep_their_type() {
        let values = read(&[
            "image=localhost/nodemesh:dev",
            "controller.replicas=3",
            "webhook.enabled=false",
            r"agent.nodeSelector.kubernetes\.io/arch=arm64",
            "meshConfig.outboundTrafficPolicy.mode=REGISTRY_ONLY",
        ])
        .unwrap();
        assert_eq!((values.image.as_str(), values.controller.replicas), ("localhost/nodemesh:dev", 3));
        assert!(!values.webhook.enabled);
        assert_eq!(values.agent.node_selector["kubernetes.io/arch"], "arm64");
        assert_eq!(values.mesh_config["outboundTrafficPolicy"]["mode"], "REGISTRY_ONLY");
    }

    #[test]
    fn a_wrong_value_is_named_with_what_is_wanted() {
        for (set, wanted) in [
            ("controler.replicas=3", "controler"),
            ("controller.replicas=many", "controller.replicas"),
            ("controller.replicas=0", "controller.replicas: is 0, wanted a number from 1 to 100"),
            ("webhook.failurePolicy=Maybe", "webhook.failurePolicy: is \"Maybe\", wanted Fail or Ignore"),
            ("image=", "image: is empty"),
            ("agent.drain=soon", "agent.drain: is \"soon\", wanted a duration such as 500ms, 30s or 2m"),
            ("agent.drain=1.5m", "agent.drain: is \"1.5m\", wanted a duration"),
            ("agent.drain=30", "agent.drain: invalid type: integer"),
            (
                "agent.drain=36s",
                "agent.drain: is \"36s\", wanted 5 s less than agent.terminationGracePeriodSeconds, which is 40",
            ),
            ("agent.drain=18446744073709551615ms", "wanted 5 s less than"),
            (
                "agent.terminationGracePeriodSeconds=30",
                "agent.drain: is \"30s\", wanted 5 s less than agent.terminationGracePeriodSeconds, which is 30",
            ),
            ("agent.terminationGracePeriodSeconds=0", "wanted a number from 1 to 3600"),
            ("image", "want NAME=VALUE"),
            ("image.tag=x", "image is no map"),
            ("=x", "want NAME=VALUE"),
        ] {
            let text = read(&[set]).unwrap_err().to_string();
            assert!(text.contains(wanted), "{set}: {text}");
        }
    }

    #[test]
    fn a_drain_may_take_all_of_the_grace_but_what_the_agent_needs_to_end() {
        for set in [
            &["agent.drain=35s"][..],
            &["agent.drain=35000ms"],
            &["agent.drain=0s"],
            &["agent.drain=10m", "agent.terminationGracePeriodSeconds=605"],
        ] {
            assert!(read(set).is_ok(), "{set:?}");
        }
        assert!(read(&["agent.drain=35001ms"]).is_err());
    }

    #[test]
    fn later_values_win_and_null_takes_away() {
        let mut tree = Map::new();
        for text in ["a.b=1", "a.c=x", "a.b=2", "d=1", "d=null"] {
            set(&mut tree, text).unwrap();
        }
        merge(&mut tree, parse("a: {c: null, e: [1]}", "test").unwrap());
        assert_eq!(Value::Object(tree), serde_json::json!({"a": {"b": 2, "e": [1]}}));
    }
}
