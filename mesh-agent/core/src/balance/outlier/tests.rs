//! Tests of ejection: what counts, for how long, and of how many.

use proptest::prelude::*;

use super::*;

fn rules() -> OutlierDetection {
    OutlierDetection {
        consecutive_5xx: Some(5),
        consecutive_gateway: None,
        consecutive_local: None,
        split_local: false,
        interval: Duration::from_secs(10),
        base_ejection: Duration::from_secs(30),
        max_ejection_percent: 100,
        min_health_percent: 0,
        error_statuses: Vec::new(),
    }
}

fn endpoint(index: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, index], 80))
}

const fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Feeds one endpoint of ten; how many observations it took to put it out.
fn until_out(rules: &OutlierDetection, observations: &[Observed]) -> Option<usize> {
    let mut detector = OutlierDetector::default();
    let out = |observed: &Observed| detector.observe(rules, at(0), endpoint(1), *observed, 10);
    observations.iter().position(out).map(|index| index + 1)
}

#[test]
fn s44_consecutive_failures_put_an_endpoint_out_and_a_success_starts_over() {
    use Observed::*;
    assert_eq!(until_out(&rules(), &[Status(500); 9]), Some(5));
    assert_eq!(until_out(&rules(), &[LocalFailure; 9]), Some(5));
    let broken = [
        Status(500),
        Status(500),
        Status(500),
        Status(500),
        Status(200),
        Status(500),
        LocalFailure,
        Status(503),
    ];
    assert_eq!(until_out(&rules(), &broken), None);
    assert_eq!(until_out(&rules(), &[Status(499); 20]), None);
    let mixed = [Status(500), LocalFailure, Status(599), Status(501), LocalFailure];
    assert_eq!(until_out(&rules(), &mixed), Some(5));
}

#[test]
fn s44_gateway_errors_have_a_count_of_their_own_and_count_as_5xx_too() {
    use Observed::*;
    let gateway = OutlierDetection { consecutive_gateway: Some(2), ..rules() };
    assert_eq!(until_out(&gateway, &[Status(503), Status(504)]), Some(2));
    assert_eq!(until_out(&gateway, &[Status(503), Status(500), Status(503), Status(500)]), None);
    assert_eq!(until_out(&gateway, &[Status(500); 5]), Some(5));
    let only = OutlierDetection { consecutive_5xx: None, ..gateway };
    assert_eq!(until_out(&only, &[Status(500); 20]), None);
    assert_eq!(until_out(&only, &[LocalFailure; 20]), Some(2));
}

#[test]
fn s44_zero_disables_a_count() {
    let off = OutlierDetection { consecutive_5xx: Some(0), ..rules() };
    assert_eq!(until_out(&off, &[Observed::Status(500); 50]), None);
    let none = OutlierDetection { max_ejection_percent: 0, ..rules() };
    assert_eq!(until_out(&none, &[Observed::Status(500); 50]), None);
}

#[test]
fn s44_failures_on_our_side_count_apart_only_when_they_are_split() {
    use Observed::*;
    let split = OutlierDetection { split_local: true, consecutive_local: Some(3), ..rules() };
    assert_eq!(until_out(&split, &[LocalFailure; 9]), Some(3));
    assert_eq!(
        until_out(&split, &[LocalFailure, LocalFailure, Status(200), LocalFailure, LocalFailure]),
        None
    );
    let without = OutlierDetection { split_local: true, ..rules() };
    assert_eq!(until_out(&without, &[LocalFailure; 50]), None);
    assert_eq!(until_out(&without, &[Status(500); 9]), Some(5));
}

#[test]
fn s44_listed_statuses_replace_5xx() {
    use Observed::*;
    let listed = OutlierDetection { error_statuses: vec![(429, 429), (502, 503)], ..rules() };
    assert_eq!(until_out(&listed, &[Status(429); 9]), Some(5));
    assert_eq!(until_out(&listed, &[Status(500); 9]), None);
    assert_eq!(until_out(&listed, &[Status(503); 9]), Some(5));
}

fn put_out(
    detector: &mut OutlierDetector,
    rules: &OutlierDetection,
    now: u64,
    index: u8,
    total: usize,
) -> bool {
    (0..5).any(|_| detector.observe(rules, at(now), endpoint(index), Observed::Status(500), total))
}

#[test]
fn e5_each_time_is_longer_and_time_well_spent_is_forgiven() {
    let rules = rules();
    let mut detector = OutlierDetector::default();
    let mut now = 0;
    // Out at `now`: back at the first sweep after `seconds`.
    let out_for = |detector: &mut OutlierDetector, now: &mut u64, seconds: u64| {
        assert!(put_out(detector, &rules, *now, 1, 3));
        let end = *now + seconds;
        while *now + 10 < end {
            *now += 10;
            assert!(detector.sweep(&rules, at(*now)).is_empty(), "back at {now}, not {end}");
            assert!(detector.is_out(endpoint(1)));
        }
        *now = end;
        assert_eq!(detector.sweep(&rules, at(*now)), [endpoint(1)]);
        assert!(!detector.is_out(endpoint(1)));
    };
    out_for(&mut detector, &mut now, 30);
    out_for(&mut detector, &mut now, 60);
    out_for(&mut detector, &mut now, 90);
    // Two intervals of health forgive two of three.
    for _ in 0..2 {
        now += 10;
        assert!(detector.sweep(&rules, at(now)).is_empty());
    }
    out_for(&mut detector, &mut now, 60);
    for _ in 0..20 {
        out_for(&mut detector, &mut now, 60 + 30);
        now += 10;
        assert!(detector.sweep(&rules, at(now)).is_empty());
    }
}

