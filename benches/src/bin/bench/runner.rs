//! Owns measuring: fresh load processes for each start, every task on one path after the other, again where others disturbed.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use mesh_benches::load::task::{Answer, Task, Timing};

use crate::agents::{Decisions, MeshNode};
use crate::cost::{Meter, Spent};
use crate::figures::{Figures, HTTP_CONNECTIONS, Measurement, Metric, metrics_of, mib};
use crate::paths::{Expected, Lab, Path, Route, Traffic};
use crate::session::Session;

/// More CPUs busy with other things than this during a measurement, and it is repeated.
pub(crate) const NOISY_CPUS: f64 = 0.15;

/// How long the machine is watched before a measurement.
const LOOK: Duration = Duration::from_millis(100);

/// Measures paths and keeps the figures.
#[derive(Debug)]
pub(crate) struct Runner {
    /// What is measured on each path, in this order.
    pub(crate) tasks: Vec<Measurement>,
    /// Load client and server stay on a CPU of their own.
    pub(crate) pinned: bool,
    /// What is left of it.
    pub(crate) patience: Duration,
    /// What was measured so far.
    pub(crate) figures: Figures,
}

/// A path with its load processes, during one start.
#[derive(Debug)]
struct Running<'a> {
    route: &'a Route,
    session: Session,
    meter: Meter,
    agents: Vec<&'a MeshNode>,
    failed: Option<anyhow::Error>,
}

impl Runner {
    /// One start: fresh load processes on every path, then every measurement on one path after the other, so
    /// that what is compared was measured within seconds. Returns the paths that failed.
    pub(crate) fn start(&mut self, lab: &Lab, start: usize, rounds: usize) -> Vec<(Path, anyhow::Error)> {
        let mut failures = Vec::new();
        let mut running = Vec::new();
        for route in lab.routes() {
            match Running::start(lab, route, self.pinned) {
                Ok(path) => running.push(path),
                Err(error) => failures.push((route.path, error)),
            }
        }
        let paths: Vec<Path> = running.iter().map(|path| path.route.path).collect();
        for round in 0..rounds {
            for measurement in self.tasks.clone() {
                // Another order each time: what wears off or builds up must not always fall on one path.
                let first = (start + round) % running.len().max(1);
                let (tail, head) = running.split_at_mut(first);
                for path in head.iter_mut().chain(tail).filter(|path| path.failed.is_none()) {
                    let done = measurement
                        .task(path.route.path, &paths, &self.figures)
                        .and_then(|task| self.measure(path, &task));
                    if let Err(error) = done {
                        path.failed = Some(error);
                    }
                }
            }
        }
        for mut path in running {
            let name = path.route.path;
            if path.failed.is_none() && lab.traffic() == Traffic::Http {
                match path.allocations_per_request() {
                    Ok(Some(count)) => {
                        self.figures.push(name.name(), Metric::AllocationsPerRequest, count);
                    }
                    Ok(None) => {}
                    Err(error) => path.failed = Some(error),
                }
            }
            match path.failed.take().map_or_else(|| path.rss(), Err) {
                Ok(Some(rss)) => self.figures.push(name.name(), Metric::Rss, mib(rss)),
                Ok(None) => {}
                Err(error) => failures.push((name, error)),
            }
        }
        for (path, error) in &failures {
            eprintln!("{}: {error:#}", path.name());
        }
        failures
    }

    fn measure(&mut self, path: &mut Running<'_>, task: &Task) -> anyhow::Result<()> {
        let before = path.decisions()?;
        let (answer, spent) = self.undisturbed(&mut path.session, task, &path.meter)?;
        path.went_as_expected(before)?;
        if let Answer::Requests { failed: failed @ 1.., first_failure, .. } = &answer {
            bail!("{failed} requests failed, the first: {}", first_failure.as_deref().unwrap_or("?"));
        }
        self.figures.note_foreign(&spent);
        for (metric, value) in metrics_of(task, &answer, &spent) {
            self.figures.push(path.route.path.name(), metric, value);
        }
        Ok(())
    }

