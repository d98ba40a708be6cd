//! How much traffic each priority class gets, by how many of its endpoints are well: as Envoy spreads it.
//!
//! Invariant: shares sum to 100, or are all 0 when nothing can be used.

/// Endpoints of one class, by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ClassHealth {
    pub(super) total: u32,
    pub(super) well: u32,
}

/// What one class gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ClassShare {
    /// Per cent of the traffic.
    pub(super) percent: u32,
    /// All of its endpoints are used, well or not.
    pub(super) in_panic: bool,
}

/// A class counts as well until fewer than 1 / 1.4 of its endpoints are.
const OVERPROVISIONING_PERCENT: u64 = 140;

/// Writes what each class gets. Below `panic_percent` of endpoints that are well, a class uses all it has, unless the classes together
/// can take everything; 0 is never.
pub(super) fn shares(classes: &[ClassHealth], panic_percent: u32, into: &mut Vec<ClassShare>) {
    into.clear();
    let health = |class: &ClassHealth| match class.total {
        0 => 0,
        total => (OVERPROVISIONING_PERCENT * u64::from(class.well) / u64::from(total)).min(100),
    };
    let sum: u64 = classes.iter().map(health).sum::<u64>().min(100);
    let panics = |class: &ClassHealth| {
        sum < 100
            && class.total > 0
            && u64::from(class.well) * 100 < u64::from(panic_percent) * u64::from(class.total)
    };
    if sum == 0 {
        // Nobody is well: all that may panic share by their size.
        let total: u64 =
            classes.iter().filter(|class| panics(class)).map(|class| u64::from(class.total)).sum();
        into.extend(classes.iter().map(|class| ClassShare {
            percent: if panics(class) { (u64::from(class.total) * 100 / total.max(1)) as u32 } else { 0 },
            in_panic: panics(class),
        }));
    } else {
        let mut left = 100;
        into.extend(classes.iter().map(|class| {
            let percent = (health(class) * 100 / sum).min(left);
            left -= percent;
            ClassShare { percent: percent as u32, in_panic: panics(class) }
        }));
    }
    // What rounding has left goes to the first that takes anything.
    let given: u32 = into.iter().map(|share| share.percent).sum();
    if let Some(first) = into.iter_mut().find(|share| share.percent > 0 || share.in_panic) {
        first.percent += 100 - given;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn percents(classes: &[(u32, u32)], panic_percent: u32) -> Vec<(u32, bool)> {
        let classes: Vec<_> =
            classes.iter().map(|(well, total)| ClassHealth { well: *well, total: *total }).collect();
        let mut into = Vec::new();
        shares(&classes, panic_percent, &mut into);
        into.iter().map(|share| (share.percent, share.in_panic)).collect()
    }

    #[test]
    fn traffic_spills_over_as_a_class_gets_worse() {
        for (well, first, second) in
            [(100, 100, 0), (72, 100, 0), (71, 99, 1), (50, 70, 30), (25, 35, 65), (0, 0, 100)]
        {
            let expected = vec![(first, false), (second, false)];
            assert_eq!(percents(&[(well, 100), (100, 100)], 50), expected, "{well}");
        }
    }

    #[test]
    fn what_is_left_is_shared_in_proportion_when_all_classes_together_are_not_enough() {
        assert_eq!(percents(&[(20, 100), (20, 100)], 0), [(50, false), (50, false)]);
        assert_eq!(percents(&[(5, 100), (0, 100), (0, 100)], 0), [(100, false), (0, false), (0, false)]);
    }

    #[test]
    fn panic_uses_all_endpoints_of_a_class_only_when_the_others_cannot_help() {
        assert_eq!(percents(&[(1, 10), (10, 10)], 50), [(14, false), (86, false)]);
        assert_eq!(percents(&[(1, 10), (1, 10)], 50), [(50, true), (50, true)]);
        assert_eq!(percents(&[(0, 10), (0, 30)], 50), [(25, true), (75, true)]);
        assert_eq!(percents(&[(1, 10)], 50), [(100, true)]);
        assert_eq!(percents(&[(5, 10)], 50), [(100, false)]);
    }

    #[test]
    fn without_panic_nobody_well_means_nobody_at_all() {
        assert_eq!(percents(&[(0, 3), (0, 2)], 0), [(0, false), (0, false)]);
        assert_eq!(percents(&[], 50), []);
    }

    proptest! {
        #[test]
        fn shares_sum_to_everything_or_nothing(
            classes in prop::collection::vec((0_u32..20, 0_u32..20), 0..6),
            panic_percent in 0_u32..=100,
        ) {
            let classes: Vec<_> = classes.iter().map(|(well, more)| (*well, well + more)).collect();
            let sum: u32 = percents(&classes, panic_percent).iter().map(|(percent, _)| percent).sum();
            let any_well = classes.iter().any(|(well, _)| *well > 0);
            prop_assert!(sum == 100 || (sum == 0 && !any_well), "{:?}", percents(&classes, panic_percent));
        }
    }
}
