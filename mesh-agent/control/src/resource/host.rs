//! Host names in rules: what short names mean, which patterns cover which names, and which of two is more specific.

use std::{cmp::Ordering, net::IpAddr, sync::Arc};

/// A host as a rule names it (S1), lower case.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RuleHost {
    /// A name without a dot: a Kubernetes service of the namespace of the rule that names it.
    Short {
        /// Name of the service.
        name: Arc<str>,
        /// Namespace of the rule.
        namespace: Arc<str>,
    },
    /// Anything else, as it is: a full name, `*`, `*.suffix`, or an address.
    Full(Arc<str>),
}

impl RuleHost {
    /// What `text` means in a rule of `namespace`.
    pub fn new(text: &str, namespace: &Arc<str>) -> Self {
        let text = text.to_ascii_lowercase();
        let short = text != "*" && !text.contains('.') && text.parse::<IpAddr>().is_err();
        if short {
            Self::Short { name: text.into(), namespace: Arc::clone(namespace) }
        } else {
            Self::Full(text.into())
        }
    }

    /// The full name, with the cluster's domain where it is needed.
    pub fn full(&self, cluster_domain: &str) -> Arc<str> {
        match self {
            Self::Short { name, namespace } => format!("{name}.{namespace}.svc.{cluster_domain}").into(),
            Self::Full(text) => Arc::clone(text),
        }
    }

    /// Whether it stands for more than one name.
    pub fn is_wildcard(&self) -> bool {
        matches!(self, Self::Full(text) if text.starts_with('*'))
    }
}

/// Whether a pattern and a name, or two patterns, have a name in common (S3). What follows `*` is compared as it stands,
/// so `*oo.com` covers `foo.com`.
pub fn overlap(left: &str, right: &str) -> bool {
    match (left.strip_prefix('*'), right.strip_prefix('*')) {
        (Some(left), Some(right)) => left.ends_with(right) || right.ends_with(left),
        (Some(suffix), None) => right.ends_with(suffix),
        (None, Some(suffix)) => left.ends_with(suffix),
        (None, None) => left == right,
    }
}

/// Whether every name that `inner` covers is covered by `outer` (S3).
pub fn is_within(inner: &str, outer: &str) -> bool {
    match (inner.strip_prefix('*'), outer.strip_prefix('*')) {
        (Some(inner), Some(outer)) => inner.ends_with(outer),
        (None, Some(outer)) => inner.ends_with(outer),
        (Some(_), None) => false,
        (None, None) => inner == outer,
    }
}

/// Orders patterns by how specific they are, the most specific first (S4): names before patterns, longer ones before shorter
/// ones, then by the alphabet.
pub fn by_specificity(left: &str, right: &str) -> Ordering {
    left.starts_with('*')
        .cmp(&right.starts_with('*'))
        .then(right.len().cmp(&left.len()))
        .then_with(|| left.cmp(right))
}

/// What a host must look like: labels, the first of which may be `*` or begin with it.
pub(super) fn check_pattern(text: &str) -> Result<(), &'static str> {
    if text.len() > 255 {
        return Err("at most 255 characters");
    }
    if text == "*" {
        return Ok(());
    }
    let rest = text.strip_prefix("*.").or_else(|| text.strip_prefix("*-")).or_else(|| text.strip_prefix('*'));
    let rest = rest.unwrap_or(text);
    if rest.is_empty() {
        return Err("a name after '*'");
    }
    check_name(rest)
}

/// What a host without `*` must look like.
pub(super) fn check_name(text: &str) -> Result<(), &'static str> {
    if text.len() > 255 {
        return Err("at most 255 characters");
    }
    // The name of a host may be written with the dot that ends it.
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_fit = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if !name.split('.').all(is_fit) {
        return Err("a host name: letters, digits, '-' and '.', '*' at most as its first label");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s3_patterns_meet_where_one_ends_like_the_other_and_only_a_wider_one_covers() {
        // Left, right, whether they meet, whether the left one is within the right one, and the other way round.
        let table = [
            ("a.com", "a.com", true, true, true),
            ("a.com", "b.com", false, false, false),
            ("*", "*", true, true, true),
            ("*", "a.com", true, false, true),
            ("*.com", "*", true, true, false),
            ("*.b.com", "*.com", true, true, false),
            ("*.b.com", "*.c.com", false, false, false),
            ("a.com", "*.com", true, true, false),
            ("com", "*.com", false, false, false),
            ("a.b.com", "*.com", true, true, false),
            ("foo.com", "*oo.com", true, true, false),
            ("oo.com", "*oo.com", true, true, false),
            ("*foo.com", "*oo.com", true, true, false),
            ("*.oo.com", "*oo.com", true, true, false),
            ("bar.com", "*oo.com", false, false, false),
            ("x-a.com", "*-a.com", true, true, false),
            ("a.com", "*-a.com", false, false, false),
        ];
        for (left, right, meet, within, covers) in table {
            assert_eq!(overlap(left, right), meet, "{left} {right}");
            assert_eq!(overlap(right, left), meet, "{right} {left}");
            assert_eq!(is_within(left, right), within, "{left} in {right}");
            assert_eq!(is_within(right, left), covers, "{right} in {left}");
        }
    }

    #[test]
    fn s4_names_come_before_patterns_longer_before_shorter_then_by_the_alphabet() {
        let sorted = ["long.example.com", "a.com", "b.com", "*.example.com", "*.a.com", "*.b.com", "*"];
        for (at, one) in sorted.iter().enumerate() {
            for (other_at, other) in sorted.iter().enumerate() {
                assert_eq!(by_specificity(one, other), at.cmp(&other_at), "{one} {other}");
            }
        }
    }

    #[test]
    fn s1_s5_hosts_of_rules_are_completed_where_they_are_short_and_always_lower_case() {
        let namespace = "shop".into();
        for (text, full, wildcard) in [
            ("Web", "web.shop.svc.cluster.local", false),
            ("Web.Prod", "web.prod", false),
            ("WWW.Example.COM", "www.example.com", false),
            ("*.Example.com", "*.example.com", true),
            ("*", "*", true),
            ("10.0.0.1", "10.0.0.1", false),
            ("FD00::1", "fd00::1", false),
        ] {
            let host = RuleHost::new(text, &namespace);
            assert_eq!((&*host.full("cluster.local"), host.is_wildcard()), (full, wildcard), "{text}");
        }
    }
}
