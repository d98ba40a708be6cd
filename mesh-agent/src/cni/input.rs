//! Owns reading what the container runtime says to the plugin: the environment, and the configuration on standard input.
//!
//! Invariant: total; every input is a call or an error with the specification's code.

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    VERSIONS,
    failure::{Code, Failure},
    known,
    protocol::{Attachment, ContainerRef, PodRef},
};

/// What becomes of a pod of the mesh that cannot be enrolled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Unenrolled {
    /// It does not start.
    #[default]
    Fail,
    /// It starts outside the mesh; the agent enrols it as soon as it can.
    Allow,
}

/// The plugin's own part of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Settings {
    /// The agent's socket.
    pub socket: PathBuf,
    /// What the agent last knew.
    pub known: PathBuf,
    /// What becomes of a pod that cannot be enrolled.
    #[serde(default)]
    pub unenrolled: Unenrolled,
    /// Namespaces whose pods are never held: the mesh's own.
    #[serde(default)]
    pub exempt: BTreeSet<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            socket: "/run/nodemesh/cni.sock".into(),
            known: PathBuf::from("/run/nodemesh").join(known::FILE),
            unenrolled: Unenrolled::default(),
            exempt: BTreeSet::from(["nodemesh-system".to_owned()]),
        }
    }
}

/// What is asked of the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Version,
    Status,
    /// `attachment` is absent for containers that are no pods.
    Add {
        attachment: Option<Attachment>,
        result: Value,
    },
    Del(ContainerRef),
    Check {
        attachment: Option<Attachment>,
    },
    Gc(Vec<ContainerRef>),
}

/// A call with the plugin's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Input {
    pub(super) call: Call,
    pub(super) settings: Settings,
}

/// The configuration as the runtime gives it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    nodemesh: Settings,
    prev_result: Option<Value>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<Valid>>,
}

#[derive(Debug, Deserialize)]
struct Valid {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

impl Input {
    /// Reads the environment by `variable`, and the configuration.
    pub(super) fn read(variable: &dyn Fn(&str) -> Option<String>, text: &[u8]) -> Result<Self, Failure> {
        let command = required(variable, "CNI_COMMAND")?;
        if command == "VERSION" {
            return Ok(Self { call: Call::Version, settings: Settings::default() });
        }
        let config: Config = serde_json::from_slice(text).map_err(|error| {
            Failure::new(Code::Decode, format!("the configuration cannot be read: {error}"))
        })?;
        if !VERSIONS.contains(&config.cni_version.as_str()) {
            let message =
                format!("cniVersion is {:?}, wanted one of {}", config.cni_version, VERSIONS.join(", "));
            return Err(Failure::new(Code::Version, message));
        }
        let call = match command.as_str() {
            "ADD" => {
                let container = container(variable)?;
                let result = config.prev_result.ok_or_else(unchained)?;
                let attachment = attachment(variable, container, &result)?;
                Call::Add { attachment, result: versioned(result, &config.cni_version) }
            }
            "DEL" => Call::Del(container(variable)?),
            "CHECK" => {
                let container = container(variable)?;
                let result = config.prev_result.ok_or_else(unchained)?;
                Call::Check { attachment: attachment(variable, container, &result)? }
            }
            "GC" => {
                let valid = config.valid_attachments.ok_or_else(|| {
                    Failure::new(Code::Config, "cni.dev/valid-attachments is missing".to_owned())
                })?;
                let container = |v: Valid| ContainerRef { container_id: v.container_id, ifname: v.ifname };
                Call::Gc(valid.into_iter().map(container).collect())
            }
            "STATUS" => Call::Status,
            other => {
                let message = format!("CNI_COMMAND is {other:?}, which is no command of CNI");
                return Err(Failure::new(Code::Environment, message));
            }
        };
        Ok(Self { call, settings: config.nodemesh })
    }
}

fn unchained() -> Failure {
    let message = "there is no prevResult: this plugin goes after the one that makes the pod's network";
    Failure::new(Code::Config, message)
}

fn required(variable: &dyn Fn(&str) -> Option<String>, name: &str) -> Result<String, Failure> {
    variable(name)
        .filter(|value| !value.is_empty())
        .ok_or_else(|| Failure::new(Code::Environment, format!("{name} is not set")))
}

fn container(variable: &dyn Fn(&str) -> Option<String>) -> Result<ContainerRef, Failure> {
    Ok(ContainerRef {
        container_id: required(variable, "CNI_CONTAINERID")?,
        ifname: required(variable, "CNI_IFNAME")?,
    })
}

/// The attachment, if the container is a pod of Kubernetes.
fn attachment(
    variable: &dyn Fn(&str) -> Option<String>,
    container: ContainerRef,
    result: &Value,
) -> Result<Option<Attachment>, Failure> {
    let netns = required(variable, "CNI_NETNS")?;
    let args = variable("CNI_ARGS").unwrap_or_default();
    let arg = |name: &str| {
        let pair = args.split(';').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name);
        pair.map(|(_, value)| value.to_owned()).filter(|value| !value.is_empty())
    };
    let (Some(namespace), Some(name)) = (arg("K8S_POD_NAMESPACE"), arg("K8S_POD_NAME")) else {
        return Ok(None);
    };
    let pod = PodRef { namespace, name, uid: arg("K8S_POD_UID").unwrap_or_default() };
    Ok(Some(Attachment { container, netns, addrs: addresses(result)?, pod }))
}

