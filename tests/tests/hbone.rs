//! HBONE between nodes, and with others who speak it: what is on the wire, what each side is told, how it ends.

use mesh_tests::authority::{Authority, Leaf, spiffe_of};
use mesh_tests::hbone::{Connect, HboneServer, PORT, Session, everywhere};
use mesh_tests::{Shop, TestResult, require_root, test_name};

#[test]
fn the_harness_understands_itself() -> TestResult {
    require_root!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let (client, server) = (shop.pod("a", "client")?, shop.pod("b", "server")?);
    let authority = Authority::root("test")?.intermediate("issuing")?;
    let tap = shop.world().tap_wire()?;
    let of_server = authority.issue(&Leaf::of(spiffe_of(&server)))?;
    let hbone = HboneServer::start(&server, everywhere(PORT), &of_server, "server")?;
    let of_client = authority.issue(&Leaf::of(spiffe_of(&client)))?;
    for to in [server.at4(PORT), server.at6(PORT)] {
        let session = Session::open(&client, to, &of_client)?;
        assert_eq!(session.identity(), spiffe_of(&server));
        let mut tunnel = session.connect(&Connect::to("10.0.0.1:80").header("baggage", "k8s.x=y"))?;
        assert_eq!(tunnel.who()?.server, "server");
        tunnel.send(b"a long enough secret\n")?;
        assert_eq!(tunnel.receive_line()?, "a long enough secret");
        tunnel.finish()?;
        assert!(tunnel.receive_to_end()?.is_empty());
    }
    let seen = hbone.seen();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert_eq!(seen[0].peer, spiffe_of(&client));
    assert_eq!((seen[0].authority.as_str(), seen[0].headers["baggage"].as_str()), ("10.0.0.1:80", "k8s.x=y"));
    assert!(tap.bytes() > 0 && !tap.heard(b"a long enough secret"));
    let stranger = Authority::root("other")?.issue(&Leaf::of(spiffe_of(&client)))?.trusting(&authority);
    assert!(Session::open(&client, server.at4(PORT), &stranger).is_err_and(|error| error.is_tls()));
    Ok(())
}
