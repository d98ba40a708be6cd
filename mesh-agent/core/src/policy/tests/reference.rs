//! Random policies: evaluation equals a naive reading of the manifest's own words, and does not widen when it must not.
//!
//! The reference shares no code with evaluation: it keeps values as texts, writes out the aliases of every principal
//! beforehand, and answers each field with a plain loop.

use std::net::IpAddr;

use proptest::prelude::*;

use super::*;

const DOMAIN: &str = "new-td";
const ALIASES: [&str; 2] = ["old-td", "more"];

/// A match in the words of a manifest.
#[derive(Clone, Debug, Default)]
struct Words {
    principals: Vec<String>,
    not_principals: Vec<String>,
    namespaces: Vec<String>,
    not_namespaces: Vec<String>,
    accounts: Vec<(String, String)>,
    not_accounts: Vec<(String, String)>,
    domains: Vec<String>,
    not_domains: Vec<String>,
    sources: Vec<String>,
    not_sources: Vec<String>,
    destinations: Vec<String>,
    not_destinations: Vec<String>,
    ports: Vec<u16>,
    not_ports: Vec<u16>,
    l7: bool,
}

#[derive(Clone, Debug)]
struct Written {
    deny: bool,
    dry_run: bool,
    rules: Vec<Vec<Vec<Words>>>,
}

#[derive(Clone, Debug)]
struct Asked {
    identity: Option<(String, String, String)>,
    source: Option<IpAddr>,
    destination: IpAddr,
    port: u16,
}

/// What the reference answers for a field that nothing is known about.
#[derive(Clone, Copy)]
struct Unknown(bool);

fn expanded(principal: &str) -> Vec<String> {
    let parts: Vec<&str> = principal.split('/').collect();
    let all: Vec<&str> = std::iter::once(DOMAIN).chain(ALIASES).collect();
    if parts.len() != 5 || parts[0] == "*" {
        return vec![principal.to_owned()];
    }
    let fits = |own: &str| {
        own == parts[0]
            || parts[0].strip_prefix('*').is_some_and(|end| own.ends_with(end))
            || (!parts[0].starts_with('*') && parts[0].strip_suffix('*').is_some_and(|s| own.starts_with(s)))
    };
    if !all.iter().any(|own| fits(own)) && parts[0] != "cluster.local" {
        return vec![principal.to_owned()];
    }
    let ends = |own: &str| parts[0].strip_prefix('*').is_some_and(|end| own.ends_with(end));
    let one = |own: &&str| {
        if ends(own) { principal.to_owned() } else { format!("{own}/{}", parts[1..].join("/")) }
    };
    all.iter().map(one).collect()
}

fn simple(value: &str, text: &str) -> bool {
    if value == "*" {
        !text.is_empty()
    } else if let Some(end) = value.strip_prefix('*') {
        text.ends_with(end)
    } else if let Some(start) = value.strip_suffix('*') {
        text.starts_with(start)
    } else {
        value == text
    }
}

fn runs(value: &[u8], text: &[u8]) -> bool {
    match value.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skip| runs(rest, &text[skip..])),
        Some((c, rest)) => text.first() == Some(c) && runs(rest, &text[1..]),
    }
}

fn in_net(value: &str, addr: IpAddr) -> bool {
    let (base, len) = value.split_once('/').unwrap();
    let bits = |addr: IpAddr| match addr {
        IpAddr::V4(v4) => format!("4{:032b}", u32::from(v4)),
        IpAddr::V6(v6) => format!("6{:0128b}", u128::from(v6)),
    };
    let keep = 1 + len.parse::<usize>().unwrap();
    bits(addr).get(..keep) == bits(base.parse().unwrap()).get(..keep) && bits(addr).len() >= keep
}

