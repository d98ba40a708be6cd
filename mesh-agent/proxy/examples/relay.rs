//! Measures the relay alone: a client and a server with and without a proxy between them, on plain sockets.
//!
//! `relay serve ADDR` runs the server; `relay [ADDR]` runs client and proxy (and the server too when no address is given).
//! Without an address there are also rows for a tunnel: two proxies back to back, as on two nodes, with TLS between them.
//! `PATHS` (a list of `none`, `copy`, `splice`, `tunnel`) chooses among them. `MEASURE_S` (a measurement), `ROUNDS` and `WORKERS` are read from the environment. Run the server in another network namespace to have a real hop behind the proxy. Prints one line per row:
//! path, round trip p50 and p99, 64 KiB and 1 KiB writes, connects with one request, the processor time of the
//! proxy's process per GiB, and the memory of an idle connection.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    num::NonZeroUsize,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

use mesh_core::{
    id::WorkloadId,
    snapshot::{Name, Parts, Snapshot, Tunnel, Workload},
};
use mesh_identity::{Ca, Certificates, LocalIssuer, TrustDomains, ca::CaOptions, workloads::Options};
use mesh_proxy::{
    Dependencies, Metrics, Proxy, Settings,
    kernel::{Dialled, Kernel, LocalPeer, PodHandle, PodListeners, Sockets, UpstreamTags, VerdictEntry},
};
use prometheus_client::registry::Registry;
use socket2::{Domain, Socket, Type};
use tokio::sync::watch;

struct Plain(SocketAddr);

impl Kernel for Plain {
    fn dialled(&self, _: BorrowedFd<'_>) -> Option<Dialled> {
        Some(Dialled { dst: self.0, backend: None, service: None, started_ns: 0 })
    }
    fn local_peer(&self, _: WorkloadId) -> Option<LocalPeer> {
        None
    }
    fn put_verdict(&self, _: &PodHandle, _: VerdictEntry) {}
    fn resolver(&self, _: &PodHandle, _: u16, _: bool) -> Option<SocketAddr> {
        None
    }
}

impl Sockets for Plain {
    fn tcp(&self, _: &PodHandle, dst: SocketAddr, _: &UpstreamTags) -> io::Result<OwnedFd> {
        let socket = Socket::new(Domain::for_address(dst), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    }
    fn udp(&self, _: &PodHandle, dst: SocketAddr) -> io::Result<OwnedFd> {
        Ok(Socket::new(Domain::for_address(dst), Type::DGRAM, None)?.into())
    }
}

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", addr] => serve(TcpListener::bind(addr)?),
        [addr] => compare(addr.parse().map_err(io::Error::other)?),
        _ => {
            let listener = TcpListener::bind("0.0.0.0:0")?;
            let addr = SocketAddr::from(([127, 0, 0, 1], listener.local_addr()?.port()));
            thread::spawn(move || serve(listener));
            compare(addr)
        }
    }
}

/// The first byte says what the client wants: `e`cho, or `s`ink.
fn serve(listener: TcpListener) -> io::Result<()> {
    for stream in listener.incoming() {
        let mut stream = stream?;
        thread::spawn(move || -> io::Result<()> {
            stream.set_nodelay(true)?;
            let mut buf = vec![0; 256 << 10];
            let mut mode = [0];
            stream.read_exact(&mut mode)?;
            loop {
                let got = stream.read(&mut buf)?;
                if got == 0 {
                    return stream.write_all(b"done");
                }
                if mode[0] == b'e' {
                    stream.write_all(&buf[..got])?;
                }
            }
        });
    }
    Ok(())
}

fn compare(server: SocketAddr) -> io::Result<()> {
    let number = |name: &str, default: f64| {
        std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
    };
    let seconds = Duration::from_secs_f64(number("MEASURE_S", 2.0));
    let paths = std::env::var("PATHS").unwrap_or_else(|_| "none,copy,splice,tunnel".to_owned());
    for round in 0..number("ROUNDS", 3.0) as u32 {
        for name in paths.split(',') {
            let (proxies, addr) = match name {
                "none" => (Vec::new(), server),
                "tunnel" if server.ip().is_loopback() => tunnel(server.port())?,
                "tunnel" => continue,
                _ => {
                    let (proxy, addr) = proxy(Pod::client(), server, name == "splice", 0, None)?;
                    (vec![proxy], addr)
                }
            };
            row(&format!("{name} {round}"), addr, seconds)?;
            if !proxies.is_empty() {
                println!("{name:8} {round} {} bytes of memory for an idle connection", idle(addr)?);
            }
            drop(proxies);
            thread::sleep(Duration::from_millis(300));
        }
    }
    Ok(())
}

