//! Load balancing: algorithm, hash, locality, warm-up.

use std::{sync::Arc, time::Duration};

use mesh_core::route::cluster::{Algorithm, Distribution, HashKey, HashTable, Warmup};

use super::{LoadBalancer, LocalityLb};
use crate::{
    problem::Problems,
    resource::fields::{Node, Object},
};

/// Points of a ring unless it says otherwise (C3).
const RING: u64 = 1024;
/// Largest ring that Envoy makes.
const RING_MAX: i64 = 8 << 20;
/// Entries of a maglev table unless it says otherwise (C3).
const MAGLEV: u64 = 65_537;
/// Largest maglev table that Envoy makes.
const MAGLEV_MAX: i64 = 5_000_011;

/// Endpoints in the client's region for zones to play a part, unless it says otherwise (C9).
const MIN_CLUSTER_SIZE: u32 = 6;

/// Reads `loadBalancer`.
pub(super) fn read(object: &mut Object<'_>, problems: &mut Problems) -> Option<LoadBalancer> {
    let mut object = object.object("loadBalancer", problems)?;
    object.one_of(&["simple", "consistentHash"], problems);
    let simple = [
        ("UNSPECIFIED", Simple::Default),
        ("LEAST_REQUEST", Simple::LeastRequest),
        ("LEAST_CONN", Simple::LeastConn),
        ("ROUND_ROBIN", Simple::RoundRobin),
        ("RANDOM", Simple::Random),
        ("PASSTHROUGH", Simple::Passthrough),
    ];
    let simple = object.word("simple", &simple, problems).unwrap_or(Simple::Default);
    if simple == Simple::LeastConn {
        problems.warning(object.at("simple"), "is LEAST_CONN, which is now called LEAST_REQUEST");
    }
    let hash = object.object("consistentHash", problems).and_then(|hash| consistent_hash(hash, problems));
    let hashed = object.has("consistentHash");
    let warmup = warmup(&mut object, problems);
    if warmup.is_some() && (hashed || !simple.warms_up()) {
        let message = "has an effect only with LEAST_REQUEST and ROUND_ROBIN";
        let field = if object.has("warmup") { "warmup" } else { "warmupDurationSecs" };
        problems.error(object.at(field), message);
    }
    object.one_of(&["localityLbSetting", "zoneAwareLbSetting"], problems);
    let locality = locality(&mut object, problems);
    object.finish(problems);
    Some(LoadBalancer { algorithm: hash.unwrap_or_else(|| simple.algorithm()), locality, warmup })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Simple {
    Default,
    LeastRequest,
    LeastConn,
    RoundRobin,
    Random,
    Passthrough,
}

impl Simple {
    fn algorithm(self) -> Algorithm {
        match self {
            Self::Default | Self::LeastRequest | Self::LeastConn => Algorithm::LeastRequest,
            Self::RoundRobin => Algorithm::RoundRobin,
            Self::Random => Algorithm::Random,
            Self::Passthrough => Algorithm::Passthrough,
        }
    }

    fn warms_up(self) -> bool {
        !matches!(self, Self::Random | Self::Passthrough)
    }
}

fn consistent_hash(mut object: Object<'_>, problems: &mut Problems) -> Option<Algorithm> {
    const KEYS: [&str; 4] = ["httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName"];
    let which = object.one_of(&KEYS, problems);
    let header =
        object.text("httpHeaderName", problems).map(|name| HashKey::Header(name.to_ascii_lowercase().into()));
    let cookie = object.object("httpCookie", problems).and_then(|cookie| cookie_key(cookie, problems));
    let source = object.bool("useSourceIp", problems).filter(|on| *on).map(|_| HashKey::SourceIp);
    let query = object.shared("httpQueryParameterName", problems).map(HashKey::Query);
    let key = header.or(cookie).or(source).or(query);
    // `useSourceIp: false` is a key that hashes nothing; other mistakes have been noted by now.
    let unused = which == Some("useSourceIp") && key.is_none();
    if which.is_none() || unused {
        problems.error(
            object.path.as_str(),
            format!("says not what is hashed, wanted one of {}", KEYS.join(", ")),
        );
    }
    let table = table(&mut object, problems);
    object.finish(problems);
    Some(Algorithm::ConsistentHash { key: key?, table })
}

/// Reads `ringHash`, `maglev`, or the older `minimumRingSize`, which may not stand beside them (C3).
fn table(object: &mut Object<'_>, problems: &mut Problems) -> HashTable {
    object.one_of(&["ringHash", "maglev"], problems);
    let older =
        object.number("minimumRingSize", 0..=RING_MAX, problems).and_then(|size| u64::try_from(size).ok());
    if object.has("minimumRingSize") && (object.has("ringHash") || object.has("maglev")) {
        let message =
            "is of earlier versions and stands beside ringHash or maglev, wanted at most one of them";
        problems.error(object.at("minimumRingSize"), message);
    }
    let mut table = HashTable::Ring(older.filter(|size| *size != 0).unwrap_or(RING));
    if let Some(mut ring) = object.object("ringHash", problems) {
        let size =
            ring.number("minimumRingSize", 0..=RING_MAX, problems).and_then(|size| u64::try_from(size).ok());
        table = HashTable::Ring(size.filter(|size| *size != 0).unwrap_or(RING));
        ring.finish(problems);
    }
    if let Some(mut maglev) = object.object("maglev", problems) {
        let size =
            maglev.number("tableSize", 0..=MAGLEV_MAX, problems).and_then(|size| u64::try_from(size).ok());
        let size = size.filter(|size| *size != 0).unwrap_or(MAGLEV);
        if !is_prime(size) {
            problems.error(maglev.at("tableSize"), format!("is {size}, wanted a prime such as {MAGLEV}"));
        }
        table = HashTable::Maglev(size);
        maglev.finish(problems);
    }
    table
}

/// Whether a number of at most some millions is a prime.
fn is_prime(number: u64) -> bool {
    number > 1
        && (2..)
            .take_while(|divisor| divisor * divisor <= number)
            .all(|divisor| !number.is_multiple_of(divisor))
}

fn cookie_key(mut cookie: Object<'_>, problems: &mut Problems) -> Option<HashKey> {
    let name = cookie.shared("name", problems);
    if name.is_none() {
        problems.error(cookie.at("name"), "is missing, wanted the name of a cookie");
    }
    let path = cookie.shared("path", problems);
    let ttl = cookie.duration("ttl", problems);
    let mut attributes: Vec<(Arc<str>, Arc<str>)> = Vec::new();
    for mut attribute in cookie.objects("attributes", problems) {
        let name = attribute.shared("name", problems);
        if name.is_none() {
            problems
                .error(attribute.at("name"), "is missing, wanted the name of an attribute such as SameSite");
        }
        let value = attribute.shared("value", problems).unwrap_or_default();
        let is_fit = |text: &str| text.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b';');
        if !name.as_deref().is_none_or(is_fit) || !is_fit(&value) {
            problems.error(attribute.path.as_str(), "holds ';' or control characters, wanted none");
        }
        attributes.extend(name.map(|name| (name, value)));
        attribute.finish(problems);
    }
    if let Some(name) =
        name.as_deref().filter(|name| !name.bytes().all(|b| b.is_ascii_graphic() && !b"=;,\"".contains(&b)))
    {
        problems.error(cookie.at("name"), format!("is {name:?}, wanted the name of a cookie"));
    }
    if let Some(path) =
        path.as_deref().filter(|path| path.bytes().any(|b| !(0x20..0x7f).contains(&b) || b == b';'))
    {
        problems.error(
            cookie.at("path"),
            format!("is {path:?}, wanted a path without ';' and control characters"),
        );
    }
    cookie.finish(problems);
    Some(HashKey::Cookie { name: name?, path, ttl, attributes })
}

