//! Tables and properties of names and their times.

use proptest::prelude::*;

use super::*;
use crate::snapshot::{DnsEndpoint, DnsResolution, Name, Protocol, ServicePort};

const REFRESH: Duration = Duration::from_secs(60);

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn addrs(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn said(texts: &[&str], ttl: u64) -> Result<Said, Failure> {
    Ok(Said { addrs: addrs(texts), ttl: s(ttl) })
}

fn needing(names: &[&str]) -> Names {
    let mut all = Names::default();
    all.need(&names.iter().map(|name| Arc::from(*name)).collect(), s(0));
    all
}

fn state(names: &Names, name: &str) -> NameState {
    names.states().find(|state| &*state.name == name).unwrap()
}

fn take(names: &mut Names, at: u64, v4: Result<Said, Failure>, v6: Result<Said, Failure>) -> bool {
    names.due(s(at), 10);
    names.take("a.x", Answer { v4, v6 }, s(at), REFRESH)
}

#[test]
fn an_answer_is_good_for_its_time_within_bounds() {
    for (ttl, next) in [(0, 60), (30, 30), (100_000, 3600)] {
        let mut names = needing(&["a.x"]);
        assert_eq!(names.due(s(0), 10), ["a.x".into()]);
        assert_eq!(names.next_due(), None, "somebody asks");
        assert!(names.take("a.x", Answer { v4: said(&["192.0.2.1"], ttl), v6: said(&[], 5) }, s(0), REFRESH));
        assert_eq!(names.next_due(), Some(s(next)), "TTL {ttl}");
        assert!(names.due(s(next - 1), 10).is_empty());
        assert_eq!(names.due(s(next), 10).len(), 1);
    }
}

#[test]
fn failures_keep_the_last_good_addresses_and_wait_longer_each_time() {
    let mut names = needing(&["a.x"]);
    assert!(take(&mut names, 0, said(&["192.0.2.1"], 5), said(&["2001:db8::1"], 7)));
    let mut now = 5;
    for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
        assert!(!take(&mut names, now, Err(Failure::TimedOut), said(&[], 0)));
        assert_eq!(names.next_due(), Some(s(now + wait)));
        now += wait;
    }
    let failed = state(&names, "a.x");
    assert_eq!(failed.addrs, addrs(&["192.0.2.1", "2001:db8::1"]));
    assert_eq!(failed.failing, Some((Failure::TimedOut, 8)));
    assert!(!take(&mut names, now, said(&["192.0.2.1"], 5), said(&["2001:db8::1"], 7)), "the same as before");
    assert_eq!(state(&names, "a.x").failing, None);
}

#[test]
fn a_family_that_cannot_be_asked_for_keeps_what_it_had_and_one_that_is_empty_does_not() {
    let mut names = needing(&["a.x"]);
    take(&mut names, 0, said(&["192.0.2.1"], 5), said(&["2001:db8::1"], 5));
    assert!(take(&mut names, 5, said(&["192.0.2.2"], 5), Err(Failure::ServerFailure)));
    assert_eq!(state(&names, "a.x").addrs, addrs(&["192.0.2.2", "2001:db8::1"]));
    assert!(take(&mut names, 10, said(&["192.0.2.2"], 5), said(&[], 5)));
    assert_eq!(state(&names, "a.x").addrs, addrs(&["192.0.2.2"]));
}

#[test]
fn names_that_nobody_needs_are_forgotten_and_there_are_only_so_many() {
    let mut names = needing(&["a.x", "b.x"]);
    take(&mut names, 0, said(&["192.0.2.1"], 5), said(&[], 5));
    let many: BTreeSet<Arc<str>> = (0..NAMES_MAX + 3).map(|n| format!("{n}.x").into()).collect();
    names.need(&many, s(1));
    assert_eq!((names.states().count(), names.left_out()), (NAMES_MAX, 3));
    let late = Answer { v4: said(&["192.0.2.9"], 5), v6: said(&[], 5) };
    assert!(!names.take("a.x", late, s(2), REFRESH), "an answer for a name that is not needed any more");
}

fn service(one_at_a_time: bool) -> Service {
    let listed = Endpoint {
        addr: "192.0.2.1".parse().unwrap(),
        port: 8080,
        workload: None,
        ready: false,
        hostname: None,
        traits: None,
    };
    let port = |number, endpoints| ServicePort {
        name: "".into(),
        port: number,
        protocol: Protocol::Tcp,
        app_protocol: None,
        endpoints,
    };
    let name = DnsEndpoint { host: "a.x".into(), ports: vec![8080, 443], traits: None };
    Service {
        resolution: Resolution::Dns(DnsResolution { one_at_a_time, names: vec![name] }),
        ports: vec![port(80, vec![listed]), port(443, Vec::new())],
        ..Service::named(Name::new("a", "a.x"))
    }
}

#[test]
fn a_service_gets_all_addresses_or_the_first_of_each_family_at_the_targets_of_its_ports() {
    let mut names = needing(&["a.x"]);
    take(&mut names, 0, said(&["192.0.2.3", "192.0.2.1"], 5), said(&["2001:db8::1"], 5));
    let shown = |service: &Service| -> Vec<String> {
        let filled = names.fill(service).unwrap();
        filled
            .ports
            .iter()
            .flat_map(|p| &p.endpoints)
            .map(|e| format!("{} {}", e.socket_addr(), e.ready))
            .collect()
    };
    assert_eq!(
        shown(&service(false)),
        [
            "192.0.2.1:8080 false",
            "192.0.2.3:8080 true",
            "[2001:db8::1]:8080 true",
            "192.0.2.1:443 true",
            "192.0.2.3:443 true",
            "[2001:db8::1]:443 true"
        ]
    );
    assert_eq!(
        shown(&service(true)),
        [
            "192.0.2.1:8080 false",
            "192.0.2.3:8080 true",
            "[2001:db8::1]:8080 true",
            "192.0.2.3:443 true",
            "[2001:db8::1]:443 true"
        ]
    );
    let plain = Service { resolution: Resolution::Listed, ..service(true) };
    assert_eq!(names.fill(&plain), None);
}

proptest! {
    #[test]
    fn no_name_is_asked_for_twice_at_once_nor_too_soon(
        steps in prop::collection::vec((0_u64..100, 0_u8..4, 0_u64..200), 1..60),
    ) {
        let mut names = needing(&["a.x"]);
        let (mut now, mut last) = (s(0), None::<Duration>);
        for (wait, kind, ttl) in steps {
            now += s(wait);
            let due = names.due(now, 10);
            prop_assert!(names.due(now, 10).is_empty());
            if due.is_empty() {
                continue;
            }
            if let Some(last) = last {
                prop_assert!(now - last >= TTL_MIN);
            }
            last = Some(now);
            let v4 = match kind {
                0 => Err(Failure::TimedOut),
                1 => said(&[], ttl),
                _ => said(&["192.0.2.1"], ttl),
            };
            let before = state(&names, "a.x").addrs;
            names.take("a.x", Answer { v4, v6: Err(Failure::TimedOut) }, now, REFRESH);
            prop_assert!(state(&names, "a.x").addrs.len() >= before.len());
            let next = names.next_due().unwrap();
            prop_assert!(next > now && next <= now + TTL_MAX);
        }
    }
}
