//! What clients see of a changing world.

use std::collections::HashMap;

use mesh_core::reach::Reach;
use proptest::prelude::*;

use super::*;
use crate::publish::world::Edits;

/// A client that applies what it is told, as an agent does.
#[derive(Debug, Default)]
struct Client {
    has: HashMap<(Kind, String), String>,
    resources_received: usize,
    commits: Vec<u64>,
}

impl Client {
    /// Takes one response and acknowledges it.
    fn take(&mut self, session: &mut Session, world: &World, response: Response) -> Response {
        for resource in &response.resources {
            self.resources_received += 1;
            self.has.insert((response.kind, resource.name.to_string()), resource.version_text());
        }
        for name in &response.removed {
            self.has.remove(&(response.kind, name.clone()));
        }
        self.commits.extend(response.commit);
        let ack = Request { nonce: response.nonce.clone(), ..Request::default() };
        let answer = session.request(response.kind, ack, world).unwrap();
        assert_eq!(answer, Some(Answer::Ack(response.kind)));
        response
    }

    /// Takes responses until there are none.
    fn drain(&mut self, session: &mut Session, world: &World) -> Vec<Response> {
        let mut taken = Vec::new();
        while let Some(response) = session.next(world).unwrap() {
            taken.push(self.take(session, world, response));
            assert!(taken.len() < 10_000, "it never ends");
        }
        taken
    }

    fn names(&self, kind: Kind) -> Vec<&str> {
        let mut names: Vec<&str> =
            self.has.keys().filter(|(of, _)| *of == kind).map(|(_, name)| name.as_str()).collect();
        names.sort_unstable();
        names
    }
}

fn address(name: &str, body: &str) -> ((Kind, Arc<str>), Option<Resource>) {
    let alias = format!("/{name}");
    let resource =
        Resource::new(Kind::Address, name, body.as_bytes().to_vec(), vec![alias.into()], Reach::Everyone);
    ((Kind::Address, name.into()), Some(resource))
}

/// An address for some nodes only.
fn narrow(name: &str, nodes: &[&str], body: &str) -> ((Kind, Arc<str>), Option<Resource>) {
    let (key, resource) = address(name, body);
    let reach = Reach::nodes(nodes.iter().map(|node| Arc::from(*node)));
    (key, resource.map(|resource| Resource { reach, ..resource }))
}

fn pod(name: &str, node: &str, body: &str) -> ((Kind, Arc<str>), Option<Resource>) {
    let resource =
        Resource::new(Kind::Address, name, body.as_bytes().to_vec(), Vec::new(), Reach::node(node.into()));
    ((Kind::NodePod, name.into()), Some(resource))
}

fn gone(kind: Kind, name: &str) -> ((Kind, Arc<str>), Option<Resource>) {
    ((kind, name.into()), None)
}

fn world(edits: impl IntoIterator<Item = ((Kind, Arc<str>), Option<Resource>)>) -> World {
    let mut world = World::default();
    world.apply(edits.into_iter().collect::<Edits>());
    world
}

fn agent(node: &str, world: &World) -> Session {
    let mut session = Session::new(Some(node.into()));
    for kind in Kind::ALL {
        session.request(kind, Request::default(), world).unwrap();
    }
    session
}

/// An agent that comes back with what `client` has.
fn resumed(node: &str, client: &Client, world: &World) -> Session {
    let mut session = Session::new(Some(node.into()));
    for kind in Kind::ALL {
        let known = client
            .has
            .iter()
            .filter(|((of, _), _)| *of == kind)
            .map(|((_, name), version)| (name.clone(), version.clone()))
            .collect();
        session.request(kind, Request { known, ..Request::default() }, world).unwrap();
    }
    session
}

fn wildcard_of_addresses(world: &World) -> Session {
    let mut session = Session::new(None);
    let subscribe = vec![WILDCARD.to_owned()];
    session.request(Kind::Address, Request { subscribe, ..Request::default() }, world).unwrap();
    session
}

#[test]
fn an_agent_gets_everything_and_then_a_commit() {
    let world = world([address("a", "1"), address("b", "1"), pod("p", "n1", "1"), pod("q", "n2", "1")]);
    let (mut session, mut client) = (agent("n1", &world), Client::default());
    let taken = client.drain(&mut session, &world);
    assert_eq!(client.names(Kind::Address), ["a", "b"]);
    assert_eq!(client.names(Kind::NodePod), ["p"], "a pod of another node is not shown");
    assert_eq!(taken.last().and_then(|response| response.commit), Some(1));
    assert!(taken[..taken.len() - 1].iter().all(|response| response.commit.is_none()));
}

