//! `pod-tool`: the hands of the test harness inside a pod, driven by JSON lines; and `pod-tool clean`.

mod capture;
mod client;
mod dns;
mod forge;
mod http;
mod load;
mod objects;
mod server;
mod tls;
mod web;

use std::io::{self, BufRead as _, Write as _};
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;

use clap::{Parser, Subcommand};
use mesh_tests::cluster::init;
use mesh_tests::protocol::{Answer, Call, CallFailure, Reply, Request};

use objects::Objects;

#[derive(Debug, Parser)]
#[command(about = "Sockets inside a pod, for the tests of Nodemesh")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer requests (JSON lines) on standard input until it ends.
    Serve,
    /// Say hello over TLS and print the answer.
    Tls {
        /// Where.
        to: SocketAddr,
        /// Whose certificate it must be.
        name: String,
        /// Trusted authorities, in PEM.
        roots: PathBuf,
    },
    /// Remove what dead test processes left behind.
    Clean {
        /// Also what living ones use.
        #[arg(long)]
        all: bool,
    },
    /// Be a node of a Kubernetes cluster.
    Node {
        /// A `NodeSpec` as a JSON file.
        spec: PathBuf,
    },
    /// Be the first process of such a node.
    NodeInit {
        /// A `NodeSpec` as a JSON file.
        spec: PathBuf,
    },
    /// Print the addresses that the C library finds for a name, one a line.
    Resolve {
        /// The name.
        name: String,
    },
    /// Serve HTTP, gRPC and WebSocket.
    Web {
        /// A `Serving` as JSON.
        task: String,
    },
    /// Send HTTP requests.
    Ask {
        /// A `Script` as JSON.
        task: String,
    },
    /// Make a gRPC call.
    Call {
        /// A `Call` as JSON.
        task: String,
    },
    /// Talk over a WebSocket.
    Chat {
        /// A `Chat` as JSON.
        task: String,
    },
    /// Send a mixed load until standard input ends.
    WebLoad {
        /// A `Mix` as JSON.
        task: String,
    },
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve => serve(),
        Command::Tls { to, name, roots } => match tls::ask(to, name, &roots) {
            Ok(answer) => {
                print!("{answer}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                println!("{error:#}");
                ExitCode::FAILURE
            }
        },
        Command::Clean { all } => {
            for what in mesh_tests::clean::leftovers(all) {
                println!("removed {what}");
            }
            ExitCode::SUCCESS
        }
        Command::Resolve { name } => resolve(&name),
        Command::Node { spec } => over(init::enter(&spec)),
        Command::NodeInit { spec } => over(init::run(&spec)),
        Command::Web { task } => web::serve(&task),
        Command::Ask { task } => web::ask(&task),
        Command::Call { task } => web::call(&task),
        Command::Chat { task } => web::chat(&task),
        Command::WebLoad { task } => web::load(&task),
    }
}

fn resolve(name: &str) -> ExitCode {
    match (name, 0).to_socket_addrs() {
        Ok(found) => {
            found.for_each(|address| println!("{}", address.ip()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("pod-tool: {name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A node that ends has failed.
fn over(ended: anyhow::Result<()>) -> ExitCode {
    if let Err(error) = ended {
        eprintln!("pod-tool: {error:#}");
    }
    ExitCode::FAILURE
}

/// Every request runs on a thread of its own, so that a blocking one holds up no other.
fn serve() -> ExitCode {
    let objects: &'static Objects = Box::leak(Box::default());
    let output: &'static Mutex<io::Stdout> = Box::leak(Box::new(Mutex::new(io::stdout())));
    for line in io::stdin().lock().lines() {
        let call = line.and_then(|line| serde_json::from_str::<Call>(&line).map_err(io::Error::from));
        let Call { id, request } = match call {
            Ok(call) => call,
            Err(error) => {
                eprintln!("pod-tool: bad request: {error}");
                return ExitCode::FAILURE;
            }
        };
        std::thread::spawn(move || {
            let answer = Answer { id, outcome: perform(objects, request) };
            if let Err(error) = write_answer(output, &answer) {
                eprintln!("pod-tool: cannot answer: {error}");
            }
        });
    }
    ExitCode::SUCCESS
}

fn write_answer(output: &Mutex<io::Stdout>, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut output = objects::lock(output);
    output.write_all(&line)?;
    output.flush()
}

fn perform(objects: &'static Objects, request: Request) -> Result<Reply, CallFailure> {
    match request {
        Request::Open(open) => objects.add_opened(client::open(&open)?),
        Request::Dial(dial) => client::dial(&*objects.socket(dial.socket)?, &dial),
        Request::Names { socket } => Ok(Reply::Names(client::names(&*objects.socket(socket)?))),
        Request::Send { socket, text } => client::send(&*objects.socket(socket)?, &text),
        Request::Recv { socket, max, timeout_ms } => client::recv(&*objects.socket(socket)?, max, timeout_ms),
        Request::RecvLine { socket, timeout_ms } => client::recv_line(&*objects.socket(socket)?, timeout_ms),
        Request::SendBulk { socket, bytes, seed } => {
            client::send_bulk(&*objects.socket(socket)?, bytes, seed)
        }
        Request::RecvBulk { socket, bytes, seed, timeout_ms } => {
            client::recv_bulk(&*objects.socket(socket)?, bytes, seed, timeout_ms)
        }
        Request::ShutdownWrite { socket } => client::shutdown_write(&*objects.socket(socket)?),
        Request::Reset { socket } => client::reset(&*objects.take_socket(socket)?),
        Request::Close { socket } => {
            objects.close(socket);
            Ok(Reply::Done)
        }
        Request::SendTo { socket, to, text } => client::send_to(&*objects.socket(socket)?, to, &text),
        Request::RecvFrom { socket, timeout_ms } => client::recv_from(&*objects.socket(socket)?, timeout_ms),
        Request::ListenTcp(listen) => objects.add_server(server::listen_tcp(listen)?),
        Request::ListenUdp { on, name } => objects.add_server(server::listen_udp(on, name)?),
        Request::Accepted { socket } => {
            Ok(Reply::Accepted { connections: objects.server(socket)?.accepted() })
        }
        Request::Dns(query) => dns::query(&query),
        Request::GetAddrInfo { host } => get_addr_info(&host),
        Request::HttpGet { to, host, path, timeout_ms } => http::get(to, &host, &path, timeout_ms),
        Request::ForgeSyn { from, to } => forge::syn(from, to),
        Request::Capture => objects.add_capture(capture::start()?),
        Request::Captured { socket } => Ok(Reply::Packets { packets: objects.capture(socket)?.packets() }),
        Request::StartLoad(load) => Ok(objects.add_load(load::start(load))),
        Request::LoadReport { socket } => Ok(Reply::Load(objects.load(socket)?.report())),
        Request::StopLoad { socket } => Ok(Reply::Load(objects.take_load(socket)?.stop())),
    }
}

/// By the C library, whose resolver reads the pod's resolv.conf.
fn get_addr_info(host: &str) -> Result<Reply, CallFailure> {
    let found = (host, 0).to_socket_addrs().map_err(objects::failed("getaddrinfo"))?;
    let mut addresses: Vec<_> = found.map(|address| address.ip()).collect();
    addresses.dedup();
    Ok(Reply::Addresses { addresses })
}