fn match_says(words: &Words, asked: &Asked, unknown: Unknown) -> bool {
    let given = [
        words.principals.len(),
        words.not_principals.len(),
        words.namespaces.len(),
        words.not_namespaces.len(),
        words.accounts.len(),
        words.not_accounts.len(),
        words.domains.len(),
        words.not_domains.len(),
        words.sources.len(),
        words.not_sources.len(),
        words.destinations.len(),
        words.not_destinations.len(),
        words.ports.len(),
        words.not_ports.len(),
        usize::from(words.l7),
    ];
    if given.iter().sum::<usize>() == 0 {
        return false;
    }
    let principal = |value: &String| {
        asked.identity.as_ref().is_some_and(|(domain, ns, account)| {
            let text = format!("{domain}/ns/{ns}/sa/{account}");
            expanded(value).iter().any(|one| simple(one, &text))
        })
    };
    let namespace = |value: &String| {
        asked.identity.as_ref().is_some_and(|(_, ns, _)| runs(value.as_bytes(), ns.as_bytes()))
    };
    let account = |(ns, name): &(String, String)| {
        asked.identity.as_ref().is_some_and(|(_, own_ns, own)| own_ns == ns && own == name)
    };
    let domain = |value: &String| {
        asked.identity.as_ref().is_some_and(|(domain, _, _)| {
            let all: Vec<&str> = std::iter::once(DOMAIN).chain(ALIASES).collect();
            let values = if all.contains(&value.as_str()) { all } else { vec![value.as_str()] };
            values.iter().any(|value| runs(value.as_bytes(), domain.as_bytes()))
        })
    };
    let no_source = asked.source.is_none();
    let source = |value: &String| asked.source.is_some_and(|addr| in_net(value, addr));
    let destination = |value: &String| in_net(value, asked.destination);
    let fields = [
        words.principals.is_empty() || words.principals.iter().any(principal),
        words.not_principals.is_empty() || !words.not_principals.iter().any(principal),
        words.namespaces.is_empty() || words.namespaces.iter().any(namespace),
        words.not_namespaces.is_empty() || !words.not_namespaces.iter().any(namespace),
        words.accounts.is_empty() || words.accounts.iter().any(account),
        words.not_accounts.is_empty() || !words.not_accounts.iter().any(account),
        words.domains.is_empty() || words.domains.iter().any(domain),
        words.not_domains.is_empty() || !words.not_domains.iter().any(domain),
        words.sources.is_empty() || if no_source { unknown.0 } else { words.sources.iter().any(source) },
        words.not_sources.is_empty()
            || if no_source { unknown.0 } else { !words.not_sources.iter().any(source) },
        words.destinations.is_empty() || words.destinations.iter().any(destination),
        words.not_destinations.is_empty() || !words.not_destinations.iter().any(destination),
        words.ports.is_empty() || words.ports.contains(&asked.port),
        words.not_ports.is_empty() || !words.not_ports.contains(&asked.port),
        !words.l7 || unknown.0,
    ];
    fields.iter().all(|holds| *holds)
}

fn policy_says(written: &Written, asked: &Asked) -> bool {
    let unknown = Unknown(written.deny);
    written.rules.iter().any(|rule| {
        let void = !written.deny && rule.iter().flatten().any(|words| words.l7);
        let clause_says = |clause: &Vec<Words>| {
            clause.is_empty() || clause.iter().any(|words| match_says(words, asked, unknown))
        };
        !void && rule.iter().all(clause_says)
    })
}

fn reference(policies: &[Written], asked: &Asked) -> Verdict {
    let enforced = || policies.iter().filter(|p| !p.dry_run);
    if enforced().any(|p| p.deny && policy_says(p, asked)) {
        return DENIED;
    }
    let has_allow = enforced().any(|p| !p.deny);
    if has_allow && !enforced().any(|p| !p.deny && policy_says(p, asked)) {
        return UNALLOWED;
    }
    Verdict::Allow
}

