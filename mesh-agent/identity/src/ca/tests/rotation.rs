//! Rotations of what signs: in steps, with overlap, through crashes, by several processes at once.

use std::{sync::Barrier, thread};

use super::*;

/// Until when a rotation's new root only is announced.
const ANNOUNCE: Duration = Duration::from_secs(600);

fn roots(ca: &Ca) -> Vec<CertificateDer<'static>> {
    ca.trust().borrow().roots.clone()
}

/// The root that a certificate issued now chains to.
fn signing_root(ca: &Ca) -> CertificateDer<'static> {
    let svid = certify(ca, "probe");
    let fits = |root: &CertificateDer<'static>| {
        let material = TrustMaterial { roots: vec![root.clone()], ..TrustMaterial::default() };
        let bundle = Trust::new(TrustDomains::new("cluster.local"), material).unwrap().current();
        svid.check(&bundle, ca.options.clock.now()).is_ok()
    };
    let fitting: Vec<_> = roots(ca).into_iter().filter(fits).collect();
    assert_eq!(fitting.len(), 1, "exactly one trusted root signed it");
    fitting[0].clone()
}

#[test]
fn a_new_root_is_trusted_then_signs_and_the_old_one_stays_until_all_it_signed_has_ended() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    let old = signing_root(&ca);
    let of_old = certify(&ca, "cart");

    ca.rotate(None).unwrap();
    assert_eq!(roots(&ca).len(), 2, "announced");
    assert_eq!(signing_root(&ca), old);
    let everywhere = bundle(&ca);
    ca.rotate(None).unwrap();
    assert_eq!(roots(&ca).len(), 2, "a second rotation waits for the first");

    clock.advance(ANNOUNCE);
    ca.refresh().unwrap();
    let new = signing_root(&ca);
    assert_ne!(new, old);
    assert_eq!(certify(&ca, "cart").check(&everywhere, clock.now()), Ok(()), "known before it signed");
    assert_eq!(of_old.check(&bundle(&ca), clock.now()), Ok(()), "the old one is still trusted");
    assert_eq!(ca.counters().root_switches, 1);

    clock.advance(89 * DAY);
    ca.refresh().unwrap();
    assert!(roots(&ca).contains(&old));
    clock.advance(2 * DAY);
    ca.refresh().unwrap();
    assert_eq!(roots(&ca), [new]);
}

#[test]
fn a_restart_in_the_middle_of_a_rotation_changes_nothing() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    let old = signing_root(&ca);
    ca.rotate(None).unwrap();
    let trusted = roots(&ca);
    drop(ca);
    let ca = open(&folder, &clock);
    assert_eq!(roots(&ca), trusted);
    assert_eq!(signing_root(&ca), old);
    drop(ca);
    clock.advance(ANNOUNCE);
    let ca = open(&folder, &clock);
    assert_ne!(signing_root(&ca), old);
    assert!(roots(&ca).contains(&old));
    drop(ca);
    assert!(roots(&open(&folder, &clock)).contains(&old), "and after another restart");
}

#[test]
fn a_crash_at_any_step_of_a_rotation_leaves_a_ca_that_finishes_it() {
    let mut steps = 0;
    for fuse in 0.. {
        let (folder, clock) = (Folder::new(), SetClock::new());
        let ca = open(&folder, &clock);
        let old = signing_root(&ca);
        let of_old = certify(&ca, "cart");
        ca.store.fuse.store(fuse, Ordering::Relaxed);
        let announced = ca.rotate(None);
        clock.advance(ANNOUNCE);
        let switched = ca.refresh();
        let died = announced.is_err() || switched.is_err();
        drop(ca);

        // The next process, twice, for a crash must not be found again.
        for _ in 0..2 {
            let ca = open(&folder, &clock);
            assert_eq!(of_old.check(&bundle(&ca), clock.now()), Ok(()), "step {fuse}");
            let _signs = signing_root(&ca);
        }
        let ca = open(&folder, &clock);
        if signing_root(&ca) == old {
            // Nothing was announced durably: a rotation begins anew.
            ca.rotate(None).unwrap();
            clock.advance(ANNOUNCE);
            ca.refresh().unwrap();
        }
        assert_ne!(signing_root(&ca), old, "step {fuse}");
        assert_eq!(of_old.check(&bundle(&ca), clock.now()), Ok(()), "step {fuse}");
        // And yet another one, from this state.
        let second = signing_root(&ca);
        ca.rotate(None).unwrap();
        clock.advance(ANNOUNCE);
        ca.refresh().unwrap();
        assert_ne!(signing_root(&ca), second, "step {fuse}");
        steps = fuse;
        if !died {
            break;
        }
    }
    assert!(steps >= 10, "a rotation has more steps than {steps}");
}

