//! Where an outbound connection goes: from what the app dialled to one endpoint per attempt. Pure.
//!
//! Invariants:
//! - A pod dialled by its own address (headless services, StatefulSets) is never balanced.
//! - An endpoint of another family than the dialled address is never chosen.
//! - The kernel draws over all slots of a service and sends what it can straight to local and unmeshed ones. So when it
//!   drew one that only the agent can serve, the choice is among those, or local endpoints would get
//!   more than their share.

use std::{net::SocketAddr, sync::Arc};

use mesh_core::{
    balance::{
        self,
        locality::{Nearest, Place},
    },
    mode::Mode,
    route::sight::Sight,
    snapshot::{Endpoint, Protocol, Resolution, Service, ServicePort, Snapshot, Workload},
};

use crate::kernel::Dialled;

/// What the app dialled, as the mesh knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'a> {
    /// A port of a service.
    Service {
        service: &'a Arc<Service>,
        port: &'a ServicePort,
        /// The endpoint the kernel drew.
        hint: Option<SocketAddr>,
        dialled: SocketAddr,
        /// Where the client is.
        place: Option<&'a Place>,
    },
    /// One address: a pod, or something outside the mesh.
    Address { addr: SocketAddr, workload: Option<&'a Arc<Workload>> },
}

/// The endpoint of one attempt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice<'a> {
    pub(crate) addr: SocketAddr,
    pub(crate) workload: Option<&'a Arc<Workload>>,
}

impl<'a> Target<'a> {
    /// Finds what was dialled in the snapshot.
    ///
    /// A service that the client does not see is an address as any other.
    pub(crate) fn of(
        snapshot: &'a Snapshot,
        sight: &Sight<'a>,
        client: Option<&'a Workload>,
        dialled: &Dialled,
    ) -> Self {
        let dst = canonical(dialled.dst);
        match sight.service_at(dst, Protocol::Tcp) {
            Some((service, port)) => Self::Service {
                service,
                port,
                hint: dialled.backend.map(canonical),
                dialled: dst,
                place: client.map(|client| &client.place),
            },
            None => Self::Address { addr: dst, workload: snapshot.workload_at(dst.ip()) },
        }
    }

    /// The service that was dialled, if it was one.
    pub(crate) fn service(&self) -> Option<&'a Arc<Service>> {
        match self {
            Self::Service { service, .. } => Some(service),
            Self::Address { .. } => None,
        }
    }

    /// Chooses the endpoint of the next attempt; `None` when nothing is left that was not tried.
    ///
    /// `draw` is one random word, `load` the connections outstanding at an endpoint.
    pub(crate) fn choose(
        &self,
        snapshot: &'a Snapshot,
        node: &str,
        tried: &[SocketAddr],
        draw: u64,
        load: impl Fn(SocketAddr) -> u32,
    ) -> Option<Choice<'a>> {
        let (service, port, hint, v4, place) = match *self {
            Self::Address { addr, workload } => {
                return (!tried.contains(&addr)).then_some(Choice { addr, workload });
            }
            Self::Service { service, dialled, .. } if service.resolution == Resolution::Dialled => {
                let workload = snapshot.workload_at(dialled.ip());
                return (!tried.contains(&dialled)).then_some(Choice { addr: dialled, workload });
            }
            Self::Service { service, port, hint, dialled, place } => {
                (service, port, hint, dialled.is_ipv4(), place)
            }
        };
        let workload_of = |endpoint: &Endpoint| snapshot.workload_of(endpoint);
        let chosen =
            |endpoint: &Endpoint| Choice { addr: endpoint.socket_addr(), workload: workload_of(endpoint) };
        let usable = |endpoint: &Endpoint| endpoint.addr.is_ipv4() == v4;
        let agents_only = |endpoint: &Endpoint| {
            usable(endpoint)
                && workload_of(endpoint).is_some_and(|workload| needs_agent(workload, endpoint.port, node))
        };
        let drawn = hint
            .and_then(|hint| port.endpoints.iter().find(|e| e.ready && usable(e) && e.socket_addr() == hint));
        if let Some(drawn) = drawn
            && tried.is_empty()
            && (service.affinity.is_some() || !agents_only(drawn))
        {
            return Some(chosen(drawn));
        }
        let load = |endpoint: &Endpoint| load(endpoint.socket_addr());
        let fresh = |picked: &&Endpoint| !tried.contains(&picked.socket_addr());
        // Of those that were not tried: farther ones when the near ones have failed.
        let nearest = service.distribution.zip(place).and_then(|(distribution, place)| {
            let untried = |e: &&Endpoint| e.ready && usable(e) && !tried.contains(&e.socket_addr());
            let mut fresh = port.endpoints.iter().filter(untried).peekable();
            fresh.peek()?;
            Some(Nearest::of(snapshot, distribution, place, fresh))
        });
        let is_near =
            |endpoint: &Endpoint| nearest.as_ref().is_none_or(|nearest| nearest.has(snapshot, endpoint));
        let usable = |endpoint: &Endpoint| usable(endpoint) && is_near(endpoint);
        let agents_only = |endpoint: &Endpoint| agents_only(endpoint) && is_near(endpoint);
        drawn
            .and_then(|_| balance::pick(&port.endpoints, draw, tried, agents_only, load).endpoint())
            .filter(fresh)
            .or_else(|| balance::pick(&port.endpoints, draw, tried, usable, load).endpoint())
            .filter(fresh)
            .map(chosen)
    }
}

