//! The rules of an AuthorizationPolicy: every field checked, and put into the form evaluation uses.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::policy::{Action, Match, Rule, ServiceAccountMatch, StringMatch};

use super::wire;
use crate::problem::Problems;

/// Most values of `serviceAccounts`, and the longest, as Istio has it.
const SERVICE_ACCOUNTS_MAX: usize = 16;
const SERVICE_ACCOUNT_BYTES_MAX: usize = 320;

/// Reads the rules of one policy.
pub(super) struct Reader<'a> {
    /// Namespace of the policy.
    pub(super) namespace: &'a str,
    /// What its rules do.
    pub(super) action: Action,
    pub(super) problems: &'a mut Problems,
}

impl Reader<'_> {
    /// Reads `spec.rules`.
    pub(super) fn rules(mut self, rules: &[Option<wire::Rule>]) -> Vec<Rule> {
        let read = |(at, rule): (usize, &Option<wire::Rule>)| {
            let field = format!("spec.rules[{at}]");
            match rule {
                Some(rule) => self.rule(&field, rule),
                None => {
                    self.problems
                        .error(field, "is empty, wanted a rule; one that matches everything is written {}");
                    Rule::default()
                }
            }
        };
        rules.iter().enumerate().map(read).collect()
    }

    fn rule(&mut self, field: &str, rule: &wire::Rule) -> Rule {
        let mut clauses = Vec::new();
        if let Some(from) = &rule.from {
            let field = format!("{field}.from");
            self.wants_items(&field, from.len());
            let sources = from.iter().enumerate();
            clauses.push(sources.map(|(at, f)| self.source(&format!("{field}[{at}].source"), f)).collect());
        }
        if let Some(to) = &rule.to {
            let field = format!("{field}.to");
            self.wants_items(&field, to.len());
            let operations = to.iter().enumerate();
            clauses.push(
                operations.map(|(at, t)| self.operation(&format!("{field}[{at}].operation"), t)).collect(),
            );
        }
        for (at, condition) in rule.when.iter().flatten().enumerate() {
            clauses.push(vec![self.condition(&format!("{field}.when[{at}]"), condition)]);
        }
        Rule { clauses }
    }

    fn wants_items(&mut self, field: &str, count: usize) {
        if count == 0 {
            self.problems.error(field, "is empty, wanted at least one item, or no such field");
        }
    }

    fn source(&mut self, field: &str, from: &wire::From) -> Match {
        let source = from.source.clone().unwrap_or_default();
        let at = |name: &str| format!("{field}.{name}");
        let read = Match {
            principals: self.principals(&at("principals"), &source.principals),
            not_principals: self.principals(&at("notPrincipals"), &source.not_principals),
            namespaces: self.texts(&at("namespaces"), &source.namespaces),
            not_namespaces: self.texts(&at("notNamespaces"), &source.not_namespaces),
            service_accounts: self.accounts(&at("serviceAccounts"), &source.service_accounts),
            not_service_accounts: self.accounts(&at("notServiceAccounts"), &source.not_service_accounts),
            trust_domains: self.trust_domains(&at("trustDomains"), &source.trust_domains),
            not_trust_domains: self.trust_domains(&at("notTrustDomains"), &source.not_trust_domains),
            source_ips: self.nets(&at("ipBlocks"), &source.ip_blocks),
            not_source_ips: self.nets(&at("notIpBlocks"), &source.not_ip_blocks),
            l7: self.of_requests(&[
                (at("requestPrincipals"), &source.request_principals),
                (at("notRequestPrincipals"), &source.not_request_principals),
            ]) | self.remote_ips(&at("remoteIpBlocks"), &source.remote_ip_blocks)
                | self.remote_ips(&at("notRemoteIpBlocks"), &source.not_remote_ip_blocks),
            ..Match::default()
        };
        let accounts = is_given(&source.service_accounts) || is_given(&source.not_service_accounts);
        let wider = [
            ("principals", &source.principals),
            ("notPrincipals", &source.not_principals),
            ("namespaces", &source.namespaces),
            ("notNamespaces", &source.not_namespaces),
        ];
        for (name, _) in wider.iter().filter(|(_, list)| accounts && is_given(list)) {
            let message = "is there beside serviceAccounts or notServiceAccounts, wanted one kind of them";
            self.problems.error(at(name), message);
        }
        self.wants_fields(
            field,
            &[
                &source.principals,
                &source.not_principals,
                &source.request_principals,
                &source.not_request_principals,
                &source.namespaces,
                &source.not_namespaces,
                &source.service_accounts,
                &source.not_service_accounts,
                &source.trust_domains,
                &source.not_trust_domains,
                &source.ip_blocks,
                &source.not_ip_blocks,
                &source.remote_ip_blocks,
                &source.not_remote_ip_blocks,
            ],
        );
        read
    }

    fn operation(&mut self, field: &str, to: &wire::To) -> Match {
        let operation = to.operation.clone().unwrap_or_default();
        let at = |name: &str| format!("{field}.{name}");
        let read = Match {
            destination_ports: self.ports(&at("ports"), &operation.ports),
            not_destination_ports: self.ports(&at("notPorts"), &operation.not_ports),
            l7: self.of_requests(&[
                (at("hosts"), &operation.hosts),
                (at("notHosts"), &operation.not_hosts),
                (at("methods"), &operation.methods),
                (at("notMethods"), &operation.not_methods),
                (at("paths"), &operation.paths),
                (at("notPaths"), &operation.not_paths),
            ]),
            ..Match::default()
        };
        self.wants_fields(
            field,
            &[
                &operation.hosts,
                &operation.not_hosts,
                &operation.ports,
                &operation.not_ports,
                &operation.methods,
                &operation.not_methods,
                &operation.paths,
                &operation.not_paths,
            ],
        );
        read
    }

    /// Without fields it would never match (S87), which nobody means.
    fn wants_fields(&mut self, field: &str, lists: &[&wire::List]) {
        if !lists.iter().any(|list| is_given(list)) {
            self.problems.error(field, "is empty, wanted at least one of its fields");
        }
    }

    fn condition(&mut self, field: &str, condition: &wire::Condition) -> Match {
        let (values, not_values) = (&condition.values, &condition.not_values);
        let (at, at_not) = (format!("{field}.values"), format!("{field}.notValues"));
        if !is_given(values) && !is_given(not_values) {
            self.problems.error(field, "has neither values nor notValues, wanted at least one of them");
        }
        let key = condition.key.as_deref().unwrap_or_default();
        match key {
            "source.ip" => Match {
                source_ips: self.nets(&at, values),
                not_source_ips: self.nets(&at_not, not_values),
                ..Match::default()
            },
            "source.namespace" => Match {
                namespaces: self.texts(&at, values),
                not_namespaces: self.texts(&at_not, not_values),
                ..Match::default()
            },
            "source.principal" => Match {
                principals: self.principals(&at, values),
                not_principals: self.principals(&at_not, not_values),
                ..Match::default()
            },
            "source.serviceAccount" => Match {
                service_accounts: self.accounts(&at, values),
                not_service_accounts: self.accounts(&at_not, not_values),
                ..Match::default()
            },
            "source.trustDomain" => Match {
                trust_domains: self.trust_domains(&at, values),
                not_trust_domains: self.trust_domains(&at_not, not_values),
                ..Match::default()
            },
            "destination.ip" => Match {
                destination_ips: self.nets(&at, values),
                not_destination_ips: self.nets(&at_not, not_values),
                ..Match::default()
            },
            "destination.port" => Match {
                destination_ports: self.ports(&at, values),
                not_destination_ports: self.ports(&at_not, not_values),
                ..Match::default()
            },
            key if is_key_of_requests(key) => {
                if key == "remote.ip" {
                    self.nets(&at, values);
                    self.nets(&at_not, not_values);
                }
                self.warn_of_requests(&format!("{field}.key"));
                Match { l7: true, ..Match::default() }
            }
            "" => {
                self.problems.error(format!("{field}.key"), "is missing");
                Match::default()
            }
            other => {
                self.problems.error(
                    format!("{field}.key"),
                    format!("is {other:?}, wanted a key such as source.ip, source.namespace, source.principal, \
                     source.serviceAccount, source.trustDomain, destination.ip, destination.port, connection.sni, \
                     request.headers[NAME] or request.auth.claims[NAME]"),
                );
                Match::default()
            }
        }
    }

    /// Whether one of these fields is given; each that is gets a warning.
    fn of_requests(&mut self, fields: &[(String, &wire::List)]) -> bool {
        let mut found = false;
        for (field, list) in fields {
            if !self.values(field, list).is_empty() {
                self.warn_of_requests(field);
                found = true;
            }
        }
        found
    }

    fn remote_ips(&mut self, field: &str, list: &wire::List) -> bool {
        self.nets(field, list);
        if is_given(list) {
            self.warn_of_requests(field);
        }
        is_given(list)
    }

    fn warn_of_requests(&mut self, field: &str) {
        let effect = match self.action {
            Action::Allow => "so its rule allows nothing",
            Action::Deny => "so it counts as matching, and its rule denies more than it says",
        };
        let message = format!("needs the mesh to see requests and it does not yet, {effect}");
        self.problems.warning(field, message);
    }

    /// The values of a list that are not empty.
    fn values<'v>(&mut self, field: &str, list: &'v wire::List) -> Vec<(String, &'v str)> {
        let Some(list) = list else { return Vec::new() };
        if list.is_empty() {
            self.problems.warning(field, "is an empty list; it has no effect");
        }
        let mut values = Vec::with_capacity(list.len());
        for (at, value) in list.iter().enumerate() {
            let field = format!("{field}[{at}]");
            if value.is_empty() {
                self.problems.error(field, "is empty, wanted a value");
            } else {
                values.push((field, value.as_str()));
            }
        }
        values
    }

    fn texts(&mut self, field: &str, list: &wire::List) -> Vec<StringMatch> {
        parsed(&self.values(field, list))
    }

    fn principals(&mut self, field: &str, list: &wire::List) -> Vec<StringMatch> {
        let values = self.values(field, list);
        for (field, value) in &values {
            if value.starts_with("spiffe://") {
                let message =
                    format!("is {value:?}, which no peer is: a principal is written without spiffe://");
                self.problems.warning(field.as_str(), message);
            } else if value.len() > 1 && value.starts_with('*') && value.ends_with('*') {
                let message =
                    format!("is {value:?}, which no peer is: the '*' at its end is taken literally");
                self.problems.warning(field.as_str(), message);
            }
        }
        parsed(&values)
    }

    fn trust_domains(&mut self, field: &str, list: &wire::List) -> Vec<StringMatch> {
        let is_fit = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._*".contains(c);
        let values = self.values(field, list);
        for (field, value) in &values {
            if !value.chars().all(is_fit) {
                let wanted =
                    "wanted lower-case letters, digits, '-', '.' and '_', with '*' for any run of them";
                self.problems.error(field.as_str(), format!("is {value:?}, {wanted}"));
            }
        }
        parsed(&values)
    }

    fn accounts(&mut self, field: &str, list: &wire::List) -> Vec<ServiceAccountMatch> {
        let values = self.values(field, list);
        if values.len() > SERVICE_ACCOUNTS_MAX {
            let message = format!("has {} values, wanted at most {SERVICE_ACCOUNTS_MAX}", values.len());
            self.problems.error(field, message);
        }
        let mut accounts = Vec::with_capacity(values.len());
        for (field, value) in values {
            let (namespace, name) = value.split_once('/').unwrap_or((self.namespace, value));
            if value.len() > SERVICE_ACCOUNT_BYTES_MAX {
                let message =
                    format!("has {} bytes, wanted at most {SERVICE_ACCOUNT_BYTES_MAX}", value.len());
                self.problems.error(field, message);
            } else if namespace.is_empty() || name.is_empty() || name.contains('/') || value.contains('*') {
                let message =
                    format!("is {value:?}, wanted NAMESPACE/NAME, or NAME of the policy's own, without '*'");
                self.problems.error(field, message);
            } else {
                accounts.push(ServiceAccountMatch { namespace: namespace.into(), name: name.into() });
            }
        }
        accounts
    }

    fn nets(&mut self, field: &str, list: &wire::List) -> Vec<IpNet> {
        let mut nets = Vec::new();
        for (field, value) in self.values(field, list) {
            match net(value) {
                Some(net) => nets.push(net),
                None => {
                    let wanted =
                        "wanted an address such as 10.0.0.1 or a network such as 10.0.0.0/8 or fd00::/64";
                    self.problems.error(field, format!("is {value:?}, {wanted}"));
                }
            }
        }
        nets
    }

    fn ports(&mut self, field: &str, list: &wire::List) -> Vec<u16> {
        let mut ports = Vec::new();
        for (field, value) in self.values(field, list) {
            match value.parse::<u16>() {
                Ok(port) if port != 0 && value.bytes().all(|b| b.is_ascii_digit()) => ports.push(port),
                _ => self.problems.error(field, format!("is {value:?}, wanted a number from 1 to 65535")),
            }
        }
        ports
    }
}