fn warmup(object: &mut Object<'_>, problems: &mut Problems) -> Option<Warmup> {
    object.one_of(&["warmup", "warmupDurationSecs"], problems);
    let least = Duration::from_millis(1);
    let older = object.duration_of("warmupDurationSecs", least, problems);
    let Some(mut warmup) = object.object("warmup", problems) else {
        return older.map(|duration| Warmup { duration, minimum_percent: 10.0, aggression: 1.0 });
    };
    let duration = warmup.duration_of("duration", least, problems);
    if !warmup.has("duration") {
        problems.error(warmup.at("duration"), "is missing, wanted a duration such as 60s");
    }
    let minimum_percent = warmup.float("minimumPercent", 0.0..=100.0, problems).unwrap_or(10.0);
    let aggression = warmup.float("aggression", 1.0..=f64::from(u32::MAX), problems).unwrap_or(1.0);
    warmup.finish(problems);
    Some(Warmup { duration: duration?, minimum_percent, aggression })
}

/// Reads `zoneAwareLbSetting`, which comes before `localityLbSetting` where there are both (C6–C9, S48).
pub(in crate::resource) fn locality(object: &mut Object<'_>, problems: &mut Problems) -> Option<LocalityLb> {
    let by_shares = object.object("localityLbSetting", problems).map(|setting| by_place(setting, problems));
    let by_zones = object.object("zoneAwareLbSetting", problems).map(|setting| by_zone(setting, problems));
    by_zones.or(by_shares)
}

fn by_zone(mut object: Object<'_>, problems: &mut Problems) -> LocalityLb {
    let min_size = object.count("minClusterSize", problems).unwrap_or(MIN_CLUSTER_SIZE);
    LocalityLb { zone_aware: Some(min_size), ..failover(object, problems) }
}

