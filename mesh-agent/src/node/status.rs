//! Owns what `meshctl status` reads.

use std::time::{Instant, SystemTime};

use mesh_control::{
    problem::{Level, SourceError},
    subscribe::status::LinkStatus,
};
use mesh_core::{resolve::NameState, snapshot::Snapshot};
use mesh_proxy::UnusableTls;
use mesh_redirect::{MapError, monotonic_ns};

use super::shared::Shared;
use crate::view::{
    AgentView, ControllerView, FailingNameView, ForeignProgramView, IdentityView, KernelView, MapView,
    NamesView, PodView, ProgramView, SnapshotView, SourceErrorView, StatusView, UnusableTlsView,
};

/// Reads everything. Blocking: milliseconds, because the kernel's maps are counted.
pub(super) fn status(shared: &Shared) -> Result<StatusView, MapError> {
    let node = shared.kernel.status()?;
    let outcome = shared.outcome();
    let now = Instant::now();
    let pods: Vec<PodView> = outcome.pods.iter().map(|row| row.view(now)).collect();
    let maps = node
        .maps
        .iter()
        .map(|map| MapView {
            name: map.name.to_owned(),
            entries: map.entries.into(),
            max_entries: map.max_entries.into(),
            evicts: map.evicts,
            refused: outcome.refused.get(map.name).copied().unwrap_or(0),
        })
        .collect();
    let (phase, waiting_for) = shared.readiness.now();
    let (snapshot, source) = (shared.snapshot(), shared.source());
    Ok(StatusView {
        agent: AgentView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: shared.node.clone(),
            pid: std::process::id(),
            uptime_s: shared.started.elapsed().as_secs_f64(),
            phase,
            waiting_for,
            workers: shared.workers,
            heartbeat_age_ns: shared.beat.age_ns(monotonic_ns()),
        },
        kernel: KernelView {
            release: release(),
            abi: node.abi,
            pins: node.pins.display().to_string(),
            cgroup_root: node.cgroup_root.display().to_string(),
            programs: node
                .programs
                .into_iter()
                .map(|p| ProgramView { name: p.name, id: p.id, attached: p.attached, adopted: p.adopted })
                .collect(),
            foreign_programs: node
                .foreign
                .into_iter()
                .map(|p| ForeignProgramView {
                    cgroup: p.cgroup.display().to_string(),
                    hook: p.hook.to_owned(),
                    name: p.name,
                    id: p.id,
                    exclusive: p.exclusive,
                })
                .collect(),
        },
        snapshot: SnapshotView {
            version: snapshot.version(),
            workloads: snapshot.workloads().count(),
            services: snapshot.services().count(),
            source: source.source.display().to_string(),
        },
        identity: identity(shared),
        names: names(shared),
        unusable_tls: unusable_tls(shared, &snapshot),
        controller: shared.link.as_ref().map(|link| controller(&link.borrow(), SystemTime::now())),
        pods,
        source_errors: source.errors.iter().chain(&source.warnings).map(source_error).collect(),
        maps,
    })
}

fn unusable_tls(shared: &Shared, snapshot: &Snapshot) -> Vec<UnusableTlsView> {
    let told = shared.proxy.unusable_tls(snapshot).into_iter();
    let view = |UnusableTls { origin, reason, before_in_use }| UnusableTlsView {
        origin: origin.to_string(),
        reason,
        before_in_use,
    };
    told.map(view).collect()
}

fn names(shared: &Shared) -> NamesView {
    let (names, left_out) = shared.resolved.names();
    let failing = |name: &NameState| {
        let (failure, attempts) = name.failing?;
        Some(FailingNameView {
            name: name.name.to_string(),
            reason: failure.as_str().to_owned(),
            attempts,
            addresses: name.addrs.clone(),
        })
    };
    NamesView {
        needed: names.len() + left_out,
        resolved: names.iter().filter(|name| !name.addrs.is_empty()).count(),
        left_out,
        failing: names.iter().filter_map(failing).collect(),
    }
}

fn identity(shared: &Shared) -> IdentityView {
    let snapshot = shared.snapshot();
    let (mesh, counters) = (snapshot.mesh(), shared.identities.counters());
    let without =
        shared.identities.rows().into_iter().find(|row| row.state != "valid" && row.last_error.is_some());
    IdentityView {
        trust_domain: mesh.trust_domain.to_string(),
        trust_domain_aliases: mesh.trust_domain_aliases.iter().map(ToString::to_string).collect(),
        issuer: shared.identities.issuer().to_owned(),
        wanted: counters.wanted,
        valid: counters.valid,
        reason: without.and_then(|row| Some(format!("{}: {}", row.identity, row.last_error?))),
    }
}

fn controller(link: &LinkStatus, now: SystemTime) -> ControllerView {
    let since = |then: SystemTime| now.duration_since(then).unwrap_or_default().as_secs_f64();
    ControllerView {
        url: link.controller.clone(),
        connected: link.connected,
        since_s: link.since.map(since),
        last_contact_s: link.last_contact.map(since),
        reason: link.last_error.clone().or_else(|| link.disk_error.clone()),
        attempts: link.attempts,
        generation: link.generation,
        refused_resources: link.refused_resources,
        certificate_expires_in_s: link
            .certificate_expires
            .map(|until| until.duration_since(now).unwrap_or_default().as_secs_f64()),
    }
}

fn source_error(error: &SourceError) -> SourceErrorView {
    SourceErrorView {
        file: error.file.display().to_string(),
        document: error.document,
        kind: error.kind.clone(),
        namespace: error.namespace.clone(),
        name: error.name.clone(),
        level: match error.level {
            Level::Error => "error",
            Level::Warning => "warning",
        }
        .to_owned(),
        field: error.field.clone(),
        message: error.message.clone(),
    }
}

/// `uname -r`.
fn release() -> String {
    nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}
