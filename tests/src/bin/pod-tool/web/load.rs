//! A mixed load until standard input ends.

use std::cell::RefCell;
use std::io::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use http_body_util::BodyExt as _;
use mesh_tests::web::messages::{Ask, Mix, MixReport};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::LocalSet;
use tokio::time::{sleep, timeout};

use super::AnyError;
use super::ask::{Client, request};

/// A request that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(20);
/// How often is told what became of requests.
const REPORT: Duration = Duration::from_millis(200);

#[derive(Clone)]
struct Crowd {
    mix: Rc<Mix>,
    report: Rc<RefCell<MixReport>>,
    stopped: watch::Receiver<bool>,
}

pub(super) async fn run(mix: Mix) -> Result<(), AnyError> {
    let (stop, stopped) = watch::channel(false);
    std::thread::spawn(move || {
        // Ends with the harness, at the latest.
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).ok();
        stop.send(true).ok();
    });
    let crowd = Crowd { mix: Rc::new(mix), report: Rc::default(), stopped };
    let set = LocalSet::new();
    let mut clients = Vec::new();
    let mix = Rc::clone(&crowd.mix);
    for (kind, count) in [("keep-alive", mix.keep_alive), ("short", mix.short), ("http2", mix.http2)] {
        clients.extend((0..count).map(|_| set.spawn_local(crowd.clone().http(kind))));
    }
    if let Some((to, count)) = mix.tcp {
        clients.extend((0..count).map(|_| set.spawn_local(crowd.clone().tcp(to))));
    }
    let report = Rc::clone(&crowd.report);
    let print = move || -> Result<(), AnyError> {
        Ok(writeln!(std::io::stdout(), "{}", serde_json::to_string(&*report.borrow())?)?)
    };
    set.run_until(async {
        while !*crowd.stopped.borrow() {
            sleep(REPORT).await;
            print()?;
        }
        for client in clients {
            client.await?;
        }
        print()
    })
    .await
}

impl Crowd {
    fn is_over(&self) -> bool {
        *self.stopped.borrow()
    }

    fn count(&self, kind: &str, sent_us: u64, outcome: Result<String, String>) {
        let mut report = self.report.borrow_mut();
        *report.by_kind.entry(kind.to_owned()).or_default() += 1;
        match outcome {
            Ok(server) => {
                *report.by_server.entry(server.clone()).or_default() += 1;
                let newest = report.last_sent_us.entry(server.clone()).or_default();
                *newest = sent_us.max(*newest);
                let is_another = report.turns.last().is_none_or(|(_, last)| *last != server);
                if kind != "tcp" && is_another && report.turns.len() < MixReport::TURNS_MAX {
                    report.turns.push((now_us(), server));
                }
            }
            Err(why) => *report.failed.entry(format!("{kind}: {why}")).or_default() += 1,
        }
    }

    async fn http(self, kind: &'static str) {
        let mut client: Option<Client> = None;
        while !self.is_over() {
            if kind == "short" {
                client = None;
            }
            let sent_us = now_us();
            let outcome = timeout(LIMIT, self.one_or_again(&mut client, kind == "http2"));
            let outcome = outcome.await.unwrap_or_else(|_| Err("no answer in time".into()));
            if outcome.is_err() {
                client = None;
            }
            self.count(kind, sent_us, outcome.map_err(|error| told(&*error)));
            sleep(Duration::from_millis(self.mix.pause_ms)).await;
        }
    }

    /// One request, again if the server has said that it did not look at it, as clients of HTTP/2 do.
    async fn one_or_again(&self, client: &mut Option<Client>, is_http2: bool) -> Result<String, AnyError> {
        loop {
            let usable = client.take().filter(|client| !client.is_closed());
            let connection = match usable {
                Some(usable) => client.insert(usable),
                None => client.insert(Client::connect(self.mix.http, is_http2).await?),
            };
            match self.one(connection, is_http2).await {
                Err(error) if is_http2 && was_not_looked_at(&*error) => *client = None,
                outcome => return outcome,
            }
        }
    }

    async fn one(&self, client: &mut Client, is_http2: bool) -> Result<String, AnyError> {
        let ask = Ask::get(&self.mix.host, "/load");
        let response = client.send(request(&ask, is_http2)?).await?;
        let status = response.status();
        let server = response
            .headers()
            .get("x-server")
            .map(|name| String::from_utf8_lossy(name.as_bytes()).into_owned());
        let body = response.into_body().collect().await?.to_bytes();
        match server {
            Some(server) if status == 200 => Ok(server),
            _ => Err(format!("{status} {}", String::from_utf8_lossy(&body[..body.len().min(200)])).into()),
        }
    }

    /// One connection for a hundred lines, then another.
    async fn tcp(self, to: SocketAddr) {
        while !self.is_over() {
            let outcome = timeout(LIMIT, self.lines(to)).await;
            if let Err(error) = outcome.unwrap_or_else(|_| Err("no answer in time".into())) {
                self.count("tcp", now_us(), Err(told(&*error)));
                sleep(Duration::from_millis(self.mix.pause_ms)).await;
            }
        }
    }

    async fn lines(&self, to: SocketAddr) -> Result<(), AnyError> {
        let mut stream = TcpStream::connect(to).await?;
        for _ in 0..20 {
            stream.write_all(b"ping-").await?;
            let mut back = [0; 5];
            stream.read_exact(&mut back).await?;
            self.count("tcp", now_us(), Ok("tcp".to_owned()));
            sleep(Duration::from_millis(self.mix.pause_ms)).await;
        }
        Ok(())
    }
}

fn now_us() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// Whether a request was never sent, or was behind the last one that a GOAWAY without an error covers.
fn was_not_looked_at(error: &(dyn std::error::Error + 'static)) -> bool {
    let Some(error) = error.downcast_ref::<hyper::Error>() else { return false };
    let goes_away =
        std::error::Error::source(error).and_then(|source| source.downcast_ref::<h2::Error>()).is_some_and(
            |error| error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR),
        );
    error.is_canceled() || goes_away
}

fn told(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(at) = cause {
        text = format!("{text}: {at}");
        cause = at.source();
    }
    text
}
