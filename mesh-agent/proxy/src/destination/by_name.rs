//! Servers that clients call by name (`DYNAMIC_DNS`, S50): what DNS says of the host of a request, or of the server name of TLS, asked for
//! when it is wanted.
//!
//! Invariants:
//! - Only names that the service's own wildcard covers are asked for, in the agent's own resolver.
//! - Names, lookups at once and what an answer is good for are bounded; one name too many is refused.
//! - What a stranger's DNS says leads neither to this pod, machine or link, nor to what only the mesh has, nor to its ports.
//! - A failure takes nothing away: the last good addresses of a name stay.
//!
//! Not here: which service is meant (`mesh_core::route::sight`), and whether its server takes the client ([`crate::server`]).

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mesh_core::{
    resolve::{Answer, Failure, NAMES_MAX, Said, TTL_MAX, TTL_MIN},
    snapshot::{Protocol, Resolution, Service, Snapshot},
};
use tokio::{sync::watch, task::spawn_local, time::Instant};

use crate::{
    connections::Live,
    dns::lookup::{Lookup, servers_of},
    hbone::server::RESERVED_PORTS,
    worker::Worker,
};

/// Lookups at once; requests for further names are refused.
const ASKING_MAX: usize = 64;
/// After a failure a name is asked for again when this time is over.
const FAILURE_TTL: Duration = Duration::from_secs(1);
/// Where the servers of the node are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Why a name leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Unresolved {
    /// The client did not say one.
    NoName,
    /// The service is for other names.
    OtherName,
    /// DNS has none, or did not say.
    Lookup(Failure),
    /// All of its addresses are such that names of others must not lead to.
    Refused,
    /// The port is one of the mesh's own.
    Port,
    /// As many names are asked for as may be.
    TooMany,
}

impl Unresolved {
    /// All of them.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let own = [Self::NoName, Self::OtherName, Self::Refused, Self::Port, Self::TooMany];
        own.into_iter().chain(Failure::ALL.map(Self::Lookup))
    }

    /// As metrics and logs have it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::NoName => "no_name",
            Self::OtherName => "other_name",
            Self::Lookup(failure) => failure.as_str(),
            Self::Refused => "refused_address",
            Self::Port => "refused_port",
            Self::TooMany => "too_many",
        }
    }
}

impl fmt::Display for Unresolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

type Outcome = Result<Arc<[IpAddr]>, Failure>;

#[derive(Debug)]
enum Entry {
    Known { outcome: Outcome, until: Instant },
    Asking { told: watch::Receiver<Option<Outcome>>, before: Option<Arc<[IpAddr]>> },
}

/// What is known of a name, or who will say it.
enum Begun {
    Known(Outcome),
    Asking(watch::Receiver<Option<Outcome>>),
}

/// What is known of names that clients said, for all workers.
#[derive(Debug, Default)]
pub(crate) struct CalledNames {
    lookup: Lookup,
    known: Mutex<HashMap<Arc<str>, Entry>>,
}

impl CalledNames {
    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Entry>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses of a name, as DNS has them or had them last.
    ///
    /// Cancel safety: a lookup that has begun goes on, for whoever asks next.
    async fn addresses(worker: &Worker, name: &str) -> Result<Arc<[IpAddr]>, Unresolved> {
        let mut told = match worker.shared().called_names.begin(worker, name)? {
            Begun::Known(outcome) => return outcome.map_err(Unresolved::Lookup),
            Begun::Asking(told) => told,
        };
        let outcome = match told.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            Err(_) => None,
        };
        outcome.unwrap_or(Err(Failure::TimedOut)).map_err(Unresolved::Lookup)
    }

    /// What is known of a name, or who will say it.
    fn begin(&self, worker: &Worker, name: &str) -> Result<Begun, Unresolved> {
        let mut known = self.lock();
        let now = Instant::now();
        let mut before = None;
        match known.get(name) {
            Some(Entry::Known { outcome, until }) if now < *until => {
                return Ok(Begun::Known(outcome.clone()));
            }
            Some(Entry::Known { outcome, .. }) => before = outcome.as_ref().ok().cloned(),
            // An error: nobody is left to say it.
            Some(Entry::Asking { told, .. }) if told.has_changed().is_ok() => {
                return Ok(Begun::Asking(told.clone()));
            }
            Some(Entry::Asking { before: last, .. }) => before.clone_from(last),
            None => {}
        }
        if known.values().filter(|entry| matches!(entry, Entry::Asking { .. })).count() >= ASKING_MAX {
            return Err(Unresolved::TooMany);
        }
        if known.len() >= NAMES_MAX {
            known.retain(|_, entry| !matches!(entry, Entry::Known { until, .. } if *until <= now));
        }
        if known.len() >= NAMES_MAX {
            return Err(Unresolved::TooMany);
        }
        let name: Arc<str> = name.into();
        let (tell, told) = watch::channel(None);
        known.insert(Arc::clone(&name), Entry::Asking { told: told.clone(), before });
        drop(spawn_local(ask(worker, name, tell)));
        Ok(Begun::Asking(told))
    }

    /// Takes in what DNS said; what is passed on.
    fn take(&self, name: &Arc<str>, answer: Answer, refresh: Duration) -> Outcome {
        let (outcome, ttl) = judge(answer, refresh);
        let mut known = self.lock();
        let before = match known.get_mut(name) {
            Some(Entry::Asking { before, .. }) => before.take(),
            _ => None,
        };
        let outcome = match (outcome, before) {
            (Err(_), Some(before)) => Ok(before),
            (outcome, _) => outcome,
        };
        let entry = Entry::Known { outcome: outcome.clone(), until: Instant::now() + ttl };
        known.insert(Arc::clone(name), entry);
        outcome
    }
}