/// Whether a connection to this workload always passes the agent: it is meshed, elsewhere, and not told to be plain.
fn needs_agent(workload: &Workload, port: u16, node: &str) -> bool {
    workload.meshed && *workload.node != *node && workload.modes.of(port) != Mode::Disable
}

/// The address without the IPv4-in-IPv6 form that dual-stack sockets show.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, net::IpAddr};

    use mesh_core::{
        mode::PortModes,
        snapshot::{Name, Parts, ServicePort},
    };

    use super::*;

    fn workload(name: &str, addr: &str, node: &str) -> Arc<Workload> {
        Arc::new(Workload {
            addrs: vec![addr.parse().unwrap()],
            node: node.into(),
            meshed: true,
            ..Workload::named(Name::new("default", name))
        })
    }

    fn endpoint(workload: &Workload) -> Endpoint {
        let addr = workload.addrs[0];
        Endpoint { addr, port: 8080, workload: Some(workload.id), ready: true, hostname: None, traits: None }
    }

    fn world(workloads: &[Arc<Workload>], shape: impl FnOnce(&mut Service)) -> Snapshot {
        let mut service = Service::named(Name::new("default", "web"));
        service.vips = vec!["10.96.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()];
        service.ports = vec![ServicePort {
            name: "".into(),
            port: 80,
            protocol: Protocol::Tcp,
            app_protocol: None,
            endpoints: workloads.iter().map(|w| endpoint(w)).collect(),
        }];
        shape(&mut service);
        Snapshot::new(
            1,
            Parts { workloads: workloads.to_vec(), services: vec![Arc::new(service)], ..Parts::default() },
        )
    }

    fn dialled(dst: &str, backend: Option<&str>) -> Dialled {
        let backend = backend.map(|b| b.parse().unwrap());
        Dialled { dst: dst.parse().unwrap(), backend, service: None, started_ns: 0 }
    }

    /// Every address that 200 draws choose.
    fn choices(snapshot: &Snapshot, dialled: &Dialled, tried: &[&str]) -> HashSet<String> {
        let tried: Vec<SocketAddr> = tried.iter().map(|t| t.parse().unwrap()).collect();
        let target = Target::of(snapshot, &snapshot.sight_from("default"), None, dialled);
        (0..200_u64)
            .filter_map(|i| {
                target.choose(snapshot, "a", &tried, i.wrapping_mul(0x9e37_79b9_7f4a_7c15), |_| 0)
            })
            .map(|choice| choice.addr.to_string())
            .collect()
    }

    fn set(addrs: &[&str]) -> HashSet<String> {
        addrs.iter().map(|a| (*a).to_owned()).collect()
    }

    #[test]
    fn a_local_endpoint_the_kernel_drew_is_taken() {
        let world = world(&[workload("l", "10.0.0.1", "a"), workload("r", "10.0.1.1", "b")], |_| {});
        assert_eq!(
            choices(&world, &dialled("10.96.0.1:80", Some("10.0.0.1:8080")), &[]),
            set(&["10.0.0.1:8080"])
        );
    }

    #[test]
    fn a_remote_hint_is_balanced_over_what_only_the_agent_can_serve() {
        let plain = Arc::new(Workload {
            modes: PortModes { default: Mode::Disable, ..PortModes::default() },
            ..(*workload("p", "10.0.1.3", "b")).clone()
        });
        let unmeshed = Arc::new(Workload { meshed: false, ..(*workload("u", "10.0.1.4", "b")).clone() });
        let all = [
            workload("l", "10.0.0.1", "a"),
            workload("r1", "10.0.1.1", "b"),
            workload("r2", "10.0.1.2", "c"),
            plain,
            unmeshed,
        ];
        let world = world(&all, |_| {});
        let dialled = dialled("10.96.0.1:80", Some("10.0.1.1:8080"));
        assert_eq!(choices(&world, &dialled, &[]), set(&["10.0.1.1:8080", "10.0.1.2:8080"]));
        assert_eq!(choices(&world, &dialled, &["10.0.1.1:8080"]), set(&["10.0.1.2:8080"]));
        let rest = choices(&world, &dialled, &["10.0.1.1:8080", "10.0.1.2:8080"]);
        assert_eq!(rest, set(&["10.0.0.1:8080", "10.0.1.3:8080", "10.0.1.4:8080"]));
    }

    #[test]
    fn without_a_hint_every_ready_endpoint_may_be_chosen() {
        let world = world(&[workload("l", "10.0.0.1", "a"), workload("r", "10.0.1.1", "b")], |service| {
            let unready = Endpoint {
                ready: false,
                addr: [10, 0, 9, 9].into(),
                ..service.ports[0].endpoints[0].clone()
            };
            service.ports[0].endpoints.push(unready);
        });
        let all = set(&["10.0.0.1:8080", "10.0.1.1:8080"]);
        assert_eq!(choices(&world, &dialled("10.96.0.1:80", None), &[]), all);
        // A hint that is no ready endpoint (any more) is no hint.
        assert_eq!(choices(&world, &dialled("10.96.0.1:80", Some("10.0.9.9:8080")), &[]), all);
    }

    #[test]
    fn session_affinity_keeps_the_kernels_choice_until_it_fails() {
        let world = world(&[workload("r1", "10.0.1.1", "b"), workload("r2", "10.0.1.2", "b")], |service| {
            service.affinity = Some(std::time::Duration::from_secs(60));
        });
        let dialled = dialled("10.96.0.1:80", Some("10.0.1.2:8080"));
        assert_eq!(choices(&world, &dialled, &[]), set(&["10.0.1.2:8080"]));
        assert_eq!(choices(&world, &dialled, &["10.0.1.2:8080"]), set(&["10.0.1.1:8080"]));
    }

    #[test]
    fn a_pods_own_address_is_pinned_also_in_mapped_form() {
        let world = world(&[workload("r", "10.0.1.1", "b")], |_| {});
        for dst in ["10.0.1.1:5432", "[::ffff:10.0.1.1]:5432"] {
            assert_eq!(choices(&world, &dialled(dst, None), &[]), set(&["10.0.1.1:5432"]));
            assert_eq!(choices(&world, &dialled(dst, None), &["10.0.1.1:5432"]), set(&[]));
            let Target::Address { workload, .. } =
                Target::of(&world, &world.sight_from("default"), None, &dialled(dst, None))
            else {
                panic!()
            };
            assert_eq!(&*workload.unwrap().name.name, "r");
        }
    }

    #[test]
    fn families_are_never_crossed() {
        let world = world(&[workload("v4", "10.0.1.1", "b"), workload("v6", "fd00::7", "b")], |_| {});
        assert_eq!(choices(&world, &dialled("[fd00::1]:80", None), &[]), set(&["[fd00::7]:8080"]));
        assert_eq!(choices(&world, &dialled("[::ffff:10.96.0.1]:80", None), &[]), set(&["10.0.1.1:8080"]));
    }

    #[test]
    fn a_failed_endpoint_is_not_tried_again() {
        let world = world(&[workload("r", "10.0.1.1", "b")], |_| {});
        assert_eq!(choices(&world, &dialled("10.96.0.1:80", None), &["10.0.1.1:8080"]), set(&[]));
    }
}