#[test]
fn a_changed_resource_is_the_only_one_sent() {
    let mut world = world((0..100).map(|i| address(&format!("s{i}"), "1")));
    let (mut session, mut client) = (agent("n1", &world), Client::default());
    client.drain(&mut session, &world);
    client.resources_received = 0;
    world.apply([address("s7", "2")].into());
    let taken = client.drain(&mut session, &world);
    assert_eq!((taken.len(), client.resources_received), (1, 1));
    assert_eq!(taken[0].commit, Some(2));
}

#[test]
fn a_removed_resource_is_told_by_name() {
    let mut world = world([address("a", "1"), address("b", "1")]);
    let (mut session, mut client) = (agent("n1", &world), Client::default());
    client.drain(&mut session, &world);
    world.apply([gone(Kind::Address, "a")].into());
    let taken = client.drain(&mut session, &world);
    assert_eq!(taken[0].removed, ["a"]);
    assert_eq!(client.names(Kind::Address), ["b"]);
}

#[test]
fn a_client_that_comes_back_gets_only_what_changed_meanwhile() {
    let mut world = world([address("a", "1"), address("b", "1"), address("c", "1"), pod("p", "n1", "1")]);
    let (mut session, mut client) = (agent("n1", &world), Client::default());
    client.drain(&mut session, &world);
    world.apply([address("a", "2"), gone(Kind::Address, "b")].into());
    client.resources_received = 0;
    let taken = client.drain(&mut resumed("n1", &client, &world), &world);
    assert_eq!(client.resources_received, 1);
    assert_eq!(client.names(Kind::Address), ["a", "c"]);
    assert!(taken.last().is_some_and(|response| response.commit.is_some()));
}

#[test]
fn a_client_that_comes_back_up_to_date_gets_nothing_but_a_commit() {
    let world = world([address("a", "1"), pod("p", "n1", "1")]);
    let (mut session, mut client) = (agent("n1", &world), Client::default());
    client.drain(&mut session, &world);
    client.resources_received = 0;
    let taken = client.drain(&mut resumed("n1", &client, &world), &world);
    assert_eq!((taken.len(), client.resources_received, taken[0].commit), (1, 0, Some(1)));
}

#[test]
fn a_pod_that_moves_to_another_node_is_removed_from_the_first() {
    let mut world = world([pod("p", "n1", "1")]);
    let (mut one, mut two) =
        ((agent("n1", &world), Client::default()), (agent("n2", &world), Client::default()));
    one.1.drain(&mut one.0, &world);
    two.1.drain(&mut two.0, &world);
    world.apply([pod("p", "n2", "1")].into());
    one.1.drain(&mut one.0, &world);
    two.1.drain(&mut two.0, &world);
    assert!(one.1.names(Kind::NodePod).is_empty());
    assert_eq!(two.1.names(Kind::NodePod), ["p"]);
}

#[test]
fn changes_of_other_nodes_pods_are_not_even_hinted_at() {
    let mut world = world([pod("p", "n2", "1")]);
    let (mut session, mut client) = (agent("n1", &world), Client::default());
    client.drain(&mut session, &world);
    world.apply([pod("p", "n2", "2")].into());
    world.apply([gone(Kind::NodePod, "p")].into());
    assert!(client.drain(&mut session, &world).is_empty());
    assert_eq!(session.seen(), 3);
}

/// An agent of a node and what it has.
struct Agent {
    session: Session,
    client: Client,
}

impl Agent {
    fn of(node: &str, world: &World) -> Self {
        Self { session: agent(node, world), client: Client::default() }
    }

    /// What it is sent until there is no more: names of resources, and of those that are gone.
    fn hears(&mut self, world: &World) -> (Vec<String>, Vec<String>) {
        let taken = self.client.drain(&mut self.session, world);
        let sent = taken.iter().flat_map(|response| &response.resources);
        let gone = taken.iter().flat_map(|response| response.removed.clone());
        (sent.map(|resource| resource.name.to_string()).collect(), gone.collect())
    }
}

