//! Owns what Cilium's own configuration says that keeps the mesh from working beside it.

use std::collections::BTreeMap;

use super::super::finding::Finding;

/// Judges the data of `kube-system/cilium-config`.
pub(super) fn judge(settings: &BTreeMap<String, String>) -> Vec<Finding> {
    let is = |key: &str, values: &[&str]| settings.get(key).is_some_and(|value| values.contains(&&**value));
    let mut findings = Vec::new();
    // In the place of kube-proxy it balances at sockets too, whatever the other setting says.
    let at_sockets = is("bpf-lb-sock", &["true"]) || is("kube-proxy-replacement", &["true", "strict"]);
    if at_sockets && !is("bpf-lb-sock-hostns-only", &["true"]) {
        findings.push(Finding::error(
            "Cilium",
            "its socket load balancer replaces addresses of services before the mesh sees them",
            "set socketLB.hostNamespaceOnly=true in Cilium's values",
        ));
    }
    // Where nothing is said it is.
    if !is("cni-exclusive", &["false"]) {
        findings.push(Finding::error(
            "Cilium",
            "it takes every other plugin's configuration out of the node's CNI folder, and writes its own again whenever it is changed",
            "set cni.exclusive=false in Cilium's values",
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::{super::super::finding::Grade, *};

    #[test]
    fn each_obstacle_is_named_and_a_cilium_that_makes_room_is_fine() {
        let (sockets, exclusive) = ("socketLB.hostNamespaceOnly=true", "cni.exclusive=false");
        let cases: [(&str, &[&str]); 8] = [
            ("cni-exclusive=false", &[]),
            ("", &[exclusive]),
            ("cni-exclusive=true", &[exclusive]),
            ("cni-exclusive=false bpf-lb-sock=true", &[sockets]),
            ("cni-exclusive=false kube-proxy-replacement=true", &[sockets]),
            ("kube-proxy-replacement=strict bpf-lb-sock=false", &[sockets, exclusive]),
            ("cni-exclusive=false kube-proxy-replacement=false", &[]),
            (
                "cni-exclusive=false kube-proxy-replacement=true bpf-lb-sock=true bpf-lb-sock-hostns-only=true",
                &[],
            ),
        ];
        for (settings, wanted) in cases {
            let pairs = settings.split_whitespace().filter_map(|setting| setting.split_once('='));
            let settings = pairs.map(|(key, value)| (key.to_owned(), value.to_owned()));
            let found = judge(&settings.collect());
            assert!(found.iter().all(|finding| finding.grade == Grade::Error), "{found:?}");
            let advice: Vec<&str> = found.iter().map(|finding| finding.advice.as_str()).collect();
            assert_eq!(advice.len(), wanted.len(), "{found:?}");
            assert!(advice.iter().zip(wanted).all(|(advice, wanted)| advice.contains(wanted)), "{found:?}");
        }
    }
}