/// The task of one lookup.
fn ask(
    worker: &Worker,
    name: Arc<str>,
    tell: watch::Sender<Option<Outcome>>,
) -> impl Future<Output = ()> + 'static {
    let shared = Arc::clone(worker.shared());
    let refresh = worker.snapshot().mesh().defaults.dns_refresh;
    async move {
        let own = &shared.settings.dns.upstream;
        let servers = match own.is_empty() {
            // Read each time: it changes when the node's network does.
            true => servers_of(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default()),
            false => own.clone(),
        };
        let answer = shared.called_names.lookup.addresses(&servers, &name).await;
        let outcome = shared.called_names.take(&name, answer, refresh);
        tell.send_replace(Some(outcome));
    }
}

/// What an answer comes to, and how long it is good for.
fn judge(answer: Answer, refresh: Duration) -> (Outcome, Duration) {
    let Answer { v4, v6 } = answer;
    let (mut addrs, mut ttls) = (Vec::new(), Vec::new());
    let mut failure = None;
    for family in [v4, v6] {
        match family {
            Ok(Said { addrs: said, ttl }) => {
                if !said.is_empty() {
                    ttls.push(if ttl.is_zero() { refresh } else { ttl });
                }
                addrs.extend(said);
            }
            Err(why) => failure = failure.or(Some(why)),
        }
    }
    if addrs.is_empty() {
        return (Err(failure.unwrap_or(Failure::NoAddress)), FAILURE_TTL);
    }
    let ttl = ttls.into_iter().min().unwrap_or(refresh);
    (Ok(addrs.into()), ttl.clamp(TTL_MIN, TTL_MAX))
}

/// Whether names of others must not lead there, whoever asks: this machine, its link, and addresses that nobody has outside.
fn is_private(addr: IpAddr) -> bool {
    match addr.to_canonical() {
        IpAddr::V4(v4) => {
            v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_broadcast()
                || v4.octets()[0] == 0
                // 240.0.0.0/4, which addresses of ServiceEntries are given from.
                || v4 >= Ipv4Addr::new(240, 0, 0, 0)
        }
        IpAddr::V6(v6) => {
            v6.is_loopback() || v6.is_unspecified() || v6.is_multicast() || v6.is_unicast_link_local()
        }
    }
}

/// Whether the wildcard of a service covers a name (lower case, without trailing dot).
fn covers(service: &Service, name: &str) -> bool {
    match service.hostname.as_deref().map(|host| (host, host.strip_prefix('*'))) {
        Some((_, Some(suffix))) => name.len() > suffix.len() && name.ends_with(suffix),
        Some((host, None)) => host == name,
        None => false,
    }
}

/// Whether a service's servers are called by name.
pub(crate) fn is_called(service: &Service) -> bool {
    service.resolution == Resolution::ByName
}

/// The addresses of a server that a client calls by name, those of the client's own family if there are any.
///
/// # Errors
/// Why there is none; counted.
pub(crate) async fn servers(
    worker: &Worker,
    snapshot: &Snapshot,
    service: &Service,
    live: &Live,
    name: Option<&str>,
    port: u16,
) -> Result<Vec<SocketAddr>, Unresolved> {
    let found = find(worker, snapshot, service, live, name, port).await;
    let counted = worker.metrics().called_name(found.as_ref().err().copied());
    counted.inc();
    if let Err(why) = &found
        && worker.may_log()
    {
        tracing::info!(
            pod = %live.pod.name,
            client = %live.client,
            name = name.unwrap_or_default(),
            service = %service.name,
            reason = why.as_str(),
            "a server that is called by name cannot be reached"
        );
    }
    found
}