fn removal(name: &str) -> ((Kind, Arc<str>), Option<Resource>) {
    gone(Kind::Address, name)
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_node_gains_and_loses_a_resource_and_the_others_hear_nothing() {
    let mut world = world([narrow("s", &["n1", "n3"], "1")]);
    let mut agents = ["n1", "n2", "n3"].map(|node| Agent::of(node, &world));
    let mut hear = |world: &World| agents.each_mut().map(|agent| agent.hears(world));
    let (sent, gone, nothing) =
        ((names(&["s"]), names(&[])), (names(&[]), names(&["s"])), (names(&[]), names(&[])));
    assert_eq!(hear(&world), [sent.clone(), nothing.clone(), sent.clone()]);
    world.apply([narrow("s", &["n1", "n2"], "1")].into());
    assert_eq!(hear(&world), [nothing.clone(), sent.clone(), gone.clone()], "it is the same to n1");
    world.apply([narrow("s", &["n1", "n2"], "2")].into());
    assert_eq!(hear(&world), [sent.clone(), sent, nothing.clone()]);
    world.apply([narrow("s", &[], "2")].into());
    assert_eq!(hear(&world), [gone.clone(), gone, nothing.clone()]);
    world.apply([removal("s")].into());
    assert_eq!(hear(&world), [nothing.clone(), nothing.clone(), nothing]);
}

#[test]
fn what_everyone_had_is_taken_from_those_who_lose_it_and_given_back() {
    let mut world = world([address("s", "1"), address("t", "1")]);
    let mut agents = ["n1", "n2"].map(|node| Agent::of(node, &world));
    let mut hear = |world: &World| agents.each_mut().map(|agent| agent.hears(world));
    hear(&world);
    world.apply([narrow("s", &["n1"], "1")].into());
    assert_eq!(hear(&world), [(names(&[]), names(&[])), (names(&[]), names(&["s"]))]);
    world.apply([address("s", "1")].into());
    assert_eq!(hear(&world), [(names(&[]), names(&[])), (names(&["s"]), names(&[]))]);
    // Both at once: it says something else, and to fewer.
    world.apply([narrow("s", &["n1"], "2")].into());
    assert_eq!(hear(&world), [(names(&["s"]), names(&[])), (names(&[]), names(&["s"]))]);
    // Several changes before anybody is told: what counts is what each has.
    world.apply([address("s", "3")].into());
    world.apply([narrow("s", &["n2"], "3")].into());
    world.apply([narrow("s", &["n1"], "2")].into());
    assert_eq!(hear(&world), [(names(&["s"]), names(&[])), (names(&[]), names(&[]))]);
    world.apply([narrow("s", &["n2"], "2")].into());
    world.apply([narrow("s", &["n1", "n2"], "2")].into());
    assert_eq!(hear(&world), [(names(&[]), names(&[])), (names(&["s"]), names(&[]))]);
}

#[test]
fn a_client_that_comes_back_gives_up_what_it_may_not_see_any_more() {
    let mut world = world([narrow("s", &["n1"], "1"), narrow("t", &["n1", "n2"], "1"), address("u", "1")]);
    let mut one = Agent::of("n1", &world);
    one.hears(&world);
    world.apply([narrow("s", &["n2"], "1"), narrow("u", &["n1"], "1")].into());
    one.session = resumed("n1", &one.client, &world);
    assert_eq!(one.hears(&world), (names(&[]), names(&["s"])));
    // And hears of what it kept.
    world.apply([gone(Kind::Address, "t"), narrow("u", &["n2"], "1")].into());
    assert_eq!(one.hears(&world), (names(&[]), names(&["t", "u"])));
}

#[test]
fn a_resource_that_changes_hands_while_the_first_state_is_sent_is_told_once() {
    let body = "x".repeat(RESPONSE_BYTES);
    let many = ["a", "b", "c", "d"].map(|name| narrow(name, &["n1"], &format!("{name}{body}")));
    let mut world = world(many);
    let (mut session, mut client) = (agent("n1", &world), Client::default());
    let first = session.next(&world).unwrap().unwrap();
    assert_eq!(first.resources.len(), 1);
    client.take(&mut session, &world, first);
    // What it has and loses, what it would have had, and what it gets for the first time behind the scan and before it.
    world.apply([narrow("a", &["n2"], "a"), narrow("c", &["n2"], "c"), narrow("aa", &["n1"], "1")].into());
    world.apply([narrow("cc", &["n1"], "1")].into());
    let taken = client.drain(&mut session, &world);
    let removed: Vec<&String> = taken.iter().flat_map(|response| &response.removed).collect();
    assert_eq!(removed, ["a"], "what it never had is not mentioned");
    assert_eq!(client.names(Kind::Address), ["aa", "b", "cc", "d"]);
    assert_eq!(client.resources_received, 5);
}

#[test]
fn who_asks_by_name_is_told_of_what_its_node_is_told() {
    let mut world = world([narrow("s", &["n2"], "1")]);
    let mut session = Session::new(Some("n1".into()));
    let mut client = Client::default();
    let ask = Request { subscribe: vec!["/s".into(), "s".into()], ..Request::default() };
    session.request(Kind::Address, ask, &world).unwrap();
    assert_eq!(client.drain(&mut session, &world)[0].removed, ["/s", "s"], "for it there is none");
    world.apply([narrow("s", &["n1"], "1")].into());
    client.drain(&mut session, &world);
    assert_eq!(client.names(Kind::Address), ["s"]);
    world.apply([address("s", "1")].into());
    assert!(client.drain(&mut session, &world).is_empty());
    world.apply([narrow("s", &["n2"], "1")].into());
    assert_eq!(client.drain(&mut session, &world)[0].removed, ["s"]);
    world.apply([gone(Kind::Address, "s")].into());
    assert!(client.drain(&mut session, &world).is_empty());
}

#[test]
fn a_client_without_a_node_sees_no_pod_of_a_node() {
    let world = world([address("a", "1"), pod("p", "n1", "1")]);
    let mut session = Session::new(None);
    for kind in Kind::ALL {
        session.request(kind, Request::default(), &world).unwrap();
    }
    let mut client = Client::default();
    client.drain(&mut session, &world);
    assert!(client.names(Kind::NodePod).is_empty());
}

#[test]
fn a_foreign_client_gets_no_commits() {
    let mut world = world([address("a", "1"), address("b", "1")]);
    let (mut session, mut client) = (wildcard_of_addresses(&world), Client::default());
    client.drain(&mut session, &world);
    world.apply([address("a", "2")].into());
    client.drain(&mut session, &world);
    assert_eq!(client.names(Kind::Address), ["a", "b"]);
    assert!(client.commits.is_empty() && !session.is_agent());
}

#[test]
fn names_are_answered_by_name_or_alias_and_followed_from_then_on() {
    let mut world = world([address("a", "1"), address("b", "1")]);
    let (mut session, mut client) = (Session::new(None), Client::default());
    // How a client says that it wants nothing yet.
    let nothing = Request {
        subscribe: vec![WILDCARD.into()],
        unsubscribe: vec![WILDCARD.into()],
        ..Request::default()
    };
    session.request(Kind::Address, nothing, &world).unwrap();
    assert!(client.drain(&mut session, &world).is_empty());
    let ask = Request { subscribe: vec!["/a".into(), "missing".into()], ..Request::default() };
    session.request(Kind::Address, ask, &world).unwrap();
    let taken = client.drain(&mut session, &world);
    assert_eq!(client.names(Kind::Address), ["a"]);
    assert_eq!(taken[0].removed, ["missing"]);
    world.apply([address("a", "2"), address("b", "2"), address("missing", "1")].into());
    client.drain(&mut session, &world);
    assert_eq!(client.names(Kind::Address), ["a", "missing"]);
    world.apply([gone(Kind::Address, "a")].into());
    client.drain(&mut session, &world);
    assert_eq!(client.names(Kind::Address), ["missing"]);
    let enough = Request { unsubscribe: vec!["missing".into()], ..Request::default() };
    session.request(Kind::Address, enough, &world).unwrap();
    world.apply([address("missing", "2")].into());
    assert!(client.drain(&mut session, &world).is_empty());
}

#[test]
fn a_client_that_does_not_answer_is_sent_no_more_and_then_the_newest_alone() {
    let mut world = world([address("a", "0")]);
    let (mut session, mut client) = (wildcard_of_addresses(&world), Client::default());
    let mut unanswered = Vec::new();
    for body in 1..1000 {
        unanswered.extend(session.next(&world).unwrap());
        world.apply([address("a", &body.to_string())].into());
    }
    assert_eq!(unanswered.len(), OUTSTANDING_MAX);
    for response in unanswered {
        client.take(&mut session, &world, response);
    }
    client.resources_received = 0;
    client.drain(&mut session, &world);
    assert_eq!(client.resources_received, 1);
    let newest = world.get(Kind::Address, "a").unwrap().version_text();
    assert_eq!(client.has.get(&(Kind::Address, "a".into())), Some(&newest));
}

#[test]
fn a_client_too_far_behind_is_told_to_come_again() {
    let mut world = World::with_log(4);
    world.apply([address("a", "0")].into());
    let (mut session, mut client) = (wildcard_of_addresses(&world), Client::default());
    client.drain(&mut session, &world);
    for body in 1..10 {
        world.apply([address("a", &body.to_string())].into());
    }
    assert_eq!(session.next(&world), Err(SessionError::TooFarBehind));
}

#[test]
fn a_refusal_is_kept_with_its_reason_and_the_resource_is_not_sent_again() {
    let world = world([address("a", "1")]);
    let mut session = wildcard_of_addresses(&world);
    let response = session.next(&world).unwrap().unwrap();
    let nack = Request {
        nonce: response.nonce,
        refused: Some(format!("a: bad address {}", "é".repeat(1000))),
        ..Request::default()
    };
    let answer = session.request(Kind::Address, nack, &world).unwrap();
    assert!(matches!(answer, Some(Answer::Nack(Kind::Address, detail)) if detail.starts_with("a: bad")));
    let status = session.status(Kind::Address).unwrap();
    assert_eq!((status.acked, status.nacked), (0, 1));
    assert!(status.last_nack.as_ref().is_some_and(|detail| detail.len() <= DETAIL_BYTES_MAX));
    assert_eq!(session.next(&world), Ok(None));
}

#[test]
fn an_answer_to_something_never_sent_is_ignored() {
    let world = world([address("a", "1")]);
    let mut session = wildcard_of_addresses(&world);
    let stray = Request { nonce: "99".into(), ..Request::default() };
    assert_eq!(session.request(Kind::Address, stray, &world), Ok(None));
}

#[test]
fn a_large_world_is_sent_in_pieces_with_the_commit_at_the_end() {
    let body = "x".repeat(10_000);
    let world = world((0..200).map(|i| address(&format!("s{i:03}"), &format!("{body}{i}"))));
    let (mut session, mut client) = (agent("n1", &world), Client::default());
    let taken = client.drain(&mut session, &world);
    assert!(taken.len() >= 200 * body.len() / (RESPONSE_BYTES + body.len()), "{}", taken.len());
    assert_eq!((client.resources_received, client.commits.len()), (200, 1));
}

#[test]
fn nothing_is_said_before_the_world_is_known() {
    let mut world = World::default();
    let (mut session, mut client) = (agent("n1", &world), Client::default());
    assert!(client.drain(&mut session, &world).is_empty());
    world.apply(Edits::new());
    assert_eq!(client.drain(&mut session, &world).len(), 1);
    assert_eq!(client.commits, [1]);
}

#[derive(Clone, Debug)]
enum Step {
    Set(Kind, u8, u8, u8),
    /// A large address, for the nodes of these bits.
    Narrow(u8, u8, u8),
    Remove(Kind, u8),
    Send,
    Reconnect,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = prop_oneof![Just(Kind::Address), Just(Kind::NodePod)];
    let step = prop_oneof![
        4 => (kind.clone(), 0..6_u8, 0..2_u8, any::<u8>()).prop_map(|(k, n, o, b)| Step::Set(k, n, o, b)),
        4 => (0..6_u8, 0..4_u8, 0..4_u8).prop_map(|(n, o, b)| Step::Narrow(n, o, b)),
        2 => (kind, 0..6_u8).prop_map(|(k, n)| Step::Remove(k, n)),
        3 => Just(Step::Send),
        1 => Just(Step::Reconnect),
    ];
    proptest::collection::vec(step, 0..60)
}

proptest! {
    /// Whatever changes in whatever order, and whenever the client comes and goes: in the end it has what it may see.
    #[test]
    fn a_client_ends_with_what_it_may_see(steps in steps()) {
        let mut world = World::default();
        world.apply(Edits::new());
        let (mut session, mut client) = (agent("n0", &world), Client::default());
        for step in steps {
            match step {
                Step::Set(Kind::Address, name, _, body) => {
                    world.apply([address(&name.to_string(), &body.to_string())].into());
                }
                Step::Narrow(name, bits, body) => {
                    let nodes: Vec<&str> = ["n0", "n1"].into_iter().filter(|node| bits & (1 << (node.as_bytes()[1] - b'0')) != 0).collect();
                    let body = body.to_string().repeat(RESPONSE_BYTES);
                    world.apply([narrow(&name.to_string(), &nodes, &body)].into());
                }
                Step::Set(_, name, node, body) => {
                    world.apply([pod(&name.to_string(), &format!("n{node}"), &body.to_string())].into());
                }
                Step::Remove(kind, name) => {
                    world.apply([gone(kind, &name.to_string())].into());
                }
                Step::Send => {
                    if let Some(response) = session.next(&world).unwrap() {
                        client.take(&mut session, &world, response);
                    }
                }
                Step::Reconnect => session = resumed("n0", &client, &world),
            }
        }
        client.drain(&mut session, &world);
        let wanted: HashMap<(Kind, String), String> = Kind::ALL
            .into_iter()
            .flat_map(|kind| world.after(kind, None).map(move |r| (kind, r)))
            .filter(|(_, r)| r.reach.includes(Some("n0")))
            .map(|(kind, r)| ((kind, r.name.to_string()), r.version_text()))
            .collect();
        prop_assert_eq!(&client.has, &wanted);
        prop_assert_eq!(client.commits.last().copied().is_some(), true);
    }
}
