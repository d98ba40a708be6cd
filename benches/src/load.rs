//! Owns the load program: one server and one client that exercise every path alike.
//!
//! Blocking sockets of the standard library and threads only (for many HTTP connections one `epoll`), so that what is
//! measured is the path and not the load program's own runtime. Every connection has TCP_NODELAY; every figure leaves a warm-up out.

pub mod client;
pub mod http;
pub mod server;
pub mod task;

use std::net::SocketAddr;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use client::Client;
use task::Task;

/// Load generator: start a server in one place and a client in another.
#[derive(Debug, Parser)]
#[command(
    name = "load",
    after_help = "Examples:\n  \
        load server --listen 0.0.0.0:7000\n  \
        load client --to 10.0.0.2:7000 rtt\n  \
        load client --to 10.0.0.2:7000 stream --write-bytes 1024 --connections 4 --window-ms 3000\n  \
        echo '{\"task\":\"requests\",\"connections\":4,\"warm_up_ms\":200,\"window_ms\":1000}' | load client --to 10.0.0.2:7000"
)]
pub struct Args {
    /// Run on this CPU only.
    #[arg(long, value_name = "N", global = true)]
    cpu: Option<usize>,
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Answer clients until killed. Prints "listening" once it does.
    Server {
        /// Where.
        #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:7000")]
        listen: SocketAddr,
        /// Where HTTP is answered, besides.
        #[arg(long, value_name = "ADDR")]
        http: Option<SocketAddr>,
    },
    /// Do one task, or without one those that come as JSON lines on standard input; each answer is a JSON
    /// line on standard output.
    Client {
        /// The server, or a service address in front of it. Repeated: connections go to each in turn.
        #[arg(long, value_name = "ADDR", required = true, value_delimiter = ',')]
        to: Vec<SocketAddr>,
        /// What to do.
        #[command(subcommand)]
        task: Option<Task>,
    },
}

/// Be the server or the client that `args` ask for.
///
/// # Errors
/// When the server cannot listen, the client's standard streams fail, or a task given as an argument failed.
pub fn run(args: Args) -> anyhow::Result<()> {
    if let Some(cpu) = args.cpu {
        let mut set = CpuSet::new();
        set.set(cpu)
            .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
            .with_context(|| format!("cannot stay on CPU {cpu}"))?;
    }
    match args.role {
        Role::Server { listen, http } => server::run(listen, http),
        Role::Client { to, task: Some(task) } => {
            let answer = Client::new(to).perform(&task)?;
            println!("{}", serde_json::to_string(&answer)?);
            Ok(())
        }
        Role::Client { to, task: None } => client::obey(to),
    }
}