#[test]
fn e5_no_endpoint_is_out_longer_than_five_minutes_unless_the_first_time_is() {
    let mut detector = OutlierDetector::default();
    let mut now = 0;
    for _ in 0..30 {
        assert!(put_out(&mut detector, &rules(), now, 1, 3));
        now += EJECTION_MAX.as_secs();
        assert_eq!(detector.sweep(&rules(), at(now)), [endpoint(1)]);
    }
    let long = OutlierDetection { base_ejection: at(1000), ..rules() };
    let mut detector = OutlierDetector::default();
    assert!(put_out(&mut detector, &long, 0, 1, 3));
    assert!(detector.sweep(&long, at(999)).is_empty());
    assert_eq!(detector.sweep(&long, at(1009)), [endpoint(1)]);
}

#[test]
fn e5_one_may_always_be_out_and_more_only_within_the_share() {
    let tenth = OutlierDetection { max_ejection_percent: 10, ..rules() };
    let mut detector = OutlierDetector::default();
    assert!(put_out(&mut detector, &tenth, 0, 1, 3), "the only one");
    assert!(!put_out(&mut detector, &tenth, 0, 2, 3));
    let half = OutlierDetection { max_ejection_percent: 50, ..rules() };
    let mut detector = OutlierDetector::default();
    let out = (0..10).filter(|index| put_out(&mut detector, &half, 0, *index, 10)).count();
    assert_eq!(out, 5);
    assert_eq!(detector.out().count(), 5);
    // One that could not go out does so with the next failure once there is room.
    detector.keep_only(|addr| addr != endpoint(0));
    assert!(detector.observe(&half, at(0), endpoint(9), Observed::Status(500), 10));
}

#[test]
fn endpoints_that_are_gone_and_well_are_forgotten() {
    let mut detector = OutlierDetector::default();
    assert!(put_out(&mut detector, &rules(), 0, 1, 3));
    detector.keep_only(|_| false);
    assert!(!detector.is_out(endpoint(1)));
    assert!(detector.states.is_empty() && detector.out == 0);
    assert!(!detector.observe(&rules(), at(0), endpoint(2), Observed::Success, 3));
    assert!(detector.states.is_empty(), "a success leaves no trace");
}

#[test]
fn failures_of_an_endpoint_that_is_gone_are_forgotten_in_time() {
    let mut detector = OutlierDetector::default();
    detector.observe(&rules(), at(0), endpoint(1), Observed::Status(500), 3);
    assert!(detector.sweep(&rules(), at(299)).is_empty());
    assert_eq!(detector.states.len(), 1);
    assert!(detector.sweep(&rules(), at(309)).is_empty());
    assert!(detector.states.is_empty());
}

proptest! {
    #[test]
    fn the_share_holds_and_counts_agree_whatever_happens(
        events in prop::collection::vec((0_u8..6, 0_u8..4, 0_u64..20), 0..300),
        percent in 0_u32..=100,
    ) {
        let rules = OutlierDetection { consecutive_5xx: Some(2), max_ejection_percent: percent, ..rules() };
        let mut detector = OutlierDetector::default();
        let mut now = 0;
        for (index, what, later) in events {
            now += later;
            let observed = match what {
                0 => Observed::Success,
                1 => Observed::Status(500),
                2 => Observed::LocalFailure,
                _ => {
                    let before = detector.out().count();
                    let back = detector.sweep(&rules, at(now)).len();
                    prop_assert_eq!(detector.out().count() + back, before);
                    continue;
                }
            };
            detector.observe(&rules, at(now), endpoint(index), observed, 6);
            let out = detector.out().count();
            prop_assert_eq!(out, detector.out);
            let most = if percent == 0 { 0 } else { ((percent as usize * 6) / 100).max(1) };
            prop_assert!(out <= most, "{} of {}", out, most);
        }
    }
}

#[test]
fn what_is_remembered_of_an_endpoint_can_be_asked_for() {
    let mut detector = OutlierDetector::default();
    assert_eq!(detector.records().count(), 0);
    for _ in 0..3 {
        detector.observe(&rules(), at(7), endpoint(1), Observed::Status(503), 10);
    }
    let record = |detector: &OutlierDetector| detector.records().next();
    let failing = Record { failures: 3, ejections: 0, out_until: None };
    assert_eq!(record(&detector), Some((endpoint(1), failing)));
    for _ in 0..2 {
        detector.observe(&rules(), at(7), endpoint(1), Observed::Status(503), 10);
    }
    let out = Record { failures: 0, ejections: 1, out_until: Some(at(37)) };
    assert_eq!(record(&detector), Some((endpoint(1), out)));
}
