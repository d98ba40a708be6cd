//! Each obstacle is named, with what to do about it; and where there is none, nothing is made up.

use serde_json::json;

use super::{finding::Grade, *};

#[test]
fn kernels_are_compared_by_numbers() {
    for (release, grade) in [
        ("6.1.0-18-cloud-amd64", Grade::Good),
        ("6.18.2", Grade::Good),
        ("10.0-rc1", Grade::Good),
        ("5.15.0-1034-aws", Grade::Error),
        ("6.0.12", Grade::Error),
        ("unknown", Grade::Warning),
    ] {
        assert_eq!(kernel("n".to_owned(), release).grade, grade, "{release}");
    }
}

#[test]
fn a_host_without_anything_is_told_what_is_missing() {
    let findings = host(Path::new("/nonexistent"));
    let wrong: Vec<&str> = findings
        .iter()
        .filter(|finding| finding.grade == Grade::Error)
        .map(|finding| finding.subject.as_str())
        .collect();
    assert_eq!(wrong, ["BTF", "cgroup v2", "bpffs"]);
}

#[test]
fn what_is_not_mounted_is_no_error_where_the_kernel_has_it() -> std::io::Result<()> {
    let root = std::env::temp_dir().join(format!("meshctl-precheck-{}", std::process::id()));
    fs::create_dir_all(root.join("proc/sys/kernel"))?;
    fs::create_dir_all(root.join("sys/kernel/btf"))?;
    fs::write(root.join("proc/sys/kernel/osrelease"), "6.12.1\n")?;
    fs::write(root.join("sys/kernel/btf/vmlinux"), "")?;
    fs::write(root.join("proc/filesystems"), "nodev\tcgroup\nnodev\tcgroup2\nnodev\tbpf\n\text4\n")?;
    fs::write(root.join("proc/mounts"), "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n")?;
    let bare = host(&root);
    assert!(bare.iter().all(|finding| finding.grade == Grade::Good), "{bare:?}");
    assert!(bare[2].message.contains("the agent mounts it"), "{bare:?}");
    let mounts = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\n";
    fs::write(root.join("proc/mounts"), mounts)?;
    let messages: Vec<String> = host(&root).into_iter().map(|finding| finding.message).collect();
    assert_eq!(messages[2..], ["at /sys/fs/cgroup/unified", "is mounted"]);
    fs::remove_dir_all(&root)
}

#[test]
fn injectors_are_known_by_the_names_of_their_webhooks() {
    let of = |name| injector(name).map(|finding| finding.subject);
    assert_eq!(of("istio-sidecar-injector-1-24"), Some("Istio".to_owned()));
    assert_eq!(of("linkerd-proxy-injector-webhook-config"), Some("Linkerd".to_owned()));
    assert_eq!(of("cert-manager-webhook"), None);
}

fn set(namespace: &str, name: &str) -> DaemonSet {
    serde_json::from_value(json!({"metadata": {"namespace": namespace, "name": name}})).unwrap()
}

#[test]
fn other_meshes_are_known_by_their_daemon_sets() {
    for (namespace, name, mesh) in [
        ("istio-system", "ztunnel", "Istio"),
        ("kube-system", "istio-cni-node", "Istio"),
        ("linkerd-cni", "linkerd-cni", "Linkerd"),
        ("kuma-system", "kuma-cni-node", "Kuma"),
        ("kmesh-system", "kmesh", "Kmesh"),
        ("consul", "consul-cni", "Consul"),
    ] {
        let found = redirector(&set(namespace, name), "nodemesh-system").unwrap();
        assert_eq!((found.subject.as_str(), found.grade), (mesh, Grade::Warning));
        assert_eq!(found.message, format!("DaemonSet {namespace}/{name} redirects pods too"));
        assert!(found.advice.contains("one mesh only"), "{found:?}");
    }
    for name in ["kube-proxy", "cilium", "ztunnel-exporter"] {
        assert_eq!(redirector(&set("kube-system", name), "nodemesh-system"), None, "{name}");
    }
}