#[test]
fn a_crash_while_the_first_root_is_made_is_repaired() {
    for fuse in 0..8 {
        let (folder, clock) = (Folder::new(), SetClock::new());
        let store = Store::open(folder.path()).unwrap();
        store.fuse.store(fuse, Ordering::Relaxed);
        let options = options(&folder, &clock);
        let made = load(&store, &options, "cluster.local", &mut Reload::default());
        assert!(made.is_ok() || fuse < 6, "step {fuse}");
        let ca = open(&folder, &clock);
        let root = signing_root(&ca);
        assert_eq!(signing_root(&open(&folder, &clock)), root, "step {fuse}");
    }
}

#[test]
fn an_unfinished_switch_never_takes_the_key_of_the_next_rotation() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    ca.rotate(Some(Duration::ZERO)).unwrap();
    let root = signing_root(&ca);
    ca.rotate(None).unwrap();
    drop(ca);
    assert_eq!(signing_root(&open(&folder, &clock)), root);
}

#[test]
fn a_switch_that_is_done_is_written_down_before_anything_else_happens() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    ca.rotate(None).unwrap();
    clock.advance(ANNOUNCE);
    let locked = ca.store.lock().unwrap();
    let mut journal = Journal::read(&locked).unwrap();
    assert!(journal.announced.is_some());
    assert!(journal.advance(&locked, clock.now()).unwrap());
    let written = Journal::read(&locked).unwrap();
    assert_eq!((written.announced, written.switching), (None, None));
}

#[test]
fn a_crash_within_a_switch_is_finished_even_if_the_clock_was_set_back() {
    for fuse in 0..8 {
        let (folder, clock) = (Folder::new(), SetClock::new());
        let ca = open(&folder, &clock);
        let of_old = certify(&ca, "cart");
        ca.rotate(None).unwrap();
        clock.advance(ANNOUNCE);
        ca.store.fuse.store(fuse, Ordering::Relaxed);
        drop(ca.refresh());
        drop(ca);
        clock.set_back(ANNOUNCE);
        let ca = open(&folder, &clock);
        assert_eq!(of_old.check(&bundle(&ca), clock.now()), Ok(()), "step {fuse}");
        assert_eq!(certify(&ca, "cart").check(&bundle(&ca), clock.now()), Ok(()), "step {fuse}");
    }
}

#[test]
fn agents_that_share_a_folder_make_one_root() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let barrier = Barrier::new(8);
    let all: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    roots(&open(&folder, &clock))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(all.iter().all(|roots| *roots == all[0] && roots.len() == 1));
}

#[test]
fn agents_that_share_a_folder_rotate_together_and_accept_each_other_throughout() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let agents: Vec<Ca> = (0..2).map(|_| open(&folder, &clock)).collect();
    let old = signing_root(&agents[0]);
    let accept_each_other = |when: &str| {
        for (a, b) in [(0, 1), (1, 0)] {
            let svid = certify(&agents[a], "cart");
            assert_eq!(svid.check(&bundle(&agents[b]), clock.now()), Ok(()), "{when}: {a} at {b}");
        }
    };
    thread::scope(|scope| {
        for agent in &agents {
            scope.spawn(|| agent.rotate(None).unwrap());
        }
    });
    agents.iter().for_each(|agent| agent.refresh().unwrap());
    assert_eq!(roots(&agents[0]).len(), 2, "one new root for both");
    assert_eq!(roots(&agents[0]), roots(&agents[1]));
    accept_each_other("announced");
    clock.advance(ANNOUNCE);
    agents[0].refresh().unwrap();
    accept_each_other("switched by one");
    agents[1].refresh().unwrap();
    accept_each_other("switched by both");
    assert_eq!(signing_root(&agents[0]), signing_root(&agents[1]));
    assert_ne!(signing_root(&agents[0]), old);
}

#[test]
fn a_root_near_its_end_is_rotated_by_itself() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    let old = signing_root(&ca);
    clock.advance(ROOT_LIFE - 366 * DAY);
    ca.refresh().unwrap();
    assert_eq!(roots(&ca).len(), 1);
    clock.advance(2 * DAY);
    ca.refresh().unwrap();
    assert_eq!((roots(&ca).len(), signing_root(&ca)), (2, old.clone()));
    clock.advance(ANNOUNCE);
    ca.refresh().unwrap();
    assert_ne!(signing_root(&ca), old);
}

#[test]
fn another_plugged_in_root_is_announced_before_it_signs_and_the_old_one_stays() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let (first, second) = (Forger::root("first"), Forger::root("second"));
    let ca = Ca::open_with(options(&folder, &clock), Some(plugged_in(&first, &first))).unwrap();
    let of_first = certify(&ca, "cart");
    ca.replace(Some(plugged_in(&second, &second))).unwrap();
    assert_eq!(signing_root(&ca), first.certificate);
    assert!(roots(&ca).contains(&second.certificate));
    clock.advance(ANNOUNCE);
    ca.refresh().unwrap();
    assert_eq!(signing_root(&ca), second.certificate);
    assert_eq!(of_first.check(&bundle(&ca), clock.now()), Ok(()));
    drop(ca);
    let ca = Ca::open_with(options(&folder, &clock), Some(plugged_in(&second, &second))).unwrap();
    assert!(roots(&ca).contains(&first.certificate), "remembered across a restart");
    clock.advance(91 * DAY);
    ca.refresh().unwrap();
    assert_eq!(roots(&ca), [second.certificate]);
}

