//! Opening a node: programs, links, pins, prechecks, foreign programs.

use std::{fs, os::fd::AsFd as _, time::Instant};

use mesh_redirect::{Node, NodeOptions, OpenError, cleanup};

use crate::bed::{Alive, chain, plain_backend, services};

#[test]
fn every_program_is_verified_and_attached() {
    let bed = bed!();
    let started = Instant::now();
    let node = bed.node();
    eprintln!("node opened in {:?}", started.elapsed());
    let status = node.status().unwrap();
    assert_eq!(status.programs.len(), 9);
    for program in &status.programs {
        assert!(program.attached && !program.adopted, "{program:?}");
    }
    assert!(
        status.foreign.iter().all(|foreign| foreign.cgroup != status.cgroup_root),
        "{:?}",
        status.foreign
    );
    for map in &status.maps {
        assert!(map.entries == 0 && !map.is_nearly_full(), "{map:?}");
    }
}

#[test]
fn the_agent_joins_a_group_below_its_root() {
    let bed = bed!();
    let _node = bed.node();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    assert_eq!(bed.mount().join(own), bed.cgroup.join(mesh_redirect::AGENT_GROUP));
}

#[test]
fn a_root_that_is_no_cgroup_is_refused_by_name() {
    let bed = bed!();
    let options = NodeOptions { cgroup_root: Some("/etc".into()), ..bed.options() };
    let error = Node::open(options).unwrap_err();
    assert!(matches!(error, OpenError::Cgroup { .. }), "{error:?}");
    assert!(chain(&error).contains("/etc is not a cgroup-v2 group"), "{}", chain(&error));
}

#[test]
fn cleanup_takes_the_hooks_and_the_pins_away() {
    let bed = bed!();
    let (a, b) = (bed.pod(), bed.pod());
    let node = bed.node();
    let _alive = Alive::new(&node);
    let _enrolled = a.enrol(&node);
    let server = b.run(|| std::net::TcpListener::bind((b.v4, 80)).unwrap());
    let vip = "10.96.0.1:80".parse().unwrap();
    let mut writer = mesh_redirect::TableWriter::new(node.maps()).unwrap();
    writer.apply(&services(&[(vip, &[plain_backend((b.v4, 80).into())])]));
    let dial = || a.run(|| std::net::TcpStream::connect_timeout(&vip, std::time::Duration::from_millis(300)));
    dial().unwrap();
    drop(server.accept().unwrap());

    assert!(cleanup(&bed.bpffs, "test.node"));
    dial().unwrap_err();
    assert!(!bed.bpffs.join("nodemesh").exists());
    assert!(!cleanup(&bed.bpffs, "test.node"));
}

#[test]
fn a_foreign_program_on_the_root_or_above_is_reported() {
    let bed = bed!();
    // Another node's programs, on a parent group, stand for any foreign ones.
    let parent = bed.node();
    let child = bed.cgroup.join("inner");
    fs::create_dir(&child).unwrap();
    let inner = Node::open(NodeOptions { node: "inner".into(), cgroup_root: Some(child), ..bed.options() })
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    let foreign = inner.status().unwrap().foreign;
    let ours: Vec<u32> = parent.status().unwrap().programs.iter().map(|program| program.id).collect();
    for program in &parent.status().unwrap().programs {
        let found = foreign.iter().find(|foreign| foreign.id == program.id).unwrap();
        assert_eq!((&found.cgroup, found.hook, found.exclusive), (&bed.cgroup, program.name.as_str(), false));
        assert_eq!(found.name, program.name);
    }
    assert!(parent.status().unwrap().foreign.iter().all(|foreign| !ours.contains(&foreign.id)));
}

#[test]
fn an_exclusive_program_above_is_named_when_it_shuts_us_out() {
    let bed = bed!();
    let elsewhere = bed.cgroup.join("elsewhere");
    let inner = bed.cgroup.join("inner");
    fs::create_dir(&elsewhere).unwrap();
    fs::create_dir(&inner).unwrap();
    // Any connect4 program will do as the foreign one; attached the old way, without flags.
    let other =
        Node::open(NodeOptions { cgroup_root: Some(elsewhere), node: "other".into(), ..bed.options() })
            .unwrap();
    let connect4 = other.status().unwrap().programs.into_iter().find(|p| p.name == "connect4").unwrap();
    attach_exclusively(connect4.id, &bed.cgroup);

    let error = Node::open(NodeOptions { cgroup_root: Some(inner), ..bed.options() }).unwrap_err();
    let OpenError::ShutOut { foreign, .. } = &error else { panic!("{}", chain(&error)) };
    let culprit = foreign.iter().find(|program| program.exclusive).unwrap();
    assert_eq!((culprit.id, &culprit.cgroup, &*culprit.name), (connect4.id, &bed.cgroup, "connect4"));
}

#[expect(unsafe_code, reason = "aya attaches with links")]
fn attach_exclusively(program: u32, cgroup: &std::path::Path) {
    use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd};
    use std::os::fd::AsRawFd as _;
    let mut all = aya::programs::loaded_programs().filter_map(Result::ok);
    let program = all.find(|info| info.id() == program).unwrap().fd().unwrap();
    let cgroup = fs::File::open(cgroup).unwrap();
    // SAFETY: integers only.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.__bindgen_anon_5.__bindgen_anon_1.target_fd = cgroup.as_raw_fd() as u32;
    attr.__bindgen_anon_5.attach_bpf_fd = program.as_fd().as_raw_fd() as u32;
    attr.__bindgen_anon_5.attach_type = bpf_attach_type::BPF_CGROUP_INET4_CONNECT as u32;
    let command = bpf_cmd::BPF_PROG_ATTACH as nix::libc::c_long;
    // SAFETY: the attribute outlives the call and holds no pointers.
    let result =
        unsafe { nix::libc::syscall(nix::libc::SYS_bpf, command, &raw mut attr, size_of::<bpf_attr>()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_probers_cgroup_makes_the_nodes_own_entry_and_its_absence_removes_it() {
    let bed = bed!();
    let prober = bed.cgroup.join("kubelet");
    fs::create_dir(&prober).unwrap();
    let with = Node::open(NodeOptions { prober_cgroup: Some(prober.clone()), ..bed.options() }).unwrap();
    let maps = mesh_redirect::LiveTables::new(with.maps());
    let cookie = own_cookie();
    let entry = maps.pod(cookie).unwrap().unwrap();
    use std::os::unix::fs::MetadataExt as _;
    assert_eq!(entry.prober_cgroup, fs::metadata(&prober).unwrap().ino());
    assert_eq!(entry.flags, mesh_common::pod::POD_NODE);
    assert!(with.actual().unwrap().is_empty(), "the node is no pod");
    drop(with);
    let without = bed.node();
    assert_eq!(mesh_redirect::LiveTables::new(without.maps()).pod(cookie).unwrap(), None);
}

fn own_cookie() -> u64 {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    nix_cookie(socket.as_fd())
}

/// SO_NETNS_COOKIE.
#[expect(unsafe_code, reason = "nix has no name for this option")]
fn nix_cookie(socket: std::os::fd::BorrowedFd<'_>) -> u64 {
    use std::os::fd::AsRawFd as _;
    let (mut cookie, mut len) = (0_u64, 8);
    // SAFETY: an eight-byte buffer of that length.
    let result = unsafe {
        nix::libc::getsockopt(
            socket.as_raw_fd(),
            nix::libc::SOL_SOCKET,
            71,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    assert_eq!(result, 0);
    cookie
}