#[test]
fn another_installation_of_this_mesh_is_in_the_way_and_this_one_is_not() {
    let agents = set("nodemesh-system", AGENT);
    assert_eq!(redirector(&agents, "nodemesh-system"), None);
    let found = redirector(&agents, "mesh-two").unwrap();
    assert_eq!((found.subject.as_str(), found.grade), ("Nodemesh", Grade::Error));
    assert!(found.message.contains("nodemesh-system/nodemesh-agent"), "{found:?}");
    assert!(found.advice.contains("--mesh-namespace"), "{found:?}");
}

#[test]
fn the_configuration_of_cilium_is_looked_for_beside_its_agents_too() {
    let sets = [set("cilium-system", "cilium"), set("shop", "web")];
    let found: Vec<String> = cilium_namespaces(&sets).into_iter().collect();
    assert_eq!(found, ["cilium-system", "kube-system"]);
}

#[test]
fn an_api_server_that_is_too_old_is_named_with_what_is_wanted() {
    let of = |major: &str, minor: &str| {
        of_server(&Info {
            major: major.to_owned(),
            minor: minor.to_owned(),
            git_version: format!("v{major}.{minor}.4"),
            ..Default::default()
        })
    };
    for minor in ["30", "30+", "36"] {
        assert_eq!(of("1", minor), Finding::good("Kubernetes", format!("v1.{minor}.4")));
    }
    for minor in ["29", "29+", "9", ""] {
        let wanted = format!("v1.{minor}.4, wanted 1.30 or newer");
        assert_eq!(of("1", minor), Finding::error("Kubernetes", wanted, "upgrade the cluster"));
    }
}

#[test]
fn missing_rights_are_named_one_by_one() {
    assert_eq!(of_rights(&[]), Finding::good("rights", "you may install the mesh"));
    let missing = ["create clusterroles", "patch daemonsets"].map(ToOwned::to_owned);
    assert_eq!(
        of_rights(&missing),
        Finding::error(
            "rights",
            "you may not create clusterroles, patch daemonsets",
            "install as a cluster administrator"
        )
    );
}

#[test]
fn a_definition_of_no_version_that_the_mesh_reads_is_an_error_and_an_absent_one_is_not() {
    let absent = definitions(&[]);
    let kinds = mesh_control::crd::all().len();
    let none = format!("0 kinds are there and used as they are, {kinds} will be made");
    assert_eq!(absent, [Finding::good("definitions", none)]);

    let mut old = mesh_control::crd::all().remove(0);
    old.spec.versions.truncate(1);
    old.spec.versions[0].name = "v0".to_owned();
    old.status = serde_json::from_value(json!({"conditions": [
        {"type": "NamesAccepted", "status": "True"}, {"type": "Established", "status": "True"},
    ]}))
    .unwrap();
    let found = definitions(&[old.clone()]);
    assert_eq!((found.len(), found[0].grade), (2, Grade::Error), "{found:?}");
    assert_eq!(found[0].subject, format!("definition {}", old.name_any()));
    assert!(found[0].message.starts_with("serves v0, the mesh reads v1"), "{found:?}");
    assert_eq!(found[0].advice, "use definitions of a version that the mesh knows");
}

#[test]
fn a_node_that_cannot_be_in_the_mesh_is_named() {
    let node = |status: serde_json::Value| -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1"}, "status": status})).unwrap()
    };
    let of = |system: &str, kernel: &str| {
        of_node(&node(json!({"nodeInfo": {"operatingSystem": system, "kernelVersion": kernel}})))
    };
    assert_eq!(of("linux", "6.12.1"), Finding::good("node n1", "kernel 6.12.1"));
    let old = of("linux", "5.15.0");
    assert_eq!((old.grade, old.advice.contains("agent.nodeSelector")), (Grade::Error, true), "{old:?}");
    let other = of("windows", "10.0.20348.2402");
    assert_eq!((other.grade, other.message.contains("runs windows")), (Grade::Warning, true), "{other:?}");
    let silent = of_node(&node(json!({})));
    assert_eq!((silent.grade, silent.advice.as_str()), (Grade::Warning, "wait until its kubelet is up"));
}
