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
    Ok(())
}
