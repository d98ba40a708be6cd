//! The proxied byte stream: everything arrives, ends arrive as ends, resets as resets.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::protocol::{How, Open, Packet, Serve};
use mesh_tests::tool::ServerOptions;
use mesh_tests::{
    Connection, Failure, Pod, Server, Shop, TestResult, ToolError, eventually, require_agent, test_name,
};
use nix::errno::Errno;

/// Enough to leave every buffer on the way full many times.
const BULK: u64 = 16 << 20;

/// A client and a server on different nodes, so that every byte crosses both agents.
struct Scene {
    _shop: Shop,
    client: Pod,
    far: Pod,
    targets: [SocketAddr; 2],
}

impl Scene {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let client = shop.pod("a", "client")?;
        let far = shop.pod("b", "far")?;
        let vip = shop.service("far", 80)?;
        shop.start_agents()?;
        Ok(Self { _shop: shop, client, far, targets: [vip.v4, vip.v6] })
    }

    fn serve(&self, serve: Serve) -> Result<Server, ToolError> {
        let options = ServerOptions::named("far").serving(serve);
        self.far.tool()?.serve(SocketAddr::from(([0u16; 8], 8080)), options)
    }

    fn dial(&self, to: SocketAddr) -> Result<Connection, ToolError> {
        self.client.tool()?.connect(to)
    }
}

#[test]
fn bulk_arrives_whole_in_both_directions() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    for to in scene.targets {
        let _server = scene.serve(Serve::Sink)?;
        let upload = scene.dial(to)?;
        upload.send_bulk(BULK, 3)?;
        upload.shutdown_write()?;
        assert_eq!(upload.recv_line()?, format!("{BULK}\n"), "the end arrives behind the bytes");
        assert_eq!(upload.recv(1)?, "", "and the server's end comes back");
    }
    for to in scene.targets {
        let _server = scene.serve(Serve::Source { bytes: BULK })?;
        assert_eq!(scene.dial(to)?.recv_bulk(BULK + 1, 1)?, BULK);
    }
    Ok(())
}

#[test]
fn bulk_flows_both_ways_at_once() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let _server = scene.serve(Serve::Echo)?;
    for to in scene.targets {
        let connection = scene.dial(to)?;
        std::thread::scope(|scope| -> TestResult {
            let sending =
                scope.spawn(|| connection.send_bulk(BULK, 5).and_then(|_| connection.shutdown_write()));
            assert_eq!(connection.recv_bulk(BULK + 1, 5)?, BULK);
            sending.join().unwrap()?;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_half_closed_connection_still_answers() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let _server = scene.serve(Serve::Sink)?;
    for to in scene.targets {
        let connection = scene.dial(to)?;
        connection.send("hello")?;
        connection.shutdown_write()?;
        assert_eq!(connection.recv_line()?, "5\n");
    }
    Ok(())
}

#[test]
fn a_servers_reset_reaches_the_client() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let _server = scene.serve(Serve::Reset)?;
    for to in scene.targets {
        let ended = scene.dial(to).and_then(|connection| connection.recv(1));
        assert_eq!(ended.err().and_then(|error| error.errno()), Some(Errno::ECONNRESET));
    }
    Ok(())
}

#[test]
fn a_clients_reset_reaches_the_server() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let _server = scene.serve(Serve::Stall)?;
    let capture = scene.far.tool()?.capture()?;
    for to in scene.targets {
        let connection = scene.dial(to)?;
        let to_server = |wanted: &dyn Fn(&Packet) -> bool| {
            let packets = capture.packets().unwrap_or_default();
            packets.iter().filter(|packet| packet.to.port() == 8080 && wanted(packet)).count()
        };
        let (sent, reset) =
            (|| to_server(&|packet| packet.payload == 5), || to_server(&|packet| packet.flags & 4 != 0));
        let before = (sent(), reset());
        connection.send("hello")?;
        // A reset before the server has the connection would leave nothing to reset.
        eventually(Duration::from_secs(5), sent, |count| *count > before.0)?;
        connection.reset()?;
        eventually(Duration::from_secs(5), reset, |count| *count > before.1)?;
    }
    Ok(())
}

#[test]
fn a_receiver_that_does_not_read_stops_the_sender() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let _server = scene.serve(Serve::Stall)?;
    let to = scene.targets[0];
    let connection = scene.client.tool()?.open(Open::tcp_to(to))?;
    // The time-out of the connect is also that of each send.
    connection.dial_within(to, How::Blocking, Duration::from_secs(1))?;
    // With unbounded buffers in between this much would be taken.
    const FAR_TOO_MUCH: u64 = 512 << 20;
    std::thread::scope(|scope| -> TestResult {
        let sending = scope.spawn(|| connection.send_bulk(FAR_TOO_MUCH, 1));
        let stopped = eventually(Duration::from_secs(20), || sending.is_finished(), |finished| *finished);
        // The tool's sends give up after their time-out (EAGAIN) because nobody takes the bytes.
        stopped?;
        let outcome = sending.join().unwrap();
        assert_eq!(outcome.err().and_then(|error| error.errno()), Some(Errno::EAGAIN));
        Ok(())
    })
}
