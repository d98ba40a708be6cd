//! The tasks, in the order of the documentation.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::{Finding, JASON, Step, Tour, shares};
use crate::bookinfo::{Answer, OUTSIDE_HOST, PORT};
use crate::eventually;

macro_rules! manifest {
    ($file:literal) => {
        ($file, include_str!(concat!("../../../manifests/bookinfo/", $file)))
    };
}

/// The manifests by name.
const MANIFESTS: [(&str, &str); 15] = [
    manifest!("destination-rule-all.yaml"),
    manifest!("external-httpbin.yaml"),
    manifest!("httpbin-circuit-breaker.yaml"),
    manifest!("httpbin-mirror.yaml"),
    manifest!("mesh-registry-only.yaml"),
    manifest!("ratings-delay.yaml"),
    manifest!("ratings-test-abort.yaml"),
    manifest!("ratings-test-delay.yaml"),
    manifest!("ratings-v1.yaml"),
    manifest!("reviews-50-v3.yaml"),
    manifest!("reviews-90-10.yaml"),
    manifest!("reviews-test-v2.yaml"),
    manifest!("reviews-timeout.yaml"),
    manifest!("reviews-v1.yaml"),
    manifest!("virtual-service-all-v1.yaml"),
];

/// The tasks.
pub const STEPS: &[Step] = &[
    Step {
        name: "all-v1",
        title: "Request routing: version 1 for everybody",
        manifests: &[
            "destination-rule-all.yaml",
            "virtual-service-all-v1.yaml",
            "ratings-v1.yaml",
            "reviews-v1.yaml",
        ],
        measure: all_v1,
    },
    Step {
        name: "user",
        title: "Request routing: version 2 of the reviews for one user",
        manifests: &[
            "destination-rule-all.yaml",
            "virtual-service-all-v1.yaml",
            "ratings-v1.yaml",
            "reviews-test-v2.yaml",
        ],
        measure: user,
    },
    Step {
        name: "delay",
        title: "Fault injection: a delay of seven seconds, longer than the product page waits",
        manifests: &[
            "destination-rule-all.yaml",
            "virtual-service-all-v1.yaml",
            "ratings-test-delay.yaml",
            "reviews-test-v2.yaml",
        ],
        measure: delay,
    },
    Step {
        name: "abort",
        title: "Fault injection: the ratings answer one user with 500",
        manifests: &[
            "destination-rule-all.yaml",
            "virtual-service-all-v1.yaml",
            "ratings-test-abort.yaml",
            "reviews-test-v2.yaml",
        ],
        measure: abort,
    },
    Step {
        name: "90-10",
        title: "Traffic shifting: one page in ten has version 2 of the reviews",
        manifests: &[
            "destination-rule-all.yaml",
            "virtual-service-all-v1.yaml",
            "ratings-v1.yaml",
            "reviews-90-10.yaml",
        ],
        measure: ninety_ten,
    },
    Step {
        name: "50-v3",
        title: "Traffic shifting: half of the pages have version 3 of the reviews",
        manifests: &[
            "destination-rule-all.yaml",
            "virtual-service-all-v1.yaml",
            "ratings-v1.yaml",
            "reviews-50-v3.yaml",
        ],
        measure: fifty_v3,
    },
    Step {
        name: "timeout",
        title: "Request timeouts: the reviews have half a second, the ratings take two",
        manifests: &[
            "destination-rule-all.yaml",
            "virtual-service-all-v1.yaml",
            "ratings-delay.yaml",
            "reviews-timeout.yaml",
        ],
        measure: timeout,
    },
    Step {
        name: "egress-open",
        title: "Egress: a server outside the mesh is reached, as long as nothing else is said",
        manifests: &[],
        measure: egress_open,
    },
    Step {
        name: "egress-blocked",
        title: "Egress: with REGISTRY_ONLY nothing is reached that no resource describes",
        manifests: &["mesh-registry-only.yaml"],
        measure: egress_blocked,
    },
    Step {
        name: "egress-entry",
        title: "Egress: a ServiceEntry describes the server, and a rule gives it half a second",
        manifests: &["mesh-registry-only.yaml", "external-httpbin.yaml"],
        measure: egress_entry,
    },
    Step {
        name: "mirroring",
        title: "Mirroring: version 2 gets a copy of what version 1 answers",
        manifests: &["httpbin-mirror.yaml"],
        measure: mirroring,
    },
    Step {
        name: "circuit-breaking",
        title: "Circuit breaking: one connection, one request that waits",
        manifests: &["httpbin-circuit-breaker.yaml"],
        measure: circuit_breaking,
    },
];

