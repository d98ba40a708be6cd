//! Tests of single values.

use proptest::prelude::*;

use super::*;

fn mesh(domain: &str, aliases: &[&str]) -> Mesh {
    Mesh {
        trust_domain: domain.into(),
        trust_domain_aliases: aliases.iter().map(|a| Arc::from(*a)).collect(),
        ..Mesh::default()
    }
}

fn peer(text: &str) -> Identity {
    Identity::parse(&format!("spiffe://{text}")).unwrap()
}

#[test]
fn a_text_is_exact_a_prefix_a_suffix_or_any() {
    for (value, yes, no) in [
        ("abc", "abc", "abcd"),
        ("abc", "abc", "ab"),
        ("abc*", "abc", "xabc"),
        ("abc*", "abcd", "ab"),
        ("*abc", "abc", "abcx"),
        ("*abc", "xabc", "bc"),
        ("*", "x", ""),
        ("a*c", "a*c", "abc"),
        ("*abc*", "xabc*", "xabcx"),
        ("", "", "x"),
    ] {
        let parsed = StringMatch::parse(value);
        assert!(parsed.matches(yes), "{value} {yes}");
        assert!(!parsed.matches(no), "{value} {no}");
        assert_eq!(parsed.to_string(), value);
    }
}

#[test]
fn in_a_namespace_a_star_is_any_run_wherever_it_is() {
    for (value, yes, no) in [
        ("prod", "prod", "prod-2"),
        ("prod*", "prod-2", "a-prod"),
        ("*prod", "a-prod", "prod-2"),
        ("*", "x", ""),
        ("a*z", "az", "azb"),
        ("a*z", "a-z-z", "ba-z"),
        ("*prod*", "a-prod-2", "pro-d"),
        ("a*b*c", "axbxbxc", "axc"),
        ("a*b*", "axbx", "axc"),
        ("*a*b", "xayb", "xba"),
        ("a*a", "aa", "a"),
        ("ab*bc", "abbc", "abc"),
        ("**", "", "never"),
    ] {
        let parsed = StringMatch::parse(value);
        assert!(parsed.matches_glob(yes), "{value} {yes}");
        assert!(no == "never" || !parsed.matches_glob(no), "{value} {no}");
    }
}

#[test]
fn a_principal_of_the_mesh_means_the_same_workload_in_every_trust_domain_of_it() {
    let own = mesh("new-td", &["old-td", "more"]);
    // Value, peers it means, peers it does not mean.
    let table: &[(&str, &[&str], &[&str])] = &[
        (
            "new-td/ns/a/sa/b",
            &["new-td/ns/a/sa/b", "old-td/ns/a/sa/b", "more/ns/a/sa/b"],
            &["else/ns/a/sa/b", "cluster.local/ns/a/sa/b", "new-td/ns/a/sa/c"],
        ),
        ("old-td/ns/a/sa/b", &["new-td/ns/a/sa/b", "more/ns/a/sa/b"], &["else/ns/a/sa/b"]),
        ("cluster.local/ns/a/sa/b", &["new-td/ns/a/sa/b", "old-td/ns/a/sa/b"], &["cluster.local/ns/a/sa/b"]),
        ("else/ns/a/sa/b", &["else/ns/a/sa/b"], &["new-td/ns/a/sa/b"]),
        ("old-td/ns/a/sa/b*", &["new-td/ns/a/sa/bc", "old-td/ns/a/sa/b"], &["new-td/ns/a/sa/c"]),
        ("old-td/ns/a/sa/*", &["more/ns/a/sa/b"], &["more/ns/b/sa/b"]),
        ("*/ns/a/sa/b", &["else/ns/a/sa/b", "more/ns/a/sa/b"], &["more/ns/b/sa/b"]),
        // Fits two of the mesh's, and stays as it is for those and for strangers; the third is added.
        (
            "*-td/ns/a/sa/b",
            &["new-td/ns/a/sa/b", "old-td/ns/a/sa/b", "their-td/ns/a/sa/b", "more/ns/a/sa/b"],
            &["else/ns/a/sa/b", "more/ns/a/sa/c"],
        ),
        ("*-xx/ns/a/sa/b", &["a-xx/ns/a/sa/b"], &["new-td/ns/a/sa/b"]),
        ("new*/ns/a/sa/b", &["new-td/ns/a/sa/b", "more/ns/a/sa/b"], &["newer/ns/a/sa/b"]),
        // Not of five parts: as it is written.
        ("cluster.local/ns/a/*", &["cluster.local/ns/a/sa/b"], &["new-td/ns/a/sa/b"]),
        ("new-td*", &["new-td/ns/a/sa/b", "new-td2/ns/a/sa/b"], &["old-td/ns/a/sa/b"]),
        ("*/sa/b", &["new-td/ns/a/sa/b", "else/ns/x/sa/b"], &["new-td/ns/a/sa/c"]),
        ("*", &["else/ns/x/sa/y"], &[]),
        ("spiffe://new-td/ns/a/sa/b", &[], &["new-td/ns/a/sa/b"]),
    ];
    for (value, means, not) in table {
        let pattern = StringMatch::parse(value);
        for text in *means {
            assert!(principal_matches(&pattern, &peer(text), &own), "{value} means {text}");
        }
        for text in *not {
            assert!(!principal_matches(&pattern, &peer(text), &own), "{value} does not mean {text}");
        }
    }
}

#[test]
fn a_trust_domain_of_the_mesh_means_all_of_its_own() {
    let own = mesh("new-td", &["old-td"]);
    for (value, yes, no) in [
        ("new-td", "old-td", "else"),
        ("old-td", "new-td", "else"),
        ("else", "else", "new-td"),
        ("*-td", "a-td", "td"),
        ("new*", "new-td", "old-td"),
        ("n*d", "new-td", "old-td"),
        ("*", "x", "never"),
    ] {
        let pattern = StringMatch::parse(value);
        let of = |domain: &str| Identity::new(domain, "a", "b");
        assert!(trust_domain_matches(&pattern, &of(yes), &own), "{value} {yes}");
        assert!(no == "never" || !trust_domain_matches(&pattern, &of(no), &own), "{value} {no}");
    }
}

/// The slow way: one character or one star at a time.
fn slow_glob(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) if slow_glob(rest, text) => true,
        (Some((b'*', _)), Some((_, tail))) => slow_glob(pattern, tail),
        (Some((p, rest)), Some((t, tail))) => p == t && slow_glob(rest, tail),
        _ => false,
    }
}

proptest! {
    #[test]
    fn a_glob_equals_trying_every_run(pattern in "[ab*]{1,8}", text in "[ab]{1,10}") {
        let wanted = slow_glob(pattern.as_bytes(), text.as_bytes());
        prop_assert_eq!(StringMatch::parse(&pattern).matches_glob(&text), wanted);
    }

    #[test]
    fn every_value_is_written_as_it_was_read(text in "[ab*/.é]{0,8}") {
        prop_assert_eq!(StringMatch::parse(&text).to_string(), text);
    }
}