fn by_place(mut object: Object<'_>, problems: &mut Problems) -> LocalityLb {
    let distribute = distribute(&mut object, problems);
    let shares = object.at("distribute");
    let read = failover(object, problems);
    if !distribute.is_empty() && (!read.failover.is_empty() || !read.failover_priority.is_empty()) {
        let message = "is there beside failover or failoverPriority, wanted at most one of them";
        problems.error(shares, message);
    }
    LocalityLb { distribute, ..read }
}

/// What both settings have; the last fields that are read.
fn failover(mut object: Object<'_>, problems: &mut Problems) -> LocalityLb {
    let enabled = object.bool("enabled", problems).unwrap_or(true);
    let mut failover: Vec<(Arc<str>, Arc<str>)> = Vec::new();
    for mut entry in object.objects("failover", problems) {
        let from = entry.shared("from", problems);
        let to = entry.shared("to", problems);
        for (field, region) in [("from", &from), ("to", &to)] {
            match region.as_deref() {
                None => problems.error(entry.at(field), "is missing, wanted a region"),
                Some(region) if region.contains(['/', '*']) => {
                    problems.error(
                        entry.at(field),
                        format!("is {region:?}, wanted a region alone, without '/' and '*'"),
                    );
                }
                Some(_) => {}
            }
        }
        if from.is_some() && from == to {
            problems.error(entry.at("to"), "is the region it stands in for, wanted another");
        }
        failover.extend(from.zip(to));
        entry.finish(problems);
    }
    let mut failover_priority: Vec<(Arc<str>, Option<Arc<str>>)> = Vec::new();
    for (path, text) in object.texts("failoverPriority", problems) {
        let (key, value) = text.split_once('=').map_or((text, None), |(key, value)| (key, Some(value)));
        if key.is_empty() {
            problems.error(path, format!("is {text:?}, wanted KEY or KEY=VALUE of a label"));
            continue;
        }
        if failover_priority.iter().any(|(known, _)| **known == *key) {
            problems.error(path, format!("is for label {key:?}, which is there already"));
        }
        failover_priority.push((key.into(), value.map(Arc::from)));
    }
    object.finish(problems);
    LocalityLb { enabled, distribute: Vec::new(), failover, failover_priority, zone_aware: None }
}

fn distribute(object: &mut Object<'_>, problems: &mut Problems) -> Vec<Distribution> {
    let mut read: Vec<Distribution> = Vec::new();
    for mut entry in object.objects("distribute", problems) {
        let from = entry.shared("from", problems);
        match from.as_deref() {
            None => problems.error(entry.at("from"), "is missing, wanted a locality such as region/zone/*"),
            Some(from) => check_locality(from, &entry.at("from"), problems),
        }
        let mut to: Vec<(Arc<str>, u32)> = Vec::new();
        for (locality, node) in entry.entries("to", problems) {
            check_locality(locality, &node.path, problems);
            if let Some(weight) = weight(&node, problems) {
                if to.iter().any(|(other, _)| overlaps(other, locality)) {
                    problems
                        .error(node.path, "overlaps another locality of the same list, wanted them apart");
                }
                to.push((locality.into(), weight));
            }
        }
        let total: u64 = to.iter().map(|(_, weight)| u64::from(*weight)).sum();
        if total != 100 {
            problems.error(entry.at("to"), format!("has weights of {total} in all, wanted 100"));
        }
        if let Some(from) = from {
            if read.iter().any(|other| overlaps(&other.from, &from)) {
                problems.error(entry.at("from"), format!("is {from:?}, which overlaps an earlier entry"));
            }
            read.push(Distribution { from, to });
        }
        entry.finish(problems);
    }
    read
}

fn weight(node: &Node<'_>, problems: &mut Problems) -> Option<u32> {
    node.number(1..=100, problems).and_then(|weight| u32::try_from(weight).ok())
}

/// `region/zone/subzone`, where the last part that is given may be `*`.
fn check_locality(text: &str, path: &str, problems: &mut Problems) {
    let parts: Vec<&str> = text.split('/').collect();
    let (last, first) = match parts.split_last() {
        Some((last, first)) => (*last, first),
        None => ("", [].as_slice()),
    };
    let inner_fit = first.iter().all(|part| !part.is_empty() && !part.contains('*'));
    let last_fit = !last.is_empty() && (last == "*" || !last.contains('*'));
    if parts.len() > 3 || !inner_fit || !last_fit {
        let wanted = "wanted REGION, REGION/ZONE or REGION/ZONE/SUBZONE, with '*' at most as the last part";
        problems.error(path, format!("is {text:?}, {wanted}"));
    }
}

/// Whether two localities have one in common.
fn overlaps(left: &str, right: &str) -> bool {
    let (mut left, mut right) = (left.split('/'), right.split('/'));
    loop {
        match (left.next(), right.next()) {
            (Some("*") | None, _) | (_, Some("*") | None) => return true,
            (Some(left), Some(right)) if left != right => return false,
            _ => {}
        }
    }
}
