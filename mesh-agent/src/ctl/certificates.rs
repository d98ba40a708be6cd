//! Owns the text of `meshctl certificates`.

use std::fmt::Write as _;

use super::{
    figures,
    table::{Align, Table},
};
use crate::view::CertificatesView;

/// Hex digits of a fingerprint that tell certificates apart at a glance; `-o json` has them all.
const FINGERPRINT_SHOWN: usize = 16;

/// The whole answer as text; `wide` has whole serial numbers and fingerprints, of chains too.
pub(super) fn render(view: &CertificatesView, wide: bool) -> String {
    let short = |text: &str| if wide { text } else { short(text) }.to_owned();
    let mut out = String::new();
    let aliases = match view.trust_domain_aliases.is_empty() {
        true => String::new(),
        false => format!(", also {}", view.trust_domain_aliases.join(", ")),
    };
    let roots: Vec<String> = view.roots.iter().map(|root| short(root)).collect();
    let trusted = match roots.is_empty() {
        true => "none yet".to_owned(),
        false => format!("{}: {}", figures::counted(roots.len(), "root"), roots.join(", ")),
    };
    for (key, value) in [
        ("domain", format!("{}{aliases}", view.trust_domain)),
        ("issuer", view.issuer.clone()),
        ("trusted", trusted),
    ] {
        // Writing to a String cannot fail.
        let _ignored = writeln!(out, "{key:<8}  {value}");
    }
    let mut table = Table::new(&[
        ("IDENTITY", Align::Left),
        ("STATE", Align::Left),
        ("SERIAL", Align::Left),
        ("KEY", Align::Left),
        ("NOT BEFORE", Align::Left),
        ("NOT AFTER", Align::Left),
        ("RENEW AT", Align::Left),
        ("CHAIN", Align::Right),
        ("LAST ERROR", Align::Left),
    ])
    .widened(wide, &[("FINGERPRINTS", Align::Left)]);
    for certificate in &view.certificates {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        table.row([
            certificate.identity.clone(),
            certificate.state.clone(),
            certificate.serial.as_deref().map(short).unwrap_or_default(),
            text(&certificate.key),
            text(&certificate.not_before),
            text(&certificate.not_after),
            text(&certificate.renew_at),
            certificate.chain_depth.to_string(),
            text(&certificate.last_error),
        ]);
        table.more([certificate.chain.join(",")]);
    }
    if !view.certificates.is_empty() {
        out.push('\n');
        out.push_str(&table.render());
    }
    out
}

fn short(text: &str) -> &str {
    text.get(..FINGERPRINT_SHOWN).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::CertificateView;

    #[test]
    fn a_missing_certificate_shows_why() {
        let view = CertificatesView {
            node: "n1".into(),
            trust_domain: "cluster.local".into(),
            trust_domain_aliases: vec!["old.example".into()],
            issuer: "/var/lib/nodemesh/ca".into(),
            roots: vec!["0123456789abcdef0123".into()],
            certificates: vec![CertificateView {
                identity: "spiffe://cluster.local/ns/shop/sa/cart".into(),
                state: "failed".into(),
                serial: None,
                key: None,
                not_before: None,
                not_after: None,
                renew_at: Some("2026-01-02T03:04:05Z".into()),
                chain_depth: 0,
                chain: Vec::new(),
                last_error: Some("the CA refused: not hosted".into()),
            }],
        };
        let text = render(&view, false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "domain    cluster.local, also old.example");
        assert_eq!(lines[2], "trusted   1 root: 0123456789abcdef");
        assert!(lines[5].starts_with("spiffe://cluster.local/ns/shop/sa/cart  failed"), "{text}");
        assert!(lines[5].ends_with("the CA refused: not hosted"), "{text}");

        let mut view = view;
        view.certificates[0].serial = Some("00112233445566778899".into());
        view.certificates[0].chain = vec!["aa".into(), "bb".into()];
        let wide = render(&view, true);
        assert!(wide.contains("trusted   1 root: 0123456789abcdef0123\n"), "{wide}");
        assert!(wide.contains("  00112233445566778899  ") && wide.ends_with("  aa,bb\n"), "{wide}");
        assert!(!render(&view, false).contains("00112233445566778899"));
    }
}
