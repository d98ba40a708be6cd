//! The order of work, and that nothing is ever lost.

use proptest::prelude::*;

use super::*;
use crate::fixture::{identity, start};

const SECOND: Duration = Duration::from_secs(1);

fn pop_all(schedule: &mut Schedule, now: SystemTime) -> Vec<String> {
    std::iter::from_fn(|| schedule.pop(now)).map(|identity| identity.service_account.to_string()).collect()
}

fn with(accounts: &[&str]) -> Schedule {
    let mut schedule = Schedule::default();
    accounts.iter().for_each(|account| schedule.add(&identity(account), start()));
    schedule
}

#[test]
fn who_waits_comes_first_then_what_expires_then_the_rest_in_order_of_arrival() {
    let mut schedule = with(&["renewal"]);
    assert_eq!(pop_all(&mut schedule, start()), ["renewal"]);
    schedule.succeeded(&identity("renewal"), start(), start() + 10 * SECOND);
    for account in ["first", "second", "waited-for"] {
        schedule.add(&identity(account), start());
    }
    assert!(schedule.hurry(&identity("waited-for"), Priority::OnDemand, start()));
    assert!(!schedule.hurry(&identity("waited-for"), Priority::OnDemand, start()), "once is enough");
    assert_eq!(pop_all(&mut schedule, start() + 10 * SECOND), ["waited-for", "renewal", "first", "second"]);
}

#[test]
fn nothing_is_due_before_its_time() {
    let mut schedule = with(&["a"]);
    assert_eq!(schedule.next_due(start()), Some(start()));
    assert_eq!(pop_all(&mut schedule, start()), ["a"]);
    assert_eq!(schedule.next_due(start()), None, "it is being fetched");
    schedule.succeeded(&identity("a"), start(), start() + 100 * SECOND);
    assert_eq!(schedule.next_due(start()), Some(start() + 100 * SECOND));
    assert_eq!(schedule.pop(start() + 99 * SECOND), None);
    assert_eq!(schedule.pop(start() + 100 * SECOND), Some(identity("a")));
}

#[test]
fn pauses_double_up_to_a_minute_and_a_success_ends_that() {
    let mut schedule = with(&["a"]);
    let (mut now, mut pauses) = (start(), Vec::new());
    for _ in 0..9 {
        assert_eq!(schedule.pop(now), Some(identity("a")));
        let due = schedule.failed(&identity("a"), now, 1.0).unwrap();
        pauses.push(due.duration_since(now).unwrap().as_secs());
        now = due;
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    assert_eq!(schedule.failures(&identity("a")), 9);
    schedule.pop(now);
    schedule.succeeded(&identity("a"), now, now + SECOND);
    schedule.pop(now + SECOND);
    let due = schedule.failed(&identity("a"), now + SECOND, 0.0).unwrap();
    assert_eq!(due, now + 2 * SECOND, "half of a second would be less than the floor");
}

#[test]
fn demand_shortens_a_pause_but_not_below_the_floor() {
    let mut schedule = with(&["a"]);
    let mut now = start();
    for _ in 0..7 {
        schedule.pop(now);
        now = schedule.failed(&identity("a"), now, 1.0).unwrap();
    }
    schedule.pop(now);
    schedule.failed(&identity("a"), now, 1.0);
    assert!(schedule.hurry(&identity("a"), Priority::OnDemand, now));
    assert_eq!(schedule.next_due(now), Some(now + RETRY_FLOOR));
    assert!(schedule.pop(now + RETRY_FLOOR / 2).is_none());
    assert!(schedule.pop(now + RETRY_FLOOR).is_some());
}

#[test]
fn what_is_removed_never_comes_back() {
    let mut schedule = with(&["a", "b", "c"]);
    schedule.remove(&identity("a"));
    assert_eq!(schedule.pop(start()), Some(identity("b")));
    schedule.remove(&identity("b"));
    schedule.succeeded(&identity("b"), start(), start());
    assert_eq!(schedule.failed(&identity("b"), start(), 0.0), None);
    assert_eq!(pop_all(&mut schedule, start() + 1000 * SECOND), ["c"]);
}

#[derive(Clone, Debug)]
enum Step {
    Add(u8),
    Remove(u8),
    Hurry(u8, bool),
    Pop,
    Succeed(u8, u8),
    Fail(u8, f64),
    Pass(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..6_u8;
    prop_oneof![
        who.clone().prop_map(Step::Add),
        who.clone().prop_map(Step::Remove),
        (who.clone(), any::<bool>()).prop_map(|(who, demand)| Step::Hurry(who, demand)),
        Just(Step::Pop),
        (who.clone(), any::<u8>()).prop_map(|(who, life)| Step::Succeed(who, life)),
        (who, 0.0..=1.0).prop_map(|(who, spread)| Step::Fail(who, spread)),
        any::<u8>().prop_map(Step::Pass),
    ]
}

proptest! {
    /// Against a model that only knows who is wanted and who is handed out.
    #[test]
    fn each_wanted_identity_is_handed_out_once_at_a_time_and_always_again(
        steps in proptest::collection::vec(step(), 0..200),
    ) {
        let name = |who: u8| identity(&format!("a{who}"));
        let mut schedule = Schedule::default();
        let mut now = start();
        let (mut wanted, mut running) = (BTreeSet::new(), BTreeSet::new());
        for step in steps {
            match step {
                Step::Add(who) => {
                    schedule.add(&name(who), now);
                    wanted.insert(name(who));
                }
                Step::Remove(who) => {
                    schedule.remove(&name(who));
                    wanted.remove(&name(who));
                    running.remove(&name(who));
                }
                Step::Hurry(who, true) => _ = schedule.hurry(&name(who), Priority::OnDemand, now),
                Step::Hurry(who, false) => _ = schedule.hurry(&name(who), Priority::Expiring, now),
                Step::Pop => {
                    let due = schedule.next_due(now).is_some_and(|due| due <= now);
                    let popped = schedule.pop(now);
                    prop_assert_eq!(popped.is_some(), due);
                    if let Some(identity) = popped {
                        prop_assert!(wanted.contains(&identity));
                        prop_assert!(running.insert(identity), "handed out twice");
                    }
                }
                Step::Succeed(who, life) if running.remove(&name(who)) => {
                    schedule.succeeded(&name(who), now, now + Duration::from_secs(life.into()));
                }
                Step::Fail(who, spread) if running.remove(&name(who)) => {
                    let due = schedule.failed(&name(who), now, spread).unwrap();
                    prop_assert!(due >= now + RETRY_FLOOR && due <= now + RETRY_CEILING);
                }
                Step::Succeed(..) | Step::Fail(..) => {}
                Step::Pass(seconds) => now += Duration::from_secs(seconds.into()),
            }
        }
        let later = now + Duration::from_secs(1000);
        while let Some(identity) = schedule.pop(later) {
            prop_assert!(running.insert(identity));
        }
        prop_assert_eq!(running, wanted);
        prop_assert!(schedule.waiting.is_empty() && schedule.ready.is_empty());
    }
}