/// A manifest by the name of its file.
pub(super) fn text(file: &str) -> anyhow::Result<&'static str> {
    let found = MANIFESTS.iter().find(|(name, _)| *name == file);
    found.map(|(_, text)| *text).ok_or_else(|| anyhow::anyhow!("no manifest {file}"))
}

fn all_v1(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    Ok(vec![tour.all_show("everybody", &[], "v1")?, tour.all_show("jason", &[JASON], "v1")?])
}

fn user(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    Ok(vec![
        tour.all_show("jason", &[JASON], "v2")?,
        tour.all_show("others", &[], "v1")?,
        explained(tour, "end-user: jason", "v2", "reviews-test-v2.yaml:11")?,
        explained(tour, "end-user: ada", "v1", "reviews-test-v2.yaml:19")?,
    ])
}

/// `meshctl explain` names the subset that a request of the product page gets, and the line of the rule.
fn explained(tour: &Tour<'_>, header: &str, subset: &str, line: &str) -> anyhow::Result<Finding> {
    let (_, agent) = tour.app.agents().first().ok_or_else(|| anyhow::anyhow!("no agent"))?;
    let to = format!("reviews:{PORT}");
    let asked =
        ["explain", "--from", "productpage-v1-a", "--to", &to, "--path", "/reviews/0", "--header", header];
    let view = agent.meshctl(&asked)?;
    let text = |pointer: &str| {
        view["request"].pointer(pointer).and_then(|value| value.as_str()).unwrap_or("none").to_owned()
    };
    let (cluster, place) = (text("/backends/0/cluster"), text("/rule/origin/place"));
    // Where the manifests lie is of no interest.
    let place = place.rsplit('/').next().unwrap_or_default();
    Ok(Finding {
        expected: format!("meshctl explain ({header}): {subset} by {line}"),
        measured: format!("{cluster} by {place}"),
        holds: cluster.contains(&format!("|{subset}|")) && place == line,
    })
}

fn delay(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    let patience = tour.pace.patience();
    let late = tour.settled(
        &format!("jason: a page without reviews after {patience:?}"),
        || tour.page(&[JASON]),
        |page| page.reviews() == "no reviews" && page.took >= patience,
        |page| format!("jason: {} after {:.1} s", page.reviews(), page.took.as_secs_f64()),
    )?;
    Ok(vec![late, tour.all_show("others", &[], "v1")?])
}

fn abort(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    Ok(vec![tour.all_show("jason", &[JASON], "v2 without ratings")?, tour.all_show("others", &[], "v1")?])
}

/// Of so many pages, shares of versions within these bounds and nothing else.
fn split(
    tour: &Tour<'_>,
    expected: &str,
    count: usize,
    wanted: &[(&str, RangeInclusive<usize>)],
) -> anyhow::Result<Finding> {
    let holds = |seen: &BTreeMap<String, usize>| {
        seen.len() == wanted.len()
            && wanted.iter().all(|(version, bounds)| seen.get(*version).is_some_and(|n| bounds.contains(n)))
    };
    tour.settled(expected, || tour.reviews(count, &[]), holds, |seen| shares("everybody", seen, count))
}

fn ninety_ten(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    // Fair draws fall outside about once in a million times.
    Ok(vec![split(tour, "everybody: v1 90 %, v2 10 %", 150, &[("v1", 110..=149), ("v2", 1..=40)])?])
}

