//! Where clients and endpoints are, and which endpoints a client prefers for it (C6–C9, S48, S49).

use std::{borrow::Cow, sync::Arc};

use crate::{
    route::{
        cluster::{Distribution, Locality},
        defaults,
        scope::{Labels, NO_LABELS},
    },
    snapshot::{Endpoint, Snapshot, Traits, Workload},
};

/// Where something runs; what is not known is empty.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Place {
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// Subzone.
    pub subzone: Arc<str>,
    /// Node.
    pub node: Arc<str>,
    /// Network.
    pub network: Arc<str>,
}

impl Place {
    /// Reads `region/zone/subzone`; missing parts are empty.
    pub fn parse(text: &str) -> Self {
        let mut parts = text.splitn(3, '/');
        let mut part = || parts.next().unwrap_or_default().into();
        Self { region: part(), zone: part(), subzone: part(), ..Self::default() }
    }

    /// `region/zone/subzone` as far as they are known; `None` if no region is.
    pub fn locality(&self) -> Option<String> {
        let parts = [&self.region, &self.zone, &self.subzone];
        let known: Vec<&str> =
            parts.into_iter().map(|part| &**part).take_while(|part| !part.is_empty()).collect();
        (!known.is_empty()).then(|| known.join("/"))
    }

    /// Where an endpoint is: what a resource says of it comes before where its workload is.
    pub fn of_endpoint<'a>(workload: Option<&'a Workload>, traits: Option<&Traits>) -> Cow<'a, Self> {
        let own = workload.map_or_else(Cow::default, |workload| Cow::Borrowed(&workload.place));
        let Some(traits) = traits.filter(|traits| traits.locality.is_some() || traits.network.is_some())
        else {
            return own;
        };
        let mut place = own.into_owned();
        if let Some(locality) = &traits.locality {
            let Self { region, zone, subzone, .. } = Self::parse(locality);
            place = Self { region, zone, subzone, ..place };
        }
        if let Some(network) = &traits.network {
            place.network = Arc::clone(network);
        }
        Cow::Owned(place)
    }

    /// Whether nothing is known of it.
    pub fn is_unknown(&self) -> bool {
        *self == Self::default()
    }

    /// What a topology label says of the place, for one that its workload does not carry itself.
    fn label(&self, key: &str) -> Option<&Arc<str>> {
        let part = match key {
            "topology.kubernetes.io/region" => &self.region,
            "topology.kubernetes.io/zone" => &self.zone,
            "topology.istio.io/subzone" => &self.subzone,
            "topology.istio.io/network" => &self.network,
            "kubernetes.io/hostname" => &self.node,
            _ => return None,
        };
        (!part.is_empty()).then_some(part)
    }

    /// Whether a `region/zone/subzone` means this place; missing parts and `*` mean any.
    pub fn is_in(&self, pattern: &str) -> bool {
        let own = [&self.region, &self.zone, &self.subzone];
        pattern.splitn(3, '/').zip(own).all(|(part, own)| matches!(part, "" | "*") || *part == **own)
    }
}

/// A client or an endpoint as far as preference goes.
#[derive(Clone, Copy, Debug)]
pub struct Located<'a> {
    /// Where it is.
    pub place: &'a Place,
    /// Labels of its workload.
    pub labels: &'a Labels,
}

impl<'a> Located<'a> {
    fn label(&self, key: &str) -> Option<&'a Arc<str>> {
        self.labels.get(key).or_else(|| self.place.label(key))
    }
}

/// The nearest of a service's endpoints, for a service that says what near is.
#[derive(Clone, Debug)]
pub struct Nearest {
    locality: Locality,
    here: Place,
    rank: u32,
}

impl Nearest {
    /// Those of `endpoints` that are nearest to `here`.
    pub fn of<'e>(
        snapshot: &Snapshot,
        distribution: defaults::Distribution,
        here: &Place,
        endpoints: impl Iterator<Item = &'e Endpoint>,
    ) -> Self {
        let mut nearest = Self { locality: distribution.locality(), here: here.clone(), rank: u32::MAX };
        nearest.rank =
            endpoints.map(|endpoint| nearest.rank_of(snapshot, endpoint)).min().unwrap_or(u32::MAX);
        nearest
    }

    /// Whether an endpoint is as near as those are.
    pub fn has(&self, snapshot: &Snapshot, endpoint: &Endpoint) -> bool {
        self.rank_of(snapshot, endpoint) <= self.rank
    }

    fn rank_of(&self, snapshot: &Snapshot, endpoint: &Endpoint) -> u32 {
        // Labels of pods play no part: the places say it all, and the client may be any of the node's.
        let Locality::Failover { labels, .. } = &self.locality else { return 0 };
        let workload = snapshot.workload_of(endpoint).map(|workload| &**workload);
        let place = Place::of_endpoint(workload, endpoint.traits.as_deref());
        let located = |place| Located { place, labels: &NO_LABELS };
        rank_by_labels(labels, &located(&self.here), &located(&place))
    }
}

