//! Owns what the plugin and the agent say to each other: one JSON object on one line each way, over a unix socket.
//!
//! Invariant: a line is at most [`LINE_MAX`] long; both ends refuse a longer one.

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

/// Longest line, in bytes. A collection of garbage names every attachment of the node.
pub const LINE_MAX: u64 = 1 << 20;

/// An interface of a container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerRef {
    /// The runtime's id of the sandbox.
    pub container_id: String,
    /// Interface in it.
    pub ifname: String,
}

/// A pod as the kubelet names it to the runtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRef {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Uid; empty when the runtime does not say.
    #[serde(default)]
    pub uid: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A pod's interface that was just made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// Which.
    #[serde(flatten)]
    pub container: ContainerRef,
    /// File of its network namespace.
    pub netns: String,
    /// Its addresses, at most one per family.
    pub addrs: Vec<IpAddr>,
    /// Whose it is.
    pub pod: PodRef,
}

/// What the plugin asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// Enrol the pod, if it is meshed, and answer when it is.
    Add(Attachment),
    /// Forget it; answer when nothing of it is left in the kernel.
    Del(ContainerRef),
    /// Is it as it should be?
    Check(Attachment),
    /// Forget all but these.
    Gc {
        /// What is still there.
        valid: Vec<ContainerRef>,
    },
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Answer {
    /// The pod's connects are redirected and its listeners open.
    Enrolled,
    /// The pod is not to be meshed.
    Unmeshed {
        /// Why, if it asked to be.
        reason: Option<String>,
    },
    /// Done, or there was nothing to do.
    Done,
    /// The pod is to be meshed and is not.
    Refused {
        /// Why.
        reason: String,
        /// Another try may help.
        again: bool,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_as_it_was_written() {
        let container = ContainerRef { container_id: "c1".into(), ifname: "eth0".into() };
        let pod = PodRef { namespace: "shop".into(), name: "web".into(), uid: "u".into() };
        let attachment = Attachment {
            container: container.clone(),
            netns: "/run/netns/x".into(),
            addrs: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            pod,
        };
        for request in [
            Request::Add(attachment.clone()),
            Request::Check(attachment),
            Request::Del(container.clone()),
            Request::Gc { valid: vec![container] },
        ] {
            let text = serde_json::to_string(&request).unwrap();
            assert!(!text.contains('\n'));
            assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request, "{text}");
        }
    }
}
