//! Tables for connections that are not looked into: TLS by its SNI, and TCP.

use std::{collections::BTreeMap, sync::Arc};

use crate::route::{Origin, http::WeightedBackend};

/// What is done with connections to one host and port.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StreamTable {
    /// For TLS, in the order in which they are tried.
    pub tls: Vec<StreamRule>,
    /// For everything else, and for TLS that no rule of `tls` matches.
    pub tcp: Vec<StreamRule>,
}

/// Connections that match go there.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StreamRule {
    /// Where it is from.
    pub origin: Arc<Origin>,
    /// Any of these; none is every connection.
    pub matches: Vec<StreamMatch>,
    /// By weight, as in HTTP.
    pub backends: Vec<WeightedBackend>,
}

/// All conditions hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StreamMatch {
    /// Any of these names (lower case; `*.com` covers every name that ends so, fact 15); none: any, or no SNI at all.
    pub sni: Vec<Arc<str>>,
    /// The dialled address lies in one of these.
    pub subnets: Vec<ipnet::IpNet>,
    /// Labels that the client's pod must have.
    pub source_labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Namespace that the client's pod must be in.
    pub source_namespace: Option<Arc<str>>,
}
