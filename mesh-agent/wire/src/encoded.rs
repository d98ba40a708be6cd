//! Owns the form of a delta response in which resources are bytes, so that what many clients are told is encoded once.
//!
//! On the wire it is [`DeltaDiscoveryResponse`](crate::proto::discovery::DeltaDiscoveryResponse): protobuf writes a message within
//! another as it writes bytes.

use prost::bytes::Bytes;

use crate::proto::node::ControlPlane;

/// Delta xDS: what changed, as its server says it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct EncodedDeltaResponse {
    /// Version of the whole, for people.
    #[prost(string, tag = "1")]
    pub system_version_info: String,
    /// New and changed resources, each an encoded [`Resource`](crate::proto::discovery::Resource).
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub resources: Vec<Bytes>,
    /// Type of the resources.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// Names that are no more.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
    /// Repeated by the request that answers this.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// Who answered.
    #[prost(message, optional, tag = "7")]
    pub control_plane: Option<ControlPlane>,
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::proto::discovery::{DeltaDiscoveryResponse, Resource};

    #[test]
    fn on_the_wire_both_forms_are_one() {
        let resource = |name: &str| Resource {
            name: name.to_owned(),
            aliases: vec![format!("{name}/alias")],
            version: "7".to_owned(),
            resource: Some(prost_types::Any { type_url: "type/of".to_owned(), value: b"body".to_vec() }),
            ..Resource::default()
        };
        let plain = DeltaDiscoveryResponse {
            system_version_info: "5".to_owned(),
            resources: vec![resource("a"), resource("b"), Resource::default()],
            type_url: "type/of".to_owned(),
            removed_resources: vec!["c".to_owned()],
            nonce: "9".to_owned(),
            control_plane: Some(ControlPlane { identifier: "nodemesh".to_owned() }),
        };
        let encoded = EncodedDeltaResponse {
            system_version_info: plain.system_version_info.clone(),
            resources: plain.resources.iter().map(|one| one.encode_to_vec().into()).collect(),
            type_url: plain.type_url.clone(),
            removed_resources: plain.removed_resources.clone(),
            nonce: plain.nonce.clone(),
            control_plane: plain.control_plane.clone(),
        };
        assert_eq!(encoded.encode_to_vec(), plain.encode_to_vec());
        assert_eq!(DeltaDiscoveryResponse::decode(&*encoded.encode_to_vec()), Ok(plain));
    }
}