/// A pod of the measured paths.
#[derive(Clone, Copy)]
struct Pod {
    name: &'static str,
    node: &'static str,
    addr: [u8; 4],
}

impl Pod {
    fn client() -> Self {
        Self { name: "client", node: "a", addr: [127, 0, 0, 1] }
    }

    fn server() -> Self {
        Self { name: "server", node: "b", addr: [127, 0, 0, 2] }
    }

    fn workload(self) -> Workload {
        Workload {
            addrs: vec![self.addr.into()],
            node: self.node.into(),
            meshed: true,
            ready: true,
            tunnel: Tunnel::Hbone,
            ..Workload::named(Name::new("default", self.name))
        }
    }
}

/// Two proxies with a tunnel between them; the address of the first one's listener.
fn tunnel(port: u16) -> io::Result<(Vec<Proxy>, SocketAddr)> {
    let hbone = TcpListener::bind(SocketAddr::from((Pod::server().addr, 0)))?;
    let hbone_port = hbone.local_addr()?.port();
    let target = SocketAddr::from((Pod::server().addr, port));
    let (server, _) = proxy(Pod::server(), target, false, 0, Some(hbone))?;
    let (client, addr) = proxy(Pod::client(), target, false, hbone_port, None)?;
    Ok((vec![client, server], addr))
}

/// One CA for both sides; certificates are fetched by a thread of its own.
fn certificates(pod: Pod) -> io::Result<Arc<Certificates>> {
    static CA: OnceLock<Arc<Ca>> = OnceLock::new();
    let open = || {
        let folder = std::env::temp_dir().join(format!("mesh-proxy-example-{}", std::process::id()));
        let ca = Ca::open(CaOptions::new(&folder, "cluster.local")).map(Arc::new);
        std::fs::remove_dir_all(&folder).ok();
        ca
    };
    let ca = match CA.get() {
        Some(ca) => Arc::clone(ca),
        None => Arc::clone(CA.get_or_init({
            let ca = open().map_err(io::Error::other)?;
            || ca
        })),
    };
    let issuer = LocalIssuer::new(ca, pod.node, |_| true);
    let options = Options::new(TrustDomains::new("cluster.local"));
    let (certificates, renewer) = Certificates::new(options, Arc::new(issuer));
    certificates.want([pod.workload().identity()]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::spawn(move || runtime.block_on(renewer.run()));
    Ok(certificates)
}

fn proxy(
    pod: Pod,
    server: SocketAddr,
    splice: bool,
    hbone_port: u16,
    hbone: Option<TcpListener>,
) -> io::Result<(Proxy, SocketAddr)> {
    let mut settings = Settings::new(pod.node);
    settings.splice = splice;
    settings.hbone.port = hbone_port;
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<usize>().ok());
    if let Some(workers) = number("WORKERS").and_then(NonZeroUsize::new) {
        settings.workers = workers;
    }
    if let Some(window) = number("WINDOW") {
        settings.hbone.stream_window = window as u32;
    }
    let plain = Arc::new(Plain(server));
    let workloads = [Pod::client(), Pod::server()].map(|pod| Arc::new(pod.workload())).to_vec();
    let snapshot = Snapshot::new(1, Parts { workloads, ..Parts::default() });
    let (_, snapshots) = watch::channel(Arc::new(snapshot));
    let dependencies = Dependencies {
        sockets: Arc::clone(&plain) as Arc<dyn Sockets>,
        kernel: plain,
        snapshots,
        metrics: Arc::new(Metrics::register(&mut Registry::default())),
        certificates: certificates(pod)?,
        alive: Box::new(|_| {}),
    };
    let proxy = Proxy::start(settings, dependencies).map_err(io::Error::other)?;
    let listener = || TcpListener::bind(SocketAddr::from((pod.addr, 0)));
    let outbound = listener()?;
    let addr = outbound.local_addr()?;
    let listeners = PodListeners {
        outbound: vec![outbound.into()],
        inbound: listener()?.into(),
        hbone: hbone.map_or_else(listener, Ok)?.into(),
        dns_udp: std::net::UdpSocket::bind(SocketAddr::from((pod.addr, 0)))?.into(),
        dns_tcp: listener()?.into(),
    };
    let handle = PodHandle {
        pod: 0,
        workload: pod.workload().id,
        name: pod.workload().name,
        netns_cookie: 1,
        addrs: vec![IpAddr::from(pod.addr)],
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(proxy.add_pod(handle, listeners)).map_err(io::Error::other)?;
    Ok((proxy, addr))
}

fn row(name: &str, addr: SocketAddr, time: Duration) -> io::Result<()> {
    let (p50, p99) = round_trips(addr, time)?;
    let (bulk, cpu) = writes(addr, 64 << 10, time)?;
    let (small, _) = writes(addr, 1 << 10, time)?;
    let four: f64 = thread::scope(|scope| {
        let all: Vec<_> =
            (0..4).map(|_| scope.spawn(|| writes(addr, 64 << 10, time).map_or(0.0, |w| w.0))).collect();
        all.into_iter().map(|one| one.join().unwrap_or(0.0)).sum()
    });
    let rate = connects(addr, time)?;
    println!(
        "{name:10} rtt p50 {p50:6.1} us p99 {p99:6.1} us | 64K {bulk:5.2} Gbit/s ({cpu:.2} cpu s/GiB) x4 {four:5.2} | \
         1K {small:5.2} | {rate:6.0} connect+request/s"
    );
    Ok(())
}

fn dial(addr: SocketAddr, mode: u8) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_nodelay(true)?;
    stream.write_all(&[mode])?;
    Ok(stream)
}

