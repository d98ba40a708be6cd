//! The tasks of Istio's documentation that are done with Bookinfo: the steps of `cargo xtask demo --tour`, in less time.

use mesh_tests::bookinfo::tour::{Pace, STEPS, Tour};
use mesh_tests::bookinfo::{App, AppOptions};
use mesh_tests::{TestResult, World, require_agent, test_name};

#[test]
fn the_tasks_of_istios_documentation_come_out_as_documented() -> TestResult {
    require_agent!();
    let world = World::with_nodes(test_name!(), &["a", "b"])?;
    let app = App::start(&world, AppOptions { visits: 0, httpbin: true })?;
    let tour = Tour::new(&app, Pace::QUICK)?;
    let mut missed = Vec::new();
    for step in STEPS {
        for finding in tour.take(step)? {
            println!("{}: {finding:?}", step.name);
            if !finding.holds {
                missed.push(format!(
                    "{}: expected {}, measured {}",
                    step.name, finding.expected, finding.measured
                ));
            }
        }
    }
    if !missed.is_empty() {
        app.save_logs();
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
    shown_by_proxy_config(&app)
}

/// What the last step has left behind is what operators are shown: limits, their use, endpoints, what the kernel does.
fn shown_by_proxy_config(app: &App<'_>) -> TestResult {
    let (_, agent) = &app.agents()[0];
    let ask = |part: &str, host: &str| agent.meshctl(&["proxy-config", part, "visitors-a", "--host", host]);
    let clusters = ask("clusters", "httpbin")?;
    assert_eq!(clusters["clusters"].as_array().map(Vec::len), Some(1), "{clusters}");
    let cluster = &clusters["clusters"][0];
    let limits = ["maxConnections=1", "http1MaxPendingRequests=1", "maxRequestsPerConnection=1"];
    assert!(limits.iter().all(|limit| cluster["limits"].to_string().contains(limit)), "{cluster}");
    assert_eq!(cluster["in_use"]["requests"], 0, "{cluster}");
    let place = cluster["origin"]["place"].as_str().unwrap_or_default();
    assert!(place.contains("httpbin-circuit-breaker.yaml:"), "{cluster}");

    let endpoints = ask("endpoints", "httpbin")?;
    let rows = endpoints["endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
    let pods: Vec<&str> = rows.iter().filter_map(|row| row["workload"].as_str()).collect();
    let each = ["bookinfo/httpbin-v1-a", "bookinfo/httpbin-v2-b"];
    assert_eq!(pods, [each, each].concat(), "of both families: {endpoints}");
    assert!(rows.iter().all(|row| row["status"] == "HEALTHY"), "{endpoints}");

    let decision = |host: &str| -> Result<String, mesh_tests::Failure> {
        let view = ask("listeners", host)?;
        Ok(view["services"][0]["decision"].as_str().unwrap_or_default().to_owned())
    };
    // Of one the rules are gone by now, so that the kernel connects to it again.
    assert_eq!((decision("httpbin")?, decision("reviews")?), ("http".to_owned(), "direct".to_owned()));
    let none = ask("routes", "reviews").map_or_else(|error| error.to_string(), |view| view.to_string());
    assert!(none.contains("there is no rule with host reviews"), "{none}");
    Ok(())
}
