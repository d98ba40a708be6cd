//! Owns the log: what is logged, and in which form. It goes to standard error; standard output is for "ready".

use std::io;

use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::cli::LogFormat;

/// Why the log cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    /// The filter does not parse.
    #[error(
        "--log {filter:?} is not a level (error, warn, info, debug, trace) or a list such as info,mesh_proxy=debug"
    )]
    Filter {
        /// As given.
        filter: String,
        /// What the parser said.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Something else in the process set a subscriber first.
    #[error("install the log")]
    Install {
        /// What the library said.
        #[source]
        source: tracing_subscriber::util::TryInitError,
    },
}

/// Installs the process's log.
pub(crate) fn install(filter: &str, format: LogFormat) -> Result<(), LogError> {
    let filter_of = EnvFilter::try_new(filter)
        .map_err(|source| LogError::Filter { filter: filter.to_owned(), source })?;
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let layer = match format {
        LogFormat::Text => layer.with_ansi(false).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(filter_of))
        .try_init()
        .map_err(|source| LogError::Install { source })
}