fn round_trips(addr: SocketAddr, time: Duration) -> io::Result<(f64, f64)> {
    let mut stream = dial(addr, b'e')?;
    let mut took = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < time {
        let start = Instant::now();
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
        took.push(start.elapsed().as_secs_f64() * 1e6);
    }
    took.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| took.get((took.len() as f64 * share) as usize).copied().unwrap_or(0.0);
    Ok((at(0.5), at(0.99)))
}

/// Gbit/s, and this process's processor seconds per GiB (with the server inside it when there is no other).
fn writes(addr: SocketAddr, size: usize, time: Duration) -> io::Result<(f64, f64)> {
    let mut stream = dial(addr, b's')?;
    let buf = vec![7; size];
    let (begun, cpu) = (Instant::now(), cpu_s());
    let mut sent = 0_u64;
    while begun.elapsed() < time {
        for _ in 0..16 {
            stream.write_all(&buf)?;
            sent += size as u64;
        }
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_exact(&mut [0; 4])?;
    let gbit = sent as f64 * 8.0 / begun.elapsed().as_secs_f64() / 1e9;
    Ok((gbit, (cpu_s() - cpu) / (sent as f64 / f64::from(1 << 30))))
}

fn connects(addr: SocketAddr, time: Duration) -> io::Result<f64> {
    let begun = Instant::now();
    let mut count = 0.0;
    while begun.elapsed() < time {
        let mut stream = dial(addr, b'e')?;
        stream.write_all(b"request")?;
        stream.read_exact(&mut [0; 7])?;
        // A reset leaves no TIME_WAIT behind, so that the ports last.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        count += 1.0;
    }
    Ok(count / begun.elapsed().as_secs_f64())
}

/// Resident bytes that one more idle connection costs this process: the proxy's part, as clients are bare sockets.
fn idle(addr: SocketAddr) -> io::Result<u64> {
    const COUNT: u64 = 400;
    let open = || -> io::Result<Vec<TcpStream>> {
        (0..COUNT)
            .map(|_| {
                let mut stream = dial(addr, b'e')?;
                stream.write_all(b"x")?;
                stream.read_exact(&mut [0])?;
                Ok(stream)
            })
            .collect()
    };
    // The first ones pay for tables that the next ones find.
    let first = open()?;
    let before = resident()?;
    let second = open()?;
    let cost = resident()?.saturating_sub(before) / COUNT;
    drop((first, second));
    Ok(cost)
}

fn resident() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    Ok(pages.unwrap_or(0) * 4096)
}

fn cpu_s() -> f64 {
    let of = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF);
    of.map_or(0.0, |usage| {
        let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
        seconds(usage.user_time()) + seconds(usage.system_time())
    })
}
