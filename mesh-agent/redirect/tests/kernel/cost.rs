//! What the hooks cost a connection: a measurement, not a test, so it only runs when asked for.
//!
//! `cargo test -p mesh-redirect --test kernel -- --ignored cost --nocapture`; `MESH_COST_SECONDS` (20) says how long.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_redirect::{RunStats, TableWriter, VerdictEntry, Verdicts};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::resource::{UsageWho, getrusage},
    unistd::Pid,
};

use crate::bed::{Alive, Pod, local_backend, services};

const VIP: &str = "10.96.0.1:80";
const PORT: u16 = 8080;
const THREADS: usize = 4;
const WINDOW: Duration = Duration::from_millis(250);

/// One window: connections made and CPU time spent, of both ends.
#[derive(Clone, Copy, Debug)]
struct Window {
    rate: f64,
    cpu_us: f64,
}

#[test]
#[ignore = "a measurement; takes its time and wants a quiet machine"]
fn what_a_direct_connection_costs() {
    let bed = bed!();
    let seconds = std::env::var("MESH_COST_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    // Listeners outside the mesh's cgroup; what they accept belongs to their group.
    let (bare_client, bare_server) = (bed.pod(), bed.pod());
    serve(&bare_server);
    let node = bed.node();
    let inside = format!("{}/{}", bed.cgroup.display(), mesh_redirect::AGENT_GROUP);
    let (client, server) = (bed.pod(), bed.pod());
    let _enrolled = [client.enrol(&node), server.enrol(&node)];
    let _alive = Alive::new(&node);
    serve(&server);
    let vip: SocketAddr = VIP.parse().unwrap();
    TableWriter::new(node.maps()).unwrap().apply(&services(&[(vip, &[local_backend(&server, true, PORT)])]));
    let verdicts = Verdicts::new(node.maps());
    let policy_gen = verdicts.policy_gen(server.workload()).unwrap().unwrap();
    verdicts
        .put(&VerdictEntry {
            client: client.netns().cookie(),
            workload: server.workload(),
            incarnation: server.netns().cookie(),
            port: PORT,
            v4: true,
            policy_gen,
            allow: true,
        })
        .unwrap();

    let (mut bare, mut direct) = (Vec::new(), Vec::new());
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        move_to(&bed.home());
        bare.push(window(&bare_client, SocketAddr::new(bare_server.v4, PORT)));
        move_to(&inside);
        direct.push(window(&client, vip));
    }
    let (rate, cpu) = (
        (median(&bare, |w| w.rate), median(&direct, |w| w.rate)),
        (median(&bare, |w| w.cpu_us), median(&direct, |w| w.cpu_us)),
    );
    eprintln!("rate   none {:.0}/s direct {:.0}/s ratio {:.3}", rate.0, rate.1, rate.1 / rate.0);
    eprintln!("cpu us none {:.2} direct {:.2} ratio {:.3}", cpu.0, cpu.1, cpu.1 / cpu.0);

    let _stats = RunStats::enable().unwrap();
    let runs = || -> BTreeMap<String, (u64, u64)> {
        node.program_runs().into_iter().map(|p| (p.name, (p.runs, p.run_time_ns))).collect()
    };
    // Runs and nanoseconds for one connection, of each window: what else the machine does only ever adds.
    let mut seen: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for _ in 0..(4 * seconds / 5).max(1) {
        let before = runs();
        let made = window(&client, vip).rate * WINDOW.as_secs_f64();
        for (name, (count, ns)) in runs() {
            let (count, ns) = ((count - before[&name].0) as f64 / made, (ns - before[&name].1) as f64 / made);
            seen.entry(name).or_default().push((count, ns));
        }
    }
    for (name, mut windows) in seen {
        windows.sort_by(|a, b| a.1.total_cmp(&b.1));
        let (runs, least, median) = (windows[0].0, windows[0].1, windows[windows.len() / 2].1);
        if runs > 0.0 {
            eprintln!(
                "{name:14} {runs:5.2} runs, {least:7.1} ns a connection at least, {median:7.1} in the middle"
            );
        }
    }
}

fn median(windows: &[Window], of: impl Fn(&Window) -> f64) -> f64 {
    let mut all: Vec<f64> = windows.iter().map(of).collect();
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn move_to(group: &str) {
    std::fs::write(format!("{group}/cgroup.procs"), "0").unwrap();
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    // A machine with one processor measures all the same.
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

/// One byte back for each connection, which the server closes first.
fn serve(pod: &Pod) {
    let IpAddr::V4(addr) = pod.v4 else { unreachable!() };
    let listener = Arc::new(pod.run(|| TcpListener::bind((addr, PORT)).unwrap()));
    for _ in 0..THREADS {
        let listener = Arc::clone(&listener);
        pod.spawn(move || {
            pin(1);
            loop {
                let Ok((mut stream, _)) = listener.accept() else { continue };
                let mut byte = [0];
                if stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {
                    let _ = stream.shutdown(Shutdown::Write);
                }
            }
        });
    }
}

fn window(pod: &Pod, to: SocketAddr) -> Window {
    let cpu = || {
        let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        let us = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 * 1e6 + t.tv_usec() as f64;
        us(usage.user_time()) + us(usage.system_time())
    };
    let (before, until) = (cpu(), Instant::now() + WINDOW);
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            pod.spawn(move || {
                pin(0);
                let mut made = 0_u64;
                while Instant::now() < until {
                    let mut stream = TcpStream::connect(to).unwrap();
                    stream.write_all(b"x").unwrap();
                    let mut answer = [0; 2];
                    while stream.read(&mut answer).unwrap() > 0 {}
                    made += 1;
                }
                made
            })
        })
        .collect();
    let made: u64 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    Window { rate: made as f64 / WINDOW.as_secs_f64(), cpu_us: (cpu() - before) / made.max(1) as f64 }
}