    /// Do a task on a quiet machine, again when something else ran meanwhile, as long as patience lasts.
    fn undisturbed(
        &mut self,
        session: &mut Session,
        task: &Task,
        meter: &Meter,
    ) -> anyhow::Result<(Answer, Spent)> {
        loop {
            let began = Instant::now();
            while self.patience > began.elapsed() {
                let idle = meter.read()?;
                std::thread::sleep(LOOK);
                if meter.since(idle)?.foreign_cpus() <= NOISY_CPUS {
                    break;
                }
            }
            let waited = began.elapsed();
            let reading = meter.read()?;
            let answer = session.perform(task)?;
            let spent = meter.since(reading)?;
            if spent.foreign_cpus() <= NOISY_CPUS || self.patience.is_zero() {
                self.patience = self.patience.saturating_sub(waited.saturating_sub(LOOK));
                return Ok((answer, spent));
            }
            self.patience = self.patience.saturating_sub(began.elapsed());
        }
    }
}

impl<'a> Running<'a> {
    fn start(lab: &'a Lab, route: &'a Route, pinned: bool) -> anyhow::Result<Self> {
        let mut session = Session::start(&route.client, &route.server, &[route.to], pinned)?;
        // The first connections of a pair go through the agent, which fills the verdict cache.
        let timing = Timing { warm_up_ms: 0, window_ms: 100 };
        session.perform(&match lab.traffic() {
            Traffic::Tcp => Task::Requests { connections: 1, timing },
            Traffic::Http => Task::Http { connections: 1, rate: None, timing },
        })?;
        let meter = Meter::of(lab.cgroups_of(route)?)?;
        Ok(Self { route, session, meter, agents: lab.agents_of(route), failed: None })
    }

    /// What the connect hooks of the client's node decided so far, if there are any.
    fn decisions(&self) -> anyhow::Result<Option<Decisions>> {
        self.agents.first().map(|agent| agent.decisions()).transpose()
    }

    /// Fails unless every connection since `before` took the path it is counted for.
    fn went_as_expected(&self, before: Option<Decisions>) -> anyhow::Result<()> {
        let (Some(now), Some(before), Some(expected)) =
            (self.decisions()?, before, self.route.path.expected())
        else {
            return Ok(());
        };
        let seen = now.since(before);
        let taken = match expected {
            Expected::Direct => seen.direct > 0 && seen.proxy == 0,
            Expected::Proxy => seen.proxy > 0 && seen.direct == 0,
        };
        ensure!(taken && seen.other == 0, "connections did not go {expected:?}: the hooks counted {seen:?}");
        Ok(())
    }

    /// How often the agents on the way allocate for a request, all of them together.
    fn allocations_per_request(&mut self) -> anyhow::Result<Option<f64>> {
        if self.agents.is_empty() {
            return Ok(None);
        }
        let agents = self.agents.clone();
        let so_far = || agents.iter().map(|agent| agent.allocations()).sum::<anyhow::Result<f64>>();
        let before = so_far()?;
        let timing = Timing { warm_up_ms: 0, window_ms: 500 };
        let task = Task::Http { connections: HTTP_CONNECTIONS, rate: None, timing };
        let Answer::Requests { total, .. } = self.session.perform(&task)? else { return Ok(None) };
        Ok(Some((so_far()? - before) / total.max(1) as f64))
    }

    /// Resident memory of the larger agent or peer's proxy on the way, if there is one.
    fn rss(&self) -> anyhow::Result<Option<u64>> {
        let mut sizes = self.agents.iter().map(|agent| agent.rss()).collect::<anyhow::Result<Vec<u64>>>()?;
        if let Some(envoys) = self.route.envoys() {
            sizes.extend(envoys.rss()?);
        }
        Ok(sizes.into_iter().max())
    }
}
