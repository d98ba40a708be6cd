//! A real Kubernetes on this machine: an API server alone, or a whole cluster of two nodes.
//!
//! Nothing is imitated: etcd, kube-apiserver, kubelet and the rest are the programs of a release, found by
//! [`Binaries`]. Dropping a value ends everything it started; what a killed test leaves, `pod-tool clean` removes.

mod api_server;
mod binaries;
mod bookinfo;
mod daemon;
mod etcd;
pub mod init;
mod kubectl;
mod mesh;
mod node;
mod papers;
mod pod;
mod relay;
pub mod shop;
mod whole;

pub use api_server::{ApiServer, ApiServerError};
pub use binaries::{Binaries, BinariesMissing};
pub use bookinfo::Bookinfo;
pub use daemon::DaemonError;
pub use kubectl::{Kubectl, KubectlError};
pub use mesh::{Enrolment, Mesh};
pub use node::{ClusterNode, FirstFamily, NodeOptions};
pub use pod::ClusterPod;
pub use whole::{Cluster, ClusterError, image};
