//! Web servers and clients: see `mesh_tests::web`.

mod ask;
mod chat;
mod grpc;
mod load;
mod server;

use std::io::Write as _;
use std::process::ExitCode;

use mesh_tests::web::messages::Serving;
use mesh_tests::web::{GRPC_PORT, HTTP_PORT, LISTENING, WEBSOCKET_PORT};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpListener;

/// What the web programs fail with.
pub(crate) type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Serve until SIGTERM, then finish what is under way.
pub(crate) fn serve(task: &str) -> ExitCode {
    run(task, |serving: Serving| async move {
        let listen = |port: u16| TcpListener::bind(std::net::SocketAddr::from(([0_u16; 8], port)));
        let http = listen(HTTP_PORT).await?;
        let websocket = listen(WEBSOCKET_PORT).await?;
        let grpc = listen(GRPC_PORT).await?;
        writeln!(std::io::stdout(), "{LISTENING}")?;
        tokio::spawn(chat::serve(websocket));
        tokio::spawn(grpc::serve(grpc, serving.name.clone()));
        server::serve(http, serving).await;
        Ok(())
    })
}

pub(crate) fn ask(task: &str) -> ExitCode {
    run(task, |script| async move { print(&ask::ask(&script).await) })
}

pub(crate) fn call(task: &str) -> ExitCode {
    run(task, |call| async move { print(&grpc::call(call).await?) })
}

pub(crate) fn chat(task: &str) -> ExitCode {
    run(task, |chat| async move { print(&chat::chat(chat).await?) })
}

pub(crate) fn load(task: &str) -> ExitCode {
    run(task, load::run)
}

fn print(answer: &impl Serialize) -> Result<(), AnyError> {
    Ok(writeln!(std::io::stdout(), "{}", serde_json::to_string(answer)?)?)
}

fn run<T: DeserializeOwned, F: Future<Output = Result<(), AnyError>>>(
    task: &str,
    work: impl FnOnce(T) -> F,
) -> ExitCode {
    let outcome = serde_json::from_str(task).map_err(AnyError::from).and_then(|task| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(work(task))
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pod-tool: {error}");
            ExitCode::FAILURE
        }
    }
}
