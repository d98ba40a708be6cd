//! Owns the text of `meshctl connections`.

use super::{
    figures,
    table::{Align, Table},
};
use crate::view::{ConnectionView, ConnectionsView};

/// The whole answer as text; `wide` also has what the client dialled.
pub(super) fn render(view: &ConnectionsView, wide: bool) -> String {
    let mut table = Table::new(&[
        ("PATH", Align::Left),
        ("DIR", Align::Left),
        ("SOURCE", Align::Left),
        ("DESTINATION", Align::Left),
        ("SERVICE", Align::Left),
        ("SECURITY", Align::Left),
        ("PEER", Align::Left),
        ("AGE", Align::Right),
        ("SENT", Align::Right),
        ("RECEIVED", Align::Right),
    ])
    .widened(wide, &[("DIALLED", Align::Left)]);
    for connection in &view.connections {
        table.row(row(connection));
        table.more([connection.dialled.map(|addr| addr.to_string()).unwrap_or_default()]);
    }
    let mut out = table.render();
    if view.left_off > 0 {
        out.push_str(&format!("… and {} more\n", view.left_off));
    }
    out
}

fn row(connection: &ConnectionView) -> [String; 10] {
    let named = |name: &Option<String>, addr: Option<String>| match (name, addr) {
        (Some(name), Some(addr)) => format!("{name} ({addr})"),
        (Some(one), None) => one.clone(),
        (None, addr) => addr.unwrap_or_default(),
    };
    let size = |bytes: Option<u64>| bytes.map(|n| figures::bytes(n as f64)).unwrap_or_default();
    let destination = connection.destination_addr.or(connection.dialled);
    [
        connection.path.as_str().to_owned(),
        connection.direction.clone(),
        named(&connection.source, Some(connection.source_addr.to_string())),
        named(&connection.destination, destination.map(|addr| addr.to_string())),
        connection.service.clone().unwrap_or_default(),
        connection.security.as_str().to_owned(),
        connection.peer.clone().unwrap_or_default(),
        figures::age(connection.age_s),
        size(connection.bytes_tx),
        size(connection.bytes_rx),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::{Path, Security};

    #[test]
    fn names_stand_beside_addresses_and_unknown_bytes_are_a_dash() {
        let direct = ConnectionView {
            path: Path::Direct,
            direction: "outbound".into(),
            source: Some("shop/cart".into()),
            source_addr: "10.1.0.2:40000".parse().unwrap(),
            destination: Some("shop/web-0".into()),
            destination_addr: Some("10.1.0.3:8080".parse().unwrap()),
            dialled: Some("10.96.0.1:80".parse().unwrap()),
            service: Some("shop/web".into()),
            security: Security::Kernel,
            peer: Some("spiffe://cluster.local/ns/shop/sa/web".into()),
            age_s: 3.0,
            bytes_tx: None,
            bytes_rx: None,
        };
        let stranger = ConnectionView {
            path: Path::Proxy,
            direction: "inbound".into(),
            source: None,
            security: Security::None,
            peer: None,
            bytes_tx: Some(2048),
            bytes_rx: Some(0),
            ..direct.clone()
        };
        let view = ConnectionsView { connections: vec![direct, stranger], left_off: 5 };
        let wide = render(&view, true);
        assert!(wide.lines().next().is_some_and(|line| line.ends_with("  DIALLED")), "{wide}");
        assert!(wide.lines().nth(1).is_some_and(|line| line.ends_with("  10.96.0.1:80")), "{wide}");
        let text = render(&view, false);
        assert!(!text.contains("10.96.0.1"), "{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("shop/cart (10.1.0.2:40000)"), "{text}");
        assert!(lines[1].contains("kernel    spiffe://cluster.local/ns/shop/sa/web"), "{text}");
        assert!(lines[1].ends_with("3.0s         -         -"), "{text}");
        assert!(lines[2].contains("inbound   10.1.0.2:40000 "), "{text}");
        assert!(lines[2].contains("2.00 KiB"), "{text}");
        assert_eq!(lines[3], "… and 5 more");
    }
}
