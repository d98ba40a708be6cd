//! The demo's application: Bookinfo's four services and its visitors, as small real HTTP/1.1 programs.
//!
//! Services call each other by Kubernetes service name, resolved by the C library as any application's
//! names are; each request is a connection of its own, as with Bookinfo's Python and Ruby clients.

mod fetch;
mod ratings;
mod server;
mod services;
mod traffic;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::atomic::AtomicU64;

use clap::{Parser, Subcommand, ValueEnum};
use mesh_tests::bookinfo::PORT;

use services::Service;

#[derive(Debug, Parser)]
#[command(about = "Bookinfo, for the demo of Nodemesh")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Be one of the services.
    Serve {
        /// Which.
        #[arg(value_enum)]
        kind: Kind,
        /// The name of this pod, shown in answers.
        #[arg(long)]
        pod: String,
        /// Where to listen.
        #[arg(long, default_value_t = SocketAddr::from(([0u16; 8], PORT)))]
        listen: SocketAddr,
    },
    /// Visit the product page steadily and report as JSON lines.
    Visit {
        /// The service to visit.
        #[arg(long, default_value = "productpage")]
        host: String,
        /// Visits per second.
        #[arg(long, default_value_t = 20)]
        per_second: u32,
    },
}

/// A service, with its version where there are several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Productpage,
    Details,
    /// No ratings.
    ReviewsV1,
    /// Black stars.
    ReviewsV2,
    /// Red stars.
    ReviewsV3,
    Ratings,
    /// Says who answers, for the tasks that are not about books.
    HttpbinV1,
    /// Its second version.
    HttpbinV2,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bookinfo: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(async {
        match arguments.command {
            Command::Serve { kind, pod, listen } => {
                server::run(listen, Service { kind, pod, served: AtomicU64::new(0) }).await
            }
            Command::Visit { host, per_second } => traffic::run(&host, per_second).await,
        }
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bookinfo: {error}");
            ExitCode::FAILURE
        }
    }
}
