//! Builders of policies and of the mesh configuration.

use serde_json::{Map, Value, json};

use super::resources::{push, resource, set, step};

/// What an AuthorizationPolicy does with what it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyAction {
    /// Admit it; what no such policy of a workload matches is refused.
    Allow,
    /// Refuse it.
    Deny,
}

resource! {
    /// An Istio AuthorizationPolicy.
    AuthorizationPolicyManifest
}

impl AuthorizationPolicyManifest {
    /// A policy without rules: ALLOW matches nothing, DENY nothing.
    #[must_use]
    pub fn new(namespace: &str, name: &str, action: PolicyAction) -> Self {
        let action = match action {
            PolicyAction::Allow => "ALLOW",
            PolicyAction::Deny => "DENY",
        };
        Self(json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"action": action},
        }))
    }

    /// Only for workloads with this label.
    #[must_use]
    pub fn selector(self, label: &str, value: &str) -> Self {
        let pointer = format!("/spec/selector/matchLabels/{}", step(label));
        self.with(&pointer, value)
    }

    /// Only logged, never enforced.
    #[must_use]
    pub fn dry_run(self) -> Self {
        self.annotation("istio.io/dry-run", "true")
    }

    /// Add a rule; one without content matches everything.
    #[must_use]
    pub fn rule(mut self, rule: Rule) -> Self {
        push(&mut self.0, "/spec/rules", rule.0);
        self
    }
}

/// One rule of an AuthorizationPolicy: its parts must all match.
#[derive(Debug, Clone)]
pub struct Rule(Value);

impl Rule {
    /// Matches everything.
    #[must_use]
    pub fn any() -> Self {
        Self(Value::Object(Map::new()))
    }

    /// A source with one field, such as `("principals", &["cluster.local/ns/shop/sa/a"])`.
    #[must_use]
    pub fn from(self, field: &str, values: &[&str]) -> Self {
        self.from_all(&[(field, values)])
    }

    /// A source with several fields, which must all match. Several sources of a rule are alternatives.
    #[must_use]
    pub fn from_all(mut self, fields: &[(&str, &[&str])]) -> Self {
        push(&mut self.0, "/from", json!({"source": object(fields)}));
        self
    }

    /// An operation with one field, `ports` or `notPorts`.
    #[must_use]
    pub fn to(mut self, field: &str, values: &[&str]) -> Self {
        push(&mut self.0, "/to", json!({"operation": object(&[(field, values)])}));
        self
    }

    /// A condition on a key such as `source.ip`.
    #[must_use]
    pub fn when(mut self, key: &str, values: &[&str]) -> Self {
        push(&mut self.0, "/when", json!({"key": key, "values": values}));
        self
    }

    /// A condition that none of the values may meet.
    #[must_use]
    pub fn when_not(mut self, key: &str, values: &[&str]) -> Self {
        push(&mut self.0, "/when", json!({"key": key, "notValues": values}));
        self
    }
}

/// The mesh configuration: ConfigMap `istio` of the root namespace.
#[must_use]
pub fn mesh_config(root_namespace: &str, trust_domain: &str, aliases: &[&str]) -> Value {
    let mut text = format!("trustDomain: {trust_domain}\n");
    if !aliases.is_empty() {
        text.push_str("trustDomainAliases:\n");
        text.extend(aliases.iter().map(|alias| format!("- {alias}\n")));
    }
    let mut resource = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "istio", "namespace": root_namespace},
    });
    set(&mut resource, "/data/mesh", text.into());
    resource
}

fn object(fields: &[(&str, &[&str])]) -> Value {
    fields.iter().map(|(name, values)| ((*name).to_owned(), json!(values))).collect::<Map<_, _>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_lists_its_rules_in_order() {
        let policy: Value = AuthorizationPolicyManifest::new("shop", "web", PolicyAction::Deny)
            .selector("app", "web")
            .rule(Rule::any().from("namespaces", &["a", "b"]).to("ports", &["80"]))
            .rule(Rule::any().when("source.ip", &["10.0.0.0/8"]))
            .into();
        assert_eq!(policy["spec"]["action"], "DENY");
        assert_eq!(policy["spec"]["rules"][0]["from"][0]["source"]["namespaces"], json!(["a", "b"]));
        assert_eq!(policy["spec"]["rules"][0]["to"][0]["operation"]["ports"], json!(["80"]));
        assert_eq!(policy["spec"]["rules"][1]["when"][0]["key"], "source.ip");
    }

    #[test]
    fn the_mesh_configuration_is_yaml_within_yaml() {
        let map = mesh_config("istio-system", "example.org", &["old.example"]);
        assert_eq!(map["data"]["mesh"], "trustDomain: example.org\ntrustDomainAliases:\n- old.example\n");
    }
}
