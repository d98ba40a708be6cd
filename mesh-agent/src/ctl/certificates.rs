//! Owns the text of `meshctl certificates`.

use std::fmt::Write as _;

use super::{
    figures,
    table::{Align, Table},
};
use crate::view::CertificatesView;

/// Hex digits of a fingerprint that tell certificates apart at a glance; `-o json` has them all.
const FINGERPRINT_SHOWN: usize = 16;

/// The whole answer as text.
pub(super) fn render(view: &CertificatesView) -> String {
    let mut out = String::new();
    let aliases = match view.trust_domain_aliases.is_empty() {
        true => String::new(),
        false => format!(", also {}", view.trust_domain_aliases.join(", ")),
    };
    let roots: Vec<&str> = view.roots.iter().map(|root| short(root)).collect();
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
    ]);
    for certificate in &view.certificates {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        table.row([
            certificate.identity.clone(),
            certificate.state.clone(),
            certificate.serial.as_deref().map(short).unwrap_or_default().to_owned(),
            text(&certificate.key),
            text(&certificate.not_before),
            text(&certificate.not_after),
            text(&certificate.renew_at),
            certificate.chain_depth.to_string(),
            text(&certificate.last_error),
        ]);
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
        let text = render(&view);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "domain    cluster.local, also old.example");
        assert_eq!(lines[2], "trusted   1 root: 0123456789abcdef");
        assert!(lines[5].starts_with("spiffe://cluster.local/ns/shop/sa/cart  failed"), "{text}");
        assert!(lines[5].ends_with("the CA refused: not hosted"), "{text}");
    }
}