fn fifty_v3(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    Ok(vec![split(tour, "everybody: v1 50 %, v3 50 %", 100, &[("v1", 25..=75), ("v3", 25..=75)])?])
}

fn timeout(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    const LIMIT: Duration = Duration::from_millis(500);
    let reviews = tour.app.service("reviews")?;
    let host = format!("reviews:{PORT}");
    let direct = tour.settled(
        "reviews: 504 after 0.5 s",
        || tour.visitor.get(reviews, &host, "/reviews/0", &[]),
        |answer| answer.status == 504 && answer.took >= LIMIT,
        |answer| format!("reviews: {} after {:.1} s", answer.status, answer.took.as_secs_f64()),
    )?;
    // It asks once more, as Bookinfo's does.
    let page = tour.settled(
        "everybody: a page without reviews after 1 s",
        || tour.patient_page(&[]),
        |page| {
            page.reviews() == "no reviews"
                && page.took >= 2 * LIMIT
                && page.error().is_some_and(|error| error.contains("504"))
        },
        |page| format!("everybody: {} after {:.1} s", page.reviews(), page.took.as_secs_f64()),
    )?;
    Ok(vec![direct, page])
}

/// All requests to the server outside get this status.
fn outside(tour: &Tour<'_>, host: &str, path: &str, status: u16) -> anyhow::Result<Finding> {
    const COUNT: usize = 10;
    let server = tour.app.outside()?;
    tour.settled(
        &format!("{host}{path}: {status}"),
        || {
            let get = |_| Ok(tour.visitor.get(server, host, path, &[])?.status);
            (0..COUNT).map(get).collect::<anyhow::Result<Vec<u16>>>()
        },
        |seen| seen.iter().all(|one| *one == status),
        |seen| {
            let mut statuses = BTreeMap::new();
            seen.iter().for_each(|one| *statuses.entry(one.to_string()).or_default() += 1);
            shares(&format!("{host}{path}"), &statuses, COUNT)
        },
    )
}

/// Pages of the application are complete, whatever is outside.
fn pages_come(tour: &Tour<'_>) -> anyhow::Result<Finding> {
    tour.settled(
        "the product page: 200",
        || tour.patient_page(&[]),
        |page| page.status == 200,
        |page| format!("the product page: {}", page.status),
    )
}

fn egress_open(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    Ok(vec![outside(tour, OUTSIDE_HOST, "/get", 200)?])
}

fn egress_blocked(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    Ok(vec![outside(tour, OUTSIDE_HOST, "/get", 502)?, pages_come(tour)?])
}

fn egress_entry(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    const LIMIT: Duration = Duration::from_millis(500);
    let get = outside(tour, OUTSIDE_HOST, "/get", 200)?;
    let server = tour.app.outside()?;
    let late = tour.settled(
        "a delay of 2 s: 504 after 0.5 s",
        || tour.visitor.get(server, OUTSIDE_HOST, "/delay/2", &[]),
        |answer| answer.status == 504 && answer.took >= LIMIT,
        |answer| format!("a delay of 2 s: {} after {:.1} s", answer.status, answer.took.as_secs_f64()),
    )?;
    Ok(vec![get, late, outside(tour, "other.example.org", "/get", 502)?, pages_come(tour)?])
}

const HTTPBIN: &str = "httpbin:8000";

/// Which version of httpbin answered.
fn version(answer: &Answer) -> String {
    let version = ["v1", "v2"].into_iter().find(|v| answer.body.contains(&format!("\"version\":\"{v}\"")));
    version.map_or_else(|| format!("status {}", answer.status), str::to_owned)
}

