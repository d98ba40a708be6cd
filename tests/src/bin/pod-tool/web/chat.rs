//! WebSocket, both ends.

use futures_util::{SinkExt as _, StreamExt as _};
use mesh_tests::web::messages::Chat;
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use super::AnyError;

/// Send back what each client says.
pub(super) async fn serve(listener: TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            if let Err(error) = echo(stream).await {
                eprintln!("websocket: {error}");
            }
        });
    }
}

async fn echo(stream: TcpStream) -> Result<(), AnyError> {
    let mut socket = tokio_tungstenite::accept_async(stream).await?;
    while let Some(message) = socket.next().await {
        let message = message?;
        if message.is_text() || message.is_binary() {
            socket.send(message).await?;
        }
    }
    Ok(())
}

/// Say things, and return what is said back.
pub(super) async fn chat(chat: Chat) -> Result<Vec<String>, AnyError> {
    let stream = TcpStream::connect(chat.to).await?;
    let request = format!("ws://{}{}", chat.host, chat.path).into_client_request()?;
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await?;
    let mut answers = Vec::new();
    for message in chat.messages {
        socket.send(Message::text(message)).await?;
        match socket.next().await {
            Some(Ok(Message::Text(text))) => answers.push(text.to_string()),
            other => return Err(format!("instead of an answer: {other:?}").into()),
        }
    }
    socket.close(None).await?;
    // The other side closes, too.
    while let Some(Ok(_)) = socket.next().await {}
    Ok(answers)
}
