//! The kinds of the Gateway API as they are written.
//!
//! Numbers are wider than what is allowed, so that the message about a wrong one is ours.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A route of whatever kind.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Route<S> {
    pub(crate) metadata: ObjectMeta,
    pub(crate) spec: Option<S>,
    pub(crate) status: Option<Value>,
}

/// HTTPRoute.
pub(crate) type HttpRoute = Route<Spec<HttpRule>>;
/// GRPCRoute.
pub(crate) type GrpcRoute = Route<Spec<GrpcRule>>;
/// TLSRoute.
pub(crate) type TlsRoute = Route<Spec<StreamRule>>;
/// TCPRoute.
pub(crate) type TcpRoute = Route<TcpSpec>;

/// `spec` of a route with host names.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Spec<R> {
    pub(crate) parent_refs: Option<Vec<ParentRef>>,
    pub(crate) use_default_gateways: Option<String>,
    pub(crate) hostnames: Option<Vec<String>>,
    pub(crate) rules: Option<Vec<R>>,
}

/// Each of `spec.rules` of an HTTPRoute.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct HttpRule {
    pub(crate) name: Option<String>,
    pub(crate) matches: Option<Vec<HttpMatch>>,
    pub(crate) filters: Option<Vec<Filter>>,
    pub(crate) backend_refs: Option<Vec<BackendRef>>,
    pub(crate) timeouts: Option<Timeouts>,
    pub(crate) retry: Option<Retry>,
    pub(crate) session_persistence: Option<Value>,
}

/// Each of `matches` of an HTTPRoute.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct HttpMatch {
    pub(crate) path: Option<PathMatch>,
    pub(crate) headers: Option<Vec<NameMatch>>,
    pub(crate) query_params: Option<Vec<NameMatch>>,
    pub(crate) method: Option<String>,
}

/// `path` of a match.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct PathMatch {
    pub(crate) r#type: Option<String>,
    pub(crate) value: Option<String>,
}

/// Each of `headers` and `queryParams` of a match.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct NameMatch {
    pub(crate) r#type: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) value: Option<String>,
}

/// `timeouts` of a rule.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Timeouts {
    pub(crate) request: Option<String>,
    pub(crate) backend_request: Option<String>,
}

/// `retry` of a rule.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Retry {
    pub(crate) codes: Option<Vec<i64>>,
    pub(crate) attempts: Option<i64>,
    pub(crate) backoff: Option<String>,
}

/// Each of `spec.rules` of a GRPCRoute.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct GrpcRule {
    pub(crate) name: Option<String>,
    pub(crate) matches: Option<Vec<GrpcMatch>>,
    pub(crate) filters: Option<Vec<Filter>>,
    pub(crate) backend_refs: Option<Vec<BackendRef>>,
    pub(crate) session_persistence: Option<Value>,
}

/// Each of `matches` of a GRPCRoute.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct GrpcMatch {
    pub(crate) method: Option<GrpcMethod>,
    pub(crate) headers: Option<Vec<NameMatch>>,
}

/// `method` of a GRPCRoute's match.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct GrpcMethod {
    pub(crate) r#type: Option<String>,
    pub(crate) service: Option<String>,
    pub(crate) method: Option<String>,
}

/// `spec` of a TCPRoute.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct TcpSpec {
    pub(crate) parent_refs: Option<Vec<ParentRef>>,
    pub(crate) use_default_gateways: Option<String>,
    pub(crate) rules: Option<Vec<StreamRule>>,
}

/// Each of `spec.rules` of a TLSRoute or TCPRoute.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct StreamRule {
    pub(crate) name: Option<String>,
    pub(crate) backend_refs: Option<Vec<PlainBackendRef>>,
}

/// Each of `spec.parentRefs`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct ParentRef {
    pub(crate) group: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) namespace: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) section_name: Option<String>,
    pub(crate) port: Option<i64>,
}

/// A backend without filters.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct PlainBackendRef {
    pub(crate) group: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) namespace: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) port: Option<i64>,
    pub(crate) weight: Option<i64>,
}

/// Each of `backendRefs` of an HTTPRoute or GRPCRoute.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct BackendRef {
    pub(crate) group: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) namespace: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) port: Option<i64>,
    pub(crate) weight: Option<i64>,
    pub(crate) filters: Option<Vec<Filter>>,
}

impl BackendRef {
    /// Without its filters.
    pub(crate) fn plain(&self) -> PlainBackendRef {
        PlainBackendRef {
            group: self.group.clone(),
            kind: self.kind.clone(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            port: self.port,
            weight: self.weight,
        }
    }
}

/// `backendRef` of a mirror.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct ObjectRef {
    pub(crate) group: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) namespace: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) port: Option<i64>,
}

/// Each of `filters`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Filter {
    pub(crate) r#type: Option<String>,
    pub(crate) request_header_modifier: Option<HeaderModifier>,
    pub(crate) response_header_modifier: Option<HeaderModifier>,
    pub(crate) request_mirror: Option<RequestMirror>,
    pub(crate) request_redirect: Option<RequestRedirect>,
    pub(crate) url_rewrite: Option<UrlRewrite>,
    pub(crate) cors: Option<Cors>,
    pub(crate) external_auth: Option<Value>,
    pub(crate) extension_ref: Option<Value>,
}

/// `requestHeaderModifier` and `responseHeaderModifier`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct HeaderModifier {
    pub(crate) set: Option<Vec<HeaderValue>>,
    pub(crate) add: Option<Vec<HeaderValue>>,
    pub(crate) remove: Option<Vec<String>>,
}

/// Each of `set` and `add`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct HeaderValue {
    pub(crate) name: Option<String>,
    pub(crate) value: Option<String>,
}

/// `requestMirror`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct RequestMirror {
    pub(crate) backend_ref: Option<ObjectRef>,
    pub(crate) percent: Option<i64>,
    pub(crate) fraction: Option<Fraction>,
}

/// `fraction` of a mirror.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Fraction {
    pub(crate) numerator: Option<i64>,
    pub(crate) denominator: Option<i64>,
}

/// `requestRedirect`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct RequestRedirect {
    pub(crate) scheme: Option<String>,
    pub(crate) hostname: Option<String>,
    pub(crate) path: Option<PathModifier>,
    pub(crate) port: Option<i64>,
    pub(crate) status_code: Option<i64>,
}

/// `urlRewrite`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct UrlRewrite {
    pub(crate) hostname: Option<String>,
    pub(crate) path: Option<PathModifier>,
}

/// `path` of a redirect or rewrite.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct PathModifier {
    pub(crate) r#type: Option<String>,
    pub(crate) replace_full_path: Option<String>,
    pub(crate) replace_prefix_match: Option<String>,
}

/// `cors`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Cors {
    pub(crate) allow_origins: Option<Vec<String>>,
    pub(crate) allow_credentials: Option<bool>,
    pub(crate) allow_methods: Option<Vec<String>>,
    pub(crate) allow_headers: Option<Vec<String>>,
    pub(crate) expose_headers: Option<Vec<String>>,
    pub(crate) max_age: Option<i64>,
}

/// ReferenceGrant.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct ReferenceGrant {
    pub(crate) metadata: ObjectMeta,
    pub(crate) spec: Option<GrantSpec>,
}

/// `spec` of a ReferenceGrant.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct GrantSpec {
    pub(crate) from: Option<Vec<GrantFrom>>,
    pub(crate) to: Option<Vec<GrantTo>>,
}

/// Each of `from`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct GrantFrom {
    pub(crate) group: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) namespace: Option<String>,
}

/// Each of `to`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct GrantTo {
    pub(crate) group: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) name: Option<String>,
}