fn mirroring(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    const COUNT: usize = 10;
    let (httpbin, shadow) = (tour.app.service("httpbin")?, tour.app.pod("httpbin-v2-b")?);
    let copies = || -> anyhow::Result<u64> {
        // By its own address: no rule is about that.
        let at = (shadow.ip4(), PORT).into();
        Ok(tour.visitor.get(at, &format!("{at}"), "/count", &[])?.body.trim().parse()?)
    };
    let batch = || {
        (0..COUNT)
            .map(|_| tour.visitor.get(httpbin, HTTPBIN, "/get", &[]))
            .collect::<anyhow::Result<Vec<_>>>()
    };
    let answers = tour.settled(
        "requests: all answered by v1",
        batch,
        |answers| answers.iter().all(|answer| version(answer) == "v1"),
        |answers| {
            let mut seen = BTreeMap::new();
            answers.iter().for_each(|answer| *seen.entry(version(answer)).or_default() += 1);
            shares("requests", &seen, COUNT)
        },
    )?;
    // The first of those may have met v1 by chance, before the rule was there: it has no copy. The copies of the others come
    // when they come.
    std::thread::sleep(Duration::from_secs(1));
    let before = copies()?;
    batch()?;
    let expected = format!("copies at v2: {COUNT}");
    let copied = eventually(
        Duration::from_secs(5),
        || copies().map_or(0, |now| now.saturating_sub(before)),
        |n| *n == COUNT as u64,
    );
    let copied = match copied {
        Ok(copied) => copied,
        Err(_) => copies()?.saturating_sub(before),
    };
    let measured = format!("copies at v2: {copied}");
    Ok(vec![answers, Finding { expected, measured, holds: copied == COUNT as u64 }])
}

fn circuit_breaking(tour: &Tour<'_>) -> anyhow::Result<Vec<Finding>> {
    const ROUNDS: usize = 5;
    let httpbin = tour.app.service("httpbin")?;
    let overflows = || -> anyhow::Result<f64> {
        tour.app.agents().iter().try_fold(0.0, |sum, (_, agent)| {
            Ok(sum + agent.metric(&["istio_requests_total{", "response_flags=\"UO\""])?)
        })
    };
    let counts = |answers: &[Answer]| {
        let of = |status| answers.iter().filter(|answer| answer.status == status).count();
        (of(200), of(503))
    };
    let words = |whose: &str, answers: &[Answer]| {
        let (ok, overflow) = counts(answers);
        format!("{whose}: 200 {ok}/{n}, 503 {overflow}/{n}", n = answers.len())
    };
    let one = tour.settled(
        "one connection after the other: 200 for all",
        || {
            (0..10)
                .map(|_| tour.visitor.get(httpbin, HTTPBIN, "/get", &[]))
                .collect::<anyhow::Result<Vec<_>>>()
        },
        |answers| counts(answers).0 == answers.len(),
        |answers| words("one connection after the other", answers),
    )?;
    let before = overflows()?;
    let at_once = |count: usize| -> anyhow::Result<Vec<Answer>> {
        let mut all = Vec::new();
        for _ in 0..ROUNDS {
            all.extend(tour.visitor.at_once(count, httpbin, HTTPBIN, "/delay/0.3", &[])?);
        }
        Ok(all)
    };
    let (two, three) = (at_once(2)?, at_once(3)?);
    let refused = counts(&two).1 + counts(&three).1;
    let two = Finding {
        expected: "two connections: nearly all 200".to_owned(),
        measured: words("two connections", &two),
        holds: counts(&two).0 * 2 >= two.len(),
    };
    let (ok, overflow) = counts(&three);
    let flagged = three.iter().filter(|answer| answer.has("x-envoy-overloaded", "true")).count();
    let three = Finding {
        expected: "three connections: some 503, with x-envoy-overloaded".to_owned(),
        measured: format!("{}, {flagged} of them overloaded", words("three connections", &three)),
        holds: ok > 0 && overflow > 0 && ok + overflow == three.len() && flagged == overflow,
    };
    let counted = || overflows().map_or(0, |now| (now - before).round() as usize);
    // A request is counted when its response is over.
    let counted =
        eventually(Duration::from_secs(10), counted, |n| *n == refused).unwrap_or_else(|_| counted());
    let counted = Finding {
        expected: format!("overflows counted (UO): {refused}"),
        measured: format!("overflows counted (UO): {counted}"),
        holds: counted == refused,
    };
    Ok(vec![one, two, three, counted])
}