#[test]
fn another_intermediate_of_the_same_root_signs_at_once() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let root = Forger::root("root");
    let (first, second) = (root.intermediate("first"), root.intermediate("second"));
    let ca = Ca::open_with(options(&folder, &clock), Some(plugged_in(&first, &root))).unwrap();
    ca.replace(Some(plugged_in(&second, &root))).unwrap();
    assert_eq!(certify(&ca, "cart").chain()[1], second.certificate);
    assert_eq!(roots(&ca), [root.certificate]);
}

#[test]
fn a_ca_plugged_into_a_folder_with_a_self_signed_root_takes_over_with_overlap() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    let of_old = certify(&ca, "cart");
    ca.rotate(None).unwrap();
    let root = Forger::root("root");
    let intermediate = root.intermediate("intermediate");
    for (name, content) in [
        (CERT_CHAIN, &intermediate.pem),
        (ROOT_CERT, &root.pem),
        (CA_KEY, &intermediate.key_pem),
        (CA_CERT, &intermediate.pem),
    ] {
        folder.write(name, content);
        // Half-copied files are refused or not yet seen; the old CA goes on.
        drop(ca.refresh());
        assert_eq!(of_old.check(&bundle(&ca), clock.now()), Ok(()), "{name}");
        let _signs = signing_root(&ca);
    }
    clock.advance(ANNOUNCE);
    ca.refresh().unwrap();
    assert_eq!(roots(&ca).len(), 2, "the announced root was given up");
    assert_eq!(signing_root(&ca), root.certificate);
    assert_eq!(of_old.check(&bundle(&ca), clock.now()), Ok(()));
}

#[test]
fn removing_the_journal_forgets_retired_roots_at_once() {
    let (folder, clock) = (Folder::new(), SetClock::new());
    let ca = open(&folder, &clock);
    ca.rotate(Some(Duration::ZERO)).unwrap();
    assert_eq!(roots(&ca).len(), 2);
    std::fs::remove_file(folder.path().join("rotation.json")).unwrap();
    ca.refresh().unwrap();
    assert_eq!(roots(&ca).len(), 1);
}

#[test]
fn a_folder_without_a_journal_takes_the_roots_it_is_told_of_and_a_later_loss_is_on_purpose() {
    let (clock, first, second) = (SetClock::new(), Forger::root("first"), Forger::root("second"));
    let folder = Folder::new();
    let ca = Ca::open_with(options(&folder, &clock), Some(plugged_in(&first, &first))).unwrap();
    let of_first = certify(&ca, "cart");
    assert_eq!(ca.retired(), []);

    let folder = Folder::new();
    let in_use = |forger: &Forger| KnownRoot { certificate: forger.certificate.clone(), until: None };
    let told = |known| CaOptions { known, ..options(&folder, &clock) };
    let ca = Ca::open_with(told(vec![in_use(&first), in_use(&second)]), Some(plugged_in(&second, &second)))
        .unwrap();
    assert_eq!(roots(&ca).len(), 2);
    assert_eq!(of_first.check(&bundle(&ca), clock.now()), Ok(()));
    assert_eq!(certify(&ca, "bank").check(&bundle(&ca), clock.now()), Ok(()));
    let retired = ca.retired();
    let until = Some(clock.now() + 90 * DAY);
    assert_eq!(retired, [KnownRoot { certificate: first.certificate.clone(), until }]);

    // Another folder: what is told of it has its end, and no later one than this CA would give it.
    clock.advance(80 * DAY);
    let folder = Folder::new();
    let third = Forger::root("third");
    let far = KnownRoot { certificate: third.certificate, until: Some(clock.now() + 900 * DAY) };
    let known = [retired, vec![in_use(&second), far]].concat();
    let told = CaOptions { known, ..options(&folder, &clock) };
    let ca = Ca::open_with(told.clone(), Some(plugged_in(&second, &second))).unwrap();
    assert_eq!(roots(&ca).len(), 3);
    clock.advance(11 * DAY);
    ca.refresh().unwrap();
    assert!(!roots(&ca).contains(&first.certificate), "restarts do not make it last");
    assert_eq!(roots(&ca).len(), 2);
    std::fs::remove_file(folder.path().join("rotation.json")).unwrap();
    ca.refresh().unwrap();
    assert_eq!(roots(&ca), std::slice::from_ref(&second.certificate));
    clock.advance(80 * DAY);
    drop(ca);
    let ca = Ca::open_with(told, Some(plugged_in(&second, &second))).unwrap();
    assert_eq!(roots(&ca), [second.certificate], "the journal knows better than what others remember");
}