/// What a client's location makes of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Preference {
    /// In the class of this rank; lower ones first. Ranks may have gaps.
    Class(u32),
    /// In the group of this place in the list of shares, which has this weight.
    Share { group: usize, weight: u32 },
    /// Gets nothing.
    Nothing,
}

/// How a locality setting judges endpoints for one client.
#[derive(Debug)]
pub(super) enum Judge<'a> {
    All,
    Distribute(&'a Distribution),
    Failover { to: Option<&'a str>, labels: &'a [(Arc<str>, Option<Arc<str>>)], by: By },
}

/// What of a place makes classes, within those of labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    Nothing,
    /// Region, zone and subzone.
    All,
    /// The region: zones have shares of it.
    Region,
}

impl<'a> Judge<'a> {
    /// Failover needs outlier detection, or to be forced.
    pub(super) fn new(locality: &'a Locality, client: &Located<'_>, has_outlier_detection: bool) -> Self {
        let stand_in = |regions: &'a [(Arc<str>, Arc<str>)]| {
            regions.iter().find(|(from, _)| *from == client.place.region).map(|(_, to)| &**to)
        };
        match locality {
            Locality::Anywhere => Self::All,
            Locality::Distribute(distributions) => distributions
                .iter()
                .find(|distribution| client.place.is_in(&distribution.from))
                .map_or(Self::All, Self::Distribute),
            Locality::Failover { forced: false, .. } if !has_outlier_detection => Self::All,
            Locality::Failover { regions, labels, .. } => {
                let is_by_place = labels.is_empty() || !regions.is_empty();
                let by = if is_by_place { By::All } else { By::Nothing };
                Self::Failover { to: stand_in(regions), labels, by }
            }
            Locality::ZoneAware { regions, labels, .. } => {
                Self::Failover { to: stand_in(regions), labels, by: By::Region }
            }
        }
    }

    pub(super) fn judge(&self, client: &Located<'_>, endpoint: &Located<'_>) -> Preference {
        match self {
            Self::All => Preference::Class(0),
            Self::Distribute(distribution) => {
                distribution.to.iter().enumerate().find(|(_, (place, _))| endpoint.place.is_in(place)).map_or(
                    Preference::Nothing,
                    |(group, (_, weight))| Preference::Share { group, weight: *weight },
                )
            }
            Self::Failover { to, labels, by } => {
                let by_labels = rank_by_labels(labels, client, endpoint);
                // Five classes of regions lie between two of labels (S49).
                let region = match by {
                    By::Nothing => 0,
                    By::Region if client.place.region == endpoint.place.region => 0,
                    By::All | By::Region => rank_by_region(*to, client.place, endpoint.place),
                };
                Preference::Class(if labels.is_empty() { region } else { by_labels * 5 + region })
            }
        }
    }
}

/// Labels that agree before the first that does not make the class (C8).
fn rank_by_labels(
    labels: &[(Arc<str>, Option<Arc<str>>)],
    client: &Located<'_>,
    endpoint: &Located<'_>,
) -> u32 {
    let agrees = |(key, value): &&(Arc<str>, Option<Arc<str>>)| match value {
        Some(value) => endpoint.label(key) == Some(value),
        None => endpoint.label(key) == client.label(key),
    };
    labels.iter().skip_while(agrees).count() as u32
}