/// The first address of each family.
fn addresses(result: &Value) -> Result<Vec<IpAddr>, Failure> {
    let mut addrs: Vec<IpAddr> = Vec::new();
    for entry in result["ips"].as_array().into_iter().flatten() {
        let text = entry["address"].as_str().unwrap_or_default();
        let addr = text.split('/').next().unwrap_or_default().parse::<IpAddr>().map_err(|_| {
            Failure::new(Code::Decode, format!("prevResult.ips holds {text:?}, wanted an address"))
        })?;
        if addrs.iter().all(|known| known.is_ipv4() != addr.is_ipv4()) {
            addrs.push(addr);
        }
    }
    Ok(addrs)
}

/// A result says its version; runtimes leave it out of prevResult at times.
fn versioned(mut result: Value, version: &str) -> Value {
    if let Some(object) = result.as_object_mut() {
        object.entry("cniVersion").or_insert_with(|| version.into());
    }
    result
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn environment(command: &str) -> BTreeMap<String, String> {
        [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", "/run/netns/x"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u1"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
    }

    fn read(environment: &BTreeMap<String, String>, config: &Value) -> Result<Input, Failure> {
        Input::read(&|name| environment.get(name).cloned(), config.to_string().as_bytes())
    }

    fn config() -> Value {
        json!({
            "cniVersion": "1.0.0", "name": "net", "type": "nodemesh-cni",
            "nodemesh": {"socket": "/s", "known": "/k", "unenrolled": "allow"},
            "prevResult": {
                "cniVersion": "1.0.0", "extra": {"kept": true},
                "interfaces": [{"name": "eth0", "sandbox": "/run/netns/x"}],
                "ips": [
                    {"address": "10.0.0.9/24", "interface": 0}, {"address": "fd00::9/64"},
                    {"address": "10.0.1.9/24"},
                ],
            },
        })
    }

    #[test]
    fn an_add_has_the_pod_its_addresses_and_the_result_as_it_came() {
        let input = read(&environment("ADD"), &config()).unwrap();
        let Call::Add { attachment: Some(attachment), result } = input.call else { panic!("{input:?}") };
        assert_eq!(result, config()["prevResult"]);
        assert_eq!(attachment.pod.to_string(), "shop/web");
        assert_eq!((attachment.pod.uid.as_str(), attachment.netns.as_str()), ("u1", "/run/netns/x"));
        let addrs: Vec<String> = attachment.addrs.iter().map(ToString::to_string).collect();
        assert_eq!(addrs, ["10.0.0.9", "fd00::9"]);
        assert_eq!(input.settings.unenrolled, Unenrolled::Allow);
    }

    #[test]
    fn every_version_of_the_specification_is_spoken_and_no_other() {
        for (version, code) in [
            ("0.3.0", None),
            ("0.3.1", None),
            ("0.4.0", None),
            ("1.0.0", None),
            ("1.1.0", None),
            ("0.2.0", Some(1)),
            ("", Some(1)),
        ] {
            let mut config = config();
            config["cniVersion"] = version.into();
            let code_of = |failure: Failure| failure.code as u32;
            assert_eq!(read(&environment("ADD"), &config).err().map(code_of), code, "{version}");
        }
    }

    #[test]
    fn a_container_that_is_no_pod_is_none_of_ours() {
        let mut environment = environment("ADD");
        environment.remove("CNI_ARGS");
        let input = read(&environment, &config()).unwrap();
        assert!(matches!(input.call, Call::Add { attachment: None, .. }), "{input:?}");
    }

    #[test]
    fn what_is_missing_is_named_with_the_specifications_code() {
        for (missing, code) in
            [("CNI_CONTAINERID", 4), ("CNI_IFNAME", 4), ("CNI_NETNS", 4), ("CNI_COMMAND", 4)]
        {
            let mut environment = environment("ADD");
            environment.remove(missing);
            let failure = read(&environment, &config()).unwrap_err();
            assert_eq!(failure.code as u32, code, "{missing}");
            assert!(failure.message.contains(missing), "{failure:?}");
        }
        let mut unchained = config();
        unchained.as_object_mut().unwrap().remove("prevResult");
        assert_eq!(read(&environment("ADD"), &unchained).unwrap_err().code as u32, 7);
        assert_eq!(read(&environment("DEL"), &unchained).unwrap().call, {
            Call::Del(ContainerRef { container_id: "c1".into(), ifname: "eth0".into() })
        });
        assert_eq!(read(&environment("FROB"), &config()).unwrap_err().code as u32, 4);
        assert_eq!(read(&environment("GC"), &config()).unwrap_err().code as u32, 7);
        let junk = Input::read(&|name| environment("ADD").get(name).cloned(), b"{");
        assert_eq!(junk.unwrap_err().code as u32, 6);
    }

    #[test]
    fn garbage_is_told_by_what_is_still_there() {
        let mut config = config();
        config["cni.dev/valid-attachments"] = json!([{"containerID": "c7", "ifname": "eth0"}]);
        let Call::Gc(valid) = read(&environment("GC"), &config).unwrap().call else { panic!() };
        assert_eq!(valid, [ContainerRef { container_id: "c7".into(), ifname: "eth0".into() }]);
    }

    proptest! {
        #[test]
        fn no_input_is_a_panic(text: Vec<u8>, command in "(ADD|DEL|CHECK|GC|STATUS|VERSION|[A-Z]{0,3})", args: String) {
            let variable = |name: &str| match name {
                "CNI_COMMAND" => Some(command.clone()),
                "CNI_ARGS" => Some(args.clone()),
                _ => Some("x".to_owned()),
            };
            drop(Input::read(&variable, &text));
        }
    }
}
