//! Endpoint choice. Here: power of two choices by outstanding requests, for connections that no resource says anything of. Beside it, what
//! a DestinationRule can ask for: [`Balancer`], [`OutlierDetector`], hashes ([`hash`]) and places ([`locality`]).
//!
//! Invariants:
//! - An endpoint that is not ready or not eligible is never picked.
//! - One that just failed (`exclude`) is picked only when no other is left.
//! - No allocation; the caller keeps the counts and brings the randomness.

mod balancer;
mod draws;
mod group;
pub mod hash;
pub mod locality;
pub mod outlier;
mod priority;
pub mod table;
pub mod zone;

use std::net::SocketAddr;

pub use balancer::{Ask, Balancer, Candidate, Client, Standing};
pub use draws::{Draws, below};
pub use outlier::OutlierDetector;

use crate::snapshot::Endpoint;

/// Outcome of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick<'a> {
    /// Dial this one.
    Endpoint(&'a Endpoint),
    /// Nothing ready: refuse the connection.
    NoEndpoint,
}

impl<'a> Pick<'a> {
    /// The endpoint, if there is one.
    pub fn endpoint(self) -> Option<&'a Endpoint> {
        match self {
            Self::Endpoint(endpoint) => Some(endpoint),
            Self::NoEndpoint => None,
        }
    }
}

impl Endpoint {
    /// Address and port in one, the endpoint's identity among the endpoints of a port.
    pub fn socket_addr(&self) -> SocketAddr {
        SocketAddr::new(self.addr, self.port)
    }
}

/// Draws two different ready endpoints and takes the one with fewer outstanding requests.
///
/// `draw` is one random word. `eligible` narrows the set first (family, other nodes only …); `load` is the number
/// of requests or connections outstanding at an endpoint. `exclude` lists addresses that failed in this attempt
/// series.
pub fn pick<'a>(
    endpoints: &'a [Endpoint],
    draw: u64,
    exclude: &[SocketAddr],
    eligible: impl Fn(&Endpoint) -> bool,
    load: impl Fn(&Endpoint) -> u32,
) -> Pick<'a> {
    let alive = |endpoint: &&Endpoint| endpoint.ready && eligible(endpoint);
    let fresh = |endpoint: &&Endpoint| alive(endpoint) && !exclude.contains(&endpoint.socket_addr());
    let picked = match two_choices(endpoints.iter().filter(fresh), draw, &load) {
        None if !exclude.is_empty() => two_choices(endpoints.iter().filter(alive), draw, &load),
        picked => picked,
    };
    picked.map_or(Pick::NoEndpoint, Pick::Endpoint)
}

fn two_choices<'a>(
    pool: impl Iterator<Item = &'a Endpoint> + Clone,
    draw: u64,
    load: &impl Fn(&Endpoint) -> u32,
) -> Option<&'a Endpoint> {
    let len = pool.clone().count() as u64;
    let (low, high) = (draw & u64::from(u32::MAX), draw >> 32);
    // Multiply-shift maps 32 random bits to 0..n with less bias than a remainder.
    let below = |bits: u64, n: u64| ((bits * n) >> 32) as usize;
    let first = match len {
        0 => return None,
        1 => return pool.clone().next(),
        _ => below(low, len),
    };
    // Drawn from the others: adding 1..len modulo len never lands on the first again.
    let second = (first + 1 + below(high, len - 1)) % len as usize;
    let (a, b) = (pool.clone().nth(first)?, pool.clone().nth(second)?);
    Some(if load(b) < load(a) { b } else { a })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn endpoint(last: u8, ready: bool) -> Endpoint {
        Endpoint {
            addr: [10, 0, 0, last].into(),
            port: 80,
            workload: None,
            ready,
            hostname: None,
            traits: None,
        }
    }

    fn all(_: &Endpoint) -> bool {
        true
    }

    #[test]
    fn nothing_ready_is_no_endpoint() {
        assert_eq!(pick(&[], 1, &[], all, |_| 0), Pick::NoEndpoint);
        assert_eq!(pick(&[endpoint(1, false)], 1, &[], all, |_| 0), Pick::NoEndpoint);
    }

    #[test]
    fn of_two_the_less_loaded_one_always_wins() {
        let two = [endpoint(1, true), endpoint(2, true)];
        for draw in [0, 1, u64::MAX, 1 << 31, 1 << 63] {
            let picked = pick(&two, draw, &[], all, |e| if *e == two[0] { 3 } else { 2 });
            assert_eq!(picked, Pick::Endpoint(&two[1]));
        }
    }

    #[test]
    fn equal_loads_share_evenly() {
        let endpoints: Vec<Endpoint> = (1..=5).map(|i| endpoint(i, true)).collect();
        let mut counts: HashMap<SocketAddr, u32> = HashMap::new();
        let mut word = 1_u64;
        for _ in 0..50_000 {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let mixed = (word ^ (word >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let picked = pick(&endpoints, mixed, &[], all, |_| 0).endpoint().unwrap();
            *counts.entry(picked.socket_addr()).or_default() += 1;
        }
        for count in counts.values() {
            assert!((9_000..11_000).contains(count), "{counts:?}");
        }
        assert_eq!(counts.len(), 5);
    }

    #[test]
    fn the_last_one_left_is_retried_even_if_it_failed() {
        let only = [endpoint(1, true), endpoint(2, false)];
        assert_eq!(pick(&only, 9, &[only[0].socket_addr()], all, |_| 0), Pick::Endpoint(&only[0]));
    }

    proptest! {
        #[test]
        fn never_unready_never_ineligible_and_excluded_only_as_a_last_resort(
            ready in prop::collection::vec(any::<bool>(), 0..12),
            allowed in prop::collection::vec(any::<bool>(), 12),
            failed in prop::collection::vec(any::<bool>(), 12),
            loads in prop::collection::vec(0_u32..4, 12),
            draw in any::<u64>(),
        ) {
            let endpoints: Vec<Endpoint> = ready.iter().zip(0..).map(|(r, i)| endpoint(i, *r)).collect();
            let index = |e: &Endpoint| match e.addr {
                std::net::IpAddr::V4(v4) => usize::from(v4.octets()[3]),
                std::net::IpAddr::V6(_) => usize::MAX,
            };
            let exclude: Vec<SocketAddr> =
                endpoints.iter().filter(|e| failed[index(e)]).map(Endpoint::socket_addr).collect();
            let live = |e: &&Endpoint| e.ready && allowed[index(e)];
            match pick(&endpoints, draw, &exclude, |e| allowed[index(e)], |e| loads[index(e)]) {
                Pick::NoEndpoint => prop_assert_eq!(endpoints.iter().filter(live).count(), 0),
                Pick::Endpoint(picked) => {
                    prop_assert!(live(&picked));
                    let fresh = endpoints.iter().filter(live).filter(|e| !failed[index(e)]).count();
                    prop_assert!(!failed[index(picked)] || fresh == 0);
                    // Of two different candidates the heavier is never taken, so the heaviest alone never is.
                    let peers: Vec<_> = endpoints.iter().filter(live)
                        .filter(|e| fresh == 0 || !failed[index(e)]).collect();
                    let lighter = peers.iter().filter(|e| loads[index(e)] < loads[index(picked)]).count();
                    prop_assert!(peers.len() == 1 || lighter < peers.len() - 1);
                }
            }
        }
    }
}