async fn find(
    worker: &Worker,
    snapshot: &Snapshot,
    service: &Service,
    live: &Live,
    name: Option<&str>,
    port: u16,
) -> Result<Vec<SocketAddr>, Unresolved> {
    if RESERVED_PORTS.contains(&port) {
        return Err(Unresolved::Port);
    }
    let name =
        name.map(|name| name.trim_end_matches('.').to_ascii_lowercase()).filter(|name| !name.is_empty());
    let name = name.ok_or(Unresolved::NoName)?;
    if !covers(service, &name) {
        return Err(Unresolved::OtherName);
    }
    let addrs = CalledNames::addresses(worker, &name).await?;
    // A service that the client does not see is to it an address as any other; this node need not even know of it.
    let sight = snapshot.sight(live.pod.workload, &live.pod.name.namespace);
    let is_ours = |addr: IpAddr| {
        let service = snapshot.service_at(addr, port, Protocol::Tcp);
        live.pod.addrs.contains(&addr) || service.is_some_and(|(service, _)| sight.sees(service, port))
    };
    let mut servers: Vec<SocketAddr> = addrs
        .iter()
        .map(IpAddr::to_canonical)
        .filter(|addr| !is_private(*addr) && !is_ours(*addr))
        .map(|addr| SocketAddr::new(addr, port))
        .collect();
    if servers.is_empty() {
        return Err(Unresolved::Refused);
    }
    let v4 = live.client.ip().to_canonical().is_ipv4();
    if servers.iter().any(|server| server.is_ipv4() == v4) {
        servers.retain(|server| server.is_ipv4() == v4);
    }
    Ok(servers)
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::Name;

    use super::*;

    fn said(addrs: &[&str], ttl_s: u64) -> Result<Said, Failure> {
        let addrs = addrs.iter().map(|addr| addr.parse().unwrap()).collect();
        Ok(Said { addrs, ttl: Duration::from_secs(ttl_s) })
    }

    #[test]
    fn answers_are_good_for_the_shorter_time_within_bounds() {
        let refresh = Duration::from_secs(30);
        let ttl = |v4, v6| judge(Answer { v4, v6 }, refresh).1;
        assert_eq!(ttl(said(&["192.0.2.1"], 9), said(&["2001:db8::1"], 5)), Duration::from_secs(5));
        assert_eq!(
            ttl(said(&["192.0.2.1"], 9), said(&[], 1)),
            Duration::from_secs(9),
            "nothing lasts as it likes"
        );
        assert_eq!(ttl(said(&["192.0.2.1"], 0), said(&[], 0)), refresh);
        assert_eq!(ttl(said(&["192.0.2.1"], 1 << 30), said(&[], 0)), TTL_MAX);
        let (outcome, ttl) = judge(Answer { v4: Err(Failure::NoSuchName), v6: said(&[], 60) }, refresh);
        assert_eq!((outcome, ttl), (Err(Failure::NoSuchName), FAILURE_TTL));
    }

    #[test]
    fn names_of_others_lead_to_no_place_of_our_own() {
        for addr in [
            "127.0.0.1",
            "169.254.169.254",
            "0.1.2.3",
            "224.0.0.1",
            "240.240.1.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
        ] {
            assert!(is_private(addr.parse().unwrap()), "{addr}");
        }
        for addr in ["192.0.2.1", "10.0.0.1", "2001:db8::1"] {
            assert!(!is_private(addr.parse().unwrap()), "{addr}");
        }
    }

    #[test]
    fn only_names_that_the_wildcard_covers_are_asked_for() {
        let service = |host: &str| Service {
            hostname: Some(host.into()),
            ..Service::named(Name::new("default", host))
        };
        for (host, name, expected) in [
            ("*.example.com", "a.example.com", true),
            ("*.example.com", "a.b.example.com", true),
            ("*.example.com", ".example.com", false),
            ("*.example.com", "example.com", false),
            ("*.example.com", "a.example.com.evil.org", false),
            ("*.example.com", "169.254.169.254", false),
            ("a.example.com", "a.example.com", true),
        ] {
            assert_eq!(covers(&service(host), name), expected, "{host} {name}");
        }
    }
}