fn is_given(list: &wire::List) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
}

fn parsed(values: &[(String, &str)]) -> Vec<StringMatch> {
    values.iter().map(|(_, value)| StringMatch::parse(value)).collect()
}

/// An address or a network; IPv4 that is written as IPv6 is IPv4.
fn net(text: &str) -> Option<IpNet> {
    if let Ok(addr) = text.parse::<IpAddr>() {
        return Some(addr.to_canonical().into());
    }
    let net = text.parse::<IpNet>().ok()?;
    let mapped = match (net.addr().to_canonical(), net.prefix_len().checked_sub(96)) {
        (IpAddr::V4(v4), Some(len)) if net.addr().is_ipv6() => IpNet::new(v4.into(), len).ok(),
        _ => None,
    };
    Some(mapped.unwrap_or(net).trunc())
}

/// Whether a condition's key is known and decided by requests, or by what comes before them (SNI, PROXY protocol).
fn is_key_of_requests(key: &str) -> bool {
    let in_brackets = |start: &str| {
        key.strip_prefix(start)
            .and_then(|rest| rest.strip_prefix('['))
            .and_then(|rest| rest.strip_suffix(']'))
            .is_some_and(|name| !name.is_empty())
    };
    let known = [
        "remote.ip",
        "connection.sni",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
    ];
    known.contains(&key)
        || in_brackets("request.headers")
        || in_brackets("request.auth.claims")
        || (key.starts_with("experimental.envoy.filters.") && key.ends_with(']') && key.contains('['))
}
