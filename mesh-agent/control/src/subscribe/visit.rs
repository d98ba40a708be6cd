//! Owns a link to a controller without an agent behind it: the same connection, proof, requests and answers, for programs that look at
//! what a controller says. It is not kept: when it ends, it has ended.

use std::sync::Arc;

use mesh_identity::clock::SystemClock;

use super::{
    ServiceAccountOptions, StartError,
    channel::{self, ConnectError},
    credentials::CredentialError,
    of_service_account,
    store::Holder,
    stream::{Received, Stream, StreamError},
};

/// Why there is no link, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum VisitError {
    /// The options.
    #[error(transparent)]
    Options(#[from] StartError),
    /// A file of them.
    #[error(transparent)]
    Credentials(#[from] CredentialError),
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The stream.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// An open link.
#[derive(Debug)]
pub struct Visit {
    stream: Stream,
}

impl Visit {
    /// Connects as the agent of a node does, and asks for everything that `holder` does not hold. The folder for the state is not used.
    ///
    /// # Errors
    /// No connection, or a refusal.
    pub async fn begin(options: &ServiceAccountOptions, holder: &impl Holder) -> Result<Self, VisitError> {
        let credentials = of_service_account(options, Arc::new(SystemClock))?;
        let (tls, name) = (credentials.client_config()?, credentials.server_name());
        let channel = channel::connect(&options.controller, tls, name).await?;
        Ok(Self { stream: Stream::open(channel, &credentials, holder).await? })
    }

    /// Waits for the next message, lets `holder` take it and answers it.
    ///
    /// Cancel safe: it waits for the message alone.
    ///
    /// # Errors
    /// The link has ended.
    pub async fn next(&mut self, holder: &mut impl Holder) -> Result<Received, VisitError> {
        Ok(self.stream.next(holder).await?)
    }
}