fn parsed(index: usize, written: &Written) -> AuthorizationPolicy {
    let texts = |values: &[String]| values.iter().map(|v| StringMatch::parse(v)).collect();
    let nets = |values: &[String]| values.iter().map(|v| v.parse().unwrap()).collect();
    let accounts = |values: &[(String, String)]| {
        let of = |(ns, name): &(String, String)| ServiceAccountMatch {
            namespace: ns.as_str().into(),
            name: name.as_str().into(),
        };
        values.iter().map(of).collect()
    };
    let to_match = |w: &Words| Match {
        principals: texts(&w.principals),
        not_principals: texts(&w.not_principals),
        namespaces: texts(&w.namespaces),
        not_namespaces: texts(&w.not_namespaces),
        service_accounts: accounts(&w.accounts),
        not_service_accounts: accounts(&w.not_accounts),
        trust_domains: texts(&w.domains),
        not_trust_domains: texts(&w.not_domains),
        source_ips: nets(&w.sources),
        not_source_ips: nets(&w.not_sources),
        destination_ips: nets(&w.destinations),
        not_destination_ips: nets(&w.not_destinations),
        destination_ports: w.ports.clone(),
        not_destination_ports: w.not_ports.clone(),
        l7: w.l7,
    };
    let clause = |clause: &Vec<Words>| clause.iter().map(to_match).collect();
    let rule = |rule: &Vec<Vec<Words>>| Rule { clauses: rule.iter().map(clause).collect() };
    AuthorizationPolicy {
        action: if written.deny { Action::Deny } else { Action::Allow },
        dry_run: written.dry_run,
        rules: written.rules.iter().map(rule).collect(),
        ..AuthorizationPolicy::named(Name::new("default", format!("p{index}")))
    }
}

fn judged(policies: &[Written], asked: &Asked) -> Judgement {
    let policies: Vec<_> = policies.iter().enumerate().map(|(at, p)| parsed(at, p)).collect();
    let (_, web) = world(&policies);
    let mesh = Mesh {
        trust_domain: DOMAIN.into(),
        trust_domain_aliases: ALIASES.iter().map(|a| Arc::from(*a)).collect(),
        ..Mesh::default()
    };
    let parts = Parts {
        policies: policies.into_iter().map(Arc::new).collect(),
        mesh: Arc::new(mesh),
        ..Parts::default()
    };
    let peer = match &asked.identity {
        Some((domain, ns, account)) => {
            Peer::Tls(Arc::new(Identity::new(domain.as_str(), ns.as_str(), account.as_str())))
        }
        None => Peer::Unauthenticated,
    };
    let attempt =
        Attempt { peer: &peer, source: asked.source, destination: asked.destination, port: asked.port };
    admit(&Snapshot::new(1, parts), &attempt, &web)
}

fn some_of<S: Strategy>(value: S) -> impl Strategy<Value = Vec<S::Value>>
where
    S::Value: Clone + std::fmt::Debug,
{
    prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(value, 1..3)]
}

fn pick(values: &'static [&'static str]) -> impl Strategy<Value = String> + Clone {
    prop::sample::select(values).prop_map(str::to_owned)
}

fn namespace_value() -> impl Strategy<Value = String> + Clone {
    pick(&["a", "ab", "b", "a*", "*b", "*", "a*b", "*a*"])
}

fn principal_value() -> impl Strategy<Value = String> + Clone {
    let domain = pick(&["new-td", "old-td", "more", "cluster.local", "else", "*", "*-td", "new*"]);
    let whole = (domain, pick(&["a", "ab"]), pick(&["x", "y", "x*", "*"]))
        .prop_map(|(domain, ns, account)| format!("{domain}/ns/{ns}/sa/{account}"));
    prop_oneof![4 => whole, 1 => pick(&["*", "new-td/ns/a/*", "*/sa/x", "old*", "*x*", "x"])]
}

fn words() -> impl Strategy<Value = Words> {
    let account = || (pick(&["a", "ab"]), pick(&["x", "y"]));
    let domain = || pick(&["new-td", "old-td", "else", "*-td", "m*e", "*"]);
    let net = || pick(&["10.0.0.0/8", "10.0.0.1/32", "10.1.0.0/16", "0.0.0.0/0", "fd00::/16", "fd00::1/128"]);
    let port = || prop::sample::select(&[80_u16, 81][..]);
    let identity = (
        some_of(principal_value()),
        some_of(principal_value()),
        some_of(namespace_value()),
        some_of(namespace_value()),
        some_of(account()),
        some_of(account()),
        some_of(domain()),
        some_of(domain()),
    );
    let network =
        (some_of(net()), some_of(net()), some_of(net()), some_of(net()), some_of(port()), some_of(port()));
    (identity, network, prop::bool::weighted(0.1)).prop_map(|(who, at, l7)| Words {
        principals: who.0,
        not_principals: who.1,
        namespaces: who.2,
        not_namespaces: who.3,
        accounts: who.4,
        not_accounts: who.5,
        domains: who.6,
        not_domains: who.7,
        sources: at.0,
        not_sources: at.1,
        destinations: at.2,
        not_destinations: at.3,
        ports: at.4,
        not_ports: at.5,
        l7,
    })
}