/// C7.
fn rank_by_region(to: Option<&str>, client: &Place, endpoint: &Place) -> u32 {
    if client.region != endpoint.region {
        return if to.is_some_and(|to| *to != *endpoint.region) { 4 } else { 3 };
    }
    match (client.zone == endpoint.zone, client.subzone == endpoint.subzone) {
        (true, true) => 0,
        (true, false) => 1,
        (false, _) => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locality_is_written_as_far_as_it_is_known() {
        for (text, shown) in
            [("eu/a/1", Some("eu/a/1")), ("eu/a", Some("eu/a")), ("eu", Some("eu")), ("", None)]
        {
            assert_eq!(Place::parse(text).locality().as_deref(), shown);
        }
    }

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    fn judge(locality: &Locality, outlier: bool, client: &str, endpoint: &str) -> Preference {
        let none = Labels::new();
        let (client, endpoint) = (Place::parse(client), Place::parse(endpoint));
        let client = Located { place: &client, labels: &none };
        let endpoint = Located { place: &endpoint, labels: &none };
        Judge::new(locality, &client, outlier).judge(&client, &endpoint)
    }

    fn failover(regions: &[(&str, &str)], labels: &[(&str, Option<&str>)], forced: bool) -> Locality {
        Locality::Failover {
            regions: regions.iter().map(|(from, to)| ((*from).into(), (*to).into())).collect(),
            labels: labels.iter().map(|(key, value)| ((*key).into(), value.map(Into::into))).collect(),
            forced,
        }
    }

    #[test]
    fn c7_nearer_places_come_first_and_the_region_to_fail_over_to_before_others() {
        let plain = failover(&[], &[], false);
        let directed = failover(&[("eu", "us")], &[], false);
        for (endpoint, by_default, by_direction) in [
            ("eu/a/1", 0, 0),
            ("eu/a/2", 1, 1),
            ("eu/b/1", 2, 2),
            ("us/a/1", 3, 3),
            ("asia/a/1", 3, 4),
            ("", 3, 4),
        ] {
            assert_eq!(judge(&plain, true, "eu/a/1", endpoint), Preference::Class(by_default), "{endpoint}");
            assert_eq!(
                judge(&directed, true, "eu/a/1", endpoint),
                Preference::Class(by_direction),
                "{endpoint}"
            );
        }
        assert_eq!(judge(&directed, true, "us/a/1", "asia/a/1"), Preference::Class(3));
    }

    #[test]
    fn s49_failover_needs_outlier_detection_unless_it_is_forced() {
        let far = |locality, outlier| judge(&locality, outlier, "eu/a/1", "us/a/1");
        assert_eq!(far(failover(&[], &[], false), false), Preference::Class(0));
        assert_eq!(far(failover(&[], &[], false), true), Preference::Class(3));
        assert_eq!(far(failover(&[], &[], true), false), Preference::Class(3));
    }

    #[test]
    fn c8_labels_count_until_the_first_that_does_not_agree() {
        let locality = failover(&[], &[("network", None), ("version", Some("v1")), ("zone", None)], true);
        let here = Place::default();
        let client_labels = labels(&[("network", "n1"), ("version", "v9"), ("zone", "a")]);
        let client = Located { place: &here, labels: &client_labels };
        for (own, class) in [
            (labels(&[("network", "n1"), ("version", "v1"), ("zone", "a")]), 0),
            (labels(&[("network", "n1"), ("version", "v1"), ("zone", "b")]), 1),
            (labels(&[("network", "n1"), ("version", "v9"), ("zone", "a")]), 2),
            (labels(&[("network", "n2"), ("version", "v1"), ("zone", "a")]), 3),
            (labels(&[]), 3),
        ] {
            let endpoint = Located { place: &here, labels: &own };
            let rank = Judge::new(&locality, &client, false).judge(&client, &endpoint);
            assert_eq!(rank, Preference::Class(class * 5), "{own:?}");
        }
    }

    #[test]
    fn s49_regions_decide_within_a_class_of_labels_if_both_are_given() {
        let locality = failover(&[("eu", "us")], &[("version", None)], true);
        let places = [Place::parse("eu/a/1"), Place::parse("us/a/1"), Place::parse("asia/a/1")];
        let v1 = labels(&[("version", "v1")]);
        let v2 = labels(&[("version", "v2")]);
        let client = Located { place: &places[0], labels: &v1 };
        let rank = |place, labels| match Judge::new(&locality, &client, false)
            .judge(&client, &Located { place, labels })
        {
            Preference::Class(rank) => rank,
            other => panic!("{other:?}"),
        };
        assert_eq!([rank(&places[0], &v1), rank(&places[1], &v1), rank(&places[2], &v1)], [0, 3, 4]);
        assert_eq!([rank(&places[0], &v2), rank(&places[1], &v2), rank(&places[2], &v2)], [5, 8, 9]);
    }

    #[test]
    fn b9_topology_labels_are_known_from_the_place() {
        let locality = failover(
            &[],
            &[("topology.kubernetes.io/region", None), ("topology.kubernetes.io/zone", None)],
            true,
        );
        let rank = |endpoint| judge(&locality, false, "eu/a", endpoint);
        assert_eq!(rank("eu/a"), Preference::Class(0));
        assert_eq!(rank("eu/b"), Preference::Class(5));
        assert_eq!(rank("us/a"), Preference::Class(10));
    }

    #[test]
    fn c6_the_first_from_that_covers_the_client_shares_out_and_the_rest_gets_nothing() {
        let to =
            |pairs: &[(&str, u32)]| pairs.iter().map(|(place, weight)| ((*place).into(), *weight)).collect();
        let locality = Locality::Distribute(vec![
            Distribution { from: "eu/a/*".into(), to: to(&[("eu/a/*", 80), ("eu/b/*", 20)]) },
            Distribution { from: "eu/*".into(), to: to(&[("eu/*", 100)]) },
        ]);
        let share = |group, weight| Preference::Share { group, weight };
        assert_eq!(judge(&locality, false, "eu/a/1", "eu/a/2"), share(0, 80));
        assert_eq!(judge(&locality, false, "eu/a/1", "eu/b/1"), share(1, 20));
        assert_eq!(judge(&locality, false, "eu/a/1", "eu/c/1"), Preference::Nothing);
        assert_eq!(judge(&locality, false, "eu/c/1", "eu/a/1"), share(0, 100));
        assert_eq!(judge(&locality, false, "eu/c/1", "us/a/1"), Preference::Nothing);
        assert_eq!(judge(&locality, false, "us/a/1", "us/a/1"), Preference::Class(0));
    }
}
