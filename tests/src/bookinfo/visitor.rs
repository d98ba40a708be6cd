//! Somebody in a pod who asks the services of the application, one request per connection, and looks closely at the answers.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::{ERROR_ATTRIBUTE, NO_RATINGS, NO_REVIEWS, VERSION_ATTRIBUTE};
use crate::{Connection, Pod, PodTool};

/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Somebody in a pod.
#[derive(Debug)]
pub struct Visitor {
    tool: PodTool,
}

/// An HTTP response.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Status line and headers.
    pub head: String,
    /// Its body.
    pub body: String,
    /// From the request to the end of the response, as far as it was waited for.
    pub took: Duration,
}

impl Answer {
    /// Whether it has this header with this value.
    #[must_use]
    pub fn has(&self, name: &str, value: &str) -> bool {
        self.head.lines().filter_map(|line| line.split_once(':')).any(|(own, own_value)| {
            own.eq_ignore_ascii_case(name) && own_value.trim().eq_ignore_ascii_case(value)
        })
    }

    /// What a product page shows: the version of its reviews (`v2`), `v2 without ratings`, `no reviews`, or the status.
    #[must_use]
    pub fn reviews(&self) -> String {
        if self.status != 200 {
            return format!("status {}", self.status);
        }
        let version = self.body.split_once(VERSION_ATTRIBUTE).and_then(|(_, rest)| rest.split_once('"'));
        match version {
            Some((version, _)) if self.body.contains(NO_RATINGS) => format!("{version} without ratings"),
            Some((version, _)) => version.to_owned(),
            None if self.body.contains(NO_REVIEWS) => "no reviews".to_owned(),
            None => "an incomplete page".to_owned(),
        }
    }

    /// Why a product page lacks something, as it says itself.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        let (_, rest) = self.body.split_once(ERROR_ATTRIBUTE)?;
        Some(rest.split_once('"')?.0)
    }
}

impl Visitor {
    /// Somebody in this pod.
    ///
    /// # Errors
    /// When the pod's tool cannot be started.
    pub fn new(pod: &Pod) -> anyhow::Result<Self> {
        Ok(Self { tool: pod.new_tool()? })
    }

    /// GET with further headers.
    ///
    /// # Errors
    /// When there is no response.
    pub fn get(
        &self,
        to: SocketAddr,
        host: &str,
        path: &str,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<Answer> {
        let mut all = self.at_once(1, to, host, path, headers)?;
        all.pop().context("one answer")
    }

    /// The same over `count` connections at once.
    ///
    /// # Errors
    /// When there is no response.
    pub fn at_once(
        &self,
        count: usize,
        to: SocketAddr,
        host: &str,
        path: &str,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<Vec<Answer>> {
        let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{lines}Connection: close\r\n\r\n");
        let open = (0..count).map(|_| self.tool.connect(to)).collect::<Result<Vec<Connection>, _>>()?;
        let began = Instant::now();
        for connection in &open {
            connection.send(&request)?;
        }
        open.iter().map(|connection| answer(connection, began)).collect()
    }
}

fn answer(connection: &Connection, began: Instant) -> anyhow::Result<Answer> {
    let mut text = String::new();
    loop {
        let piece = connection.recv_within(65_536, ANSWER_LIMIT)?;
        if piece.is_empty() {
            break;
        }
        text += &piece;
    }
    let status = text.get(9..12).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("no response: {text:?}"))?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    Ok(Answer { status, head: head.to_owned(), body: body.to_owned(), took: began.elapsed() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(status: u16, body: &str) -> Answer {
        let head = "HTTP/1.1 200 OK\r\nX-Envoy-Overloaded: true".to_owned();
        Answer { status, head, body: body.to_owned(), took: Duration::ZERO }
    }

    #[test]
    fn a_page_is_what_its_reviews_are() {
        let version = format!("<div {VERSION_ATTRIBUTE}v2\">");
        for (status, body, shown) in [
            (200, version.clone(), "v2"),
            (200, format!("{version}{NO_RATINGS}"), "v2 without ratings"),
            (200, NO_REVIEWS.to_owned(), "no reviews"),
            (200, "hello".to_owned(), "an incomplete page"),
            (503, version, "status 503"),
        ] {
            assert_eq!(page(status, &body).reviews(), shown, "{body}");
        }
        assert_eq!(page(200, &format!("<p {ERROR_ATTRIBUTE}why\">")).error(), Some("why"));
        assert!(page(200, "").has("x-envoy-overloaded", "true") && !page(200, "").has("server", "x"));
    }
}