fn written() -> impl Strategy<Value = Written> {
    let clause = prop::collection::vec(words(), 0..3);
    let rule = prop::collection::vec(clause, 0..3);
    (any::<bool>(), prop::bool::weighted(0.2), prop::collection::vec(rule, 0..3))
        .prop_map(|(deny, dry_run, rules)| Written { deny, dry_run, rules })
}

fn asked() -> impl Strategy<Value = Asked> {
    let domain = pick(&["new-td", "old-td", "more"]);
    let identity = (domain, pick(&["a", "ab", "b", "abb"]), pick(&["x", "y", "xx"]));
    let addr = || {
        pick(&["10.0.0.1", "10.1.0.1", "192.0.2.1", "fd00::1", "fd01::1"])
            .prop_map(|text| text.parse::<IpAddr>().unwrap())
    };
    let port = prop::sample::select(&[80_u16, 81, 82][..]);
    (prop::option::of(identity), prop::option::weighted(0.9, addr()), addr(), port)
        .prop_map(|(identity, source, destination, port)| Asked { identity, source, destination, port })
}

fn policies() -> impl Strategy<Value = Vec<Written>> {
    prop::collection::vec(written(), 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn evaluation_equals_the_naive_reading(policies in policies(), asked in asked()) {
        prop_assert_eq!(judged(&policies, &asked).verdict, reference(&policies, &asked));
    }

    #[test]
    fn another_deny_never_widens(mut policies in policies(), more in written(), asked in asked()) {
        let before = judged(&policies, &asked);
        policies.push(Written { deny: true, dry_run: false, ..more });
        prop_assert!(before.is_allow() || !judged(&policies, &asked).is_allow());
    }

    #[test]
    fn another_allow_beside_one_never_narrows(mut policies in policies(), more in written(), asked in asked()) {
        policies.push(Written { deny: false, dry_run: false, rules: Vec::new() });
        let before = judged(&policies, &asked);
        policies.push(Written { deny: false, dry_run: false, ..more });
        prop_assert!(!before.is_allow() || judged(&policies, &asked).is_allow());
    }

    #[test]
    fn dry_runs_never_change_a_verdict(mut policies in policies(), more in written(), asked in asked()) {
        let before = judged(&policies, &asked);
        policies.push(Written { dry_run: true, ..more });
        let after = judged(&policies, &asked);
        prop_assert_eq!((before.verdict, before.decided_by), (after.verdict, after.decided_by));
        prop_assert_eq!(after.dry_run.len(), before.dry_run.len() + 1);
    }

    #[test]
    fn a_verdict_names_a_policy_that_gives_it(policies in policies(), asked in asked()) {
        let judgement = judged(&policies, &asked);
        if let Some(DecidedBy { policy, rule }) = &judgement.decided_by {
            let at: usize = policy.name[1..].parse().unwrap();
            prop_assert_eq!(policies[at].deny, judgement.verdict == DENIED);
            if let Some(rule) = rule {
                let only = Written { rules: vec![policies[at].rules[*rule].clone()], ..policies[at].clone() };
                prop_assert!(policy_says(&only, &asked));
            }
        }
    }

    #[test]
    fn less_known_is_never_more_allowed(policies in policies(), asked in asked()) {
        let unknown = Asked { source: None, ..asked.clone() };
        prop_assert!(!judged(&policies, &unknown).is_allow() || judged(&policies, &asked).is_allow());
    }
}
