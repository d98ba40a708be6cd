//! Tests of the file source over real directories; time only in those that watch.

use std::{
    os::unix::fs::symlink,
    sync::atomic::{AtomicU32, Ordering},
};

use mesh_core::snapshot::Name;

use super::*;

/// A directory of its own, gone at the end.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("mesh-control-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn source(&self) -> FileSource {
        FileSource::new(&self.0, MeshSettings::default())
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn service(name: &str, last: u8) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{clusterIP: 10.96.0.{last}, ports: [{{port: 80}}]}}}}\n"
    )
}

/// Names and addresses of all services.
fn services(snapshot: &Snapshot) -> Vec<String> {
    snapshot.services().map(|s| format!("{} {}", s.name.name, s.vips[0])).collect()
}

fn look(source: &mut FileSource) -> (Vec<String>, SourceStatus) {
    let (snapshot, status) = source.refresh().unwrap();
    (services(&snapshot), status)
}

#[test]
fn manifests_are_found_in_subfolders_and_through_links_and_hidden_names_are_not() {
    let dir = Dir::new();
    dir.write("a.yaml", &service("a", 1));
    dir.write("sub/deep/b.yml", &service("b", 2));
    dir.write("c.json", r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"c"},"spec":{"clusterIP":"10.96.0.3","ports":[{"port":80}]}}"#);
    // The way a ConfigMap is mounted.
    dir.write("..2026/d.yaml", &service("d", 4));
    symlink("..2026", dir.0.join("..data")).unwrap();
    symlink("..data/d.yaml", dir.0.join("d.yaml")).unwrap();
    symlink(".", dir.0.join("sub/loop")).unwrap();
    symlink("nowhere", dir.0.join("e.yaml")).unwrap();
    dir.write(".a.yaml.swp", "junk");
    dir.write(".f.yaml", &service("f", 6));
    dir.write("a.yaml~", "junk: [");
    dir.write("README.md", "junk: [");
    let (found, status) = look(&mut dir.source());
    assert_eq!(found, ["a 10.96.0.1", "b 10.96.0.2", "c 10.96.0.3", "d 10.96.0.4"]);
    assert_eq!((status.files, status.resources, status.errors.len()), (4, 4, 0), "{status:?}");
}

#[test]
fn a_bad_edit_keeps_the_last_good_state_of_its_file_and_the_others_stay_live() {
    let dir = Dir::new();
    dir.write("a.yaml", &format!("{}{}", service("a1", 1), service("a2", 2)));
    dir.write("b.yaml", &service("b", 3));
    let mut source = dir.source();
    look(&mut source);

    // One document is bad, the other one changed: neither counts. The other file is edited too, and counts.
    dir.write("a.yaml", &format!("{}{}", service("a1", 9), service("a2", 2).replace("port: 80", "port: x")));
    dir.write("b.yaml", &service("b", 4));
    let (found, status) = look(&mut source);
    assert_eq!(found, ["a1 10.96.0.1", "a2 10.96.0.2", "b 10.96.0.4"]);
    assert_eq!(status.files_kept_back, [dir.0.join("a.yaml")]);
    let [error] = &status.errors[..] else { panic!("{:?}", status.errors) };
    assert_eq!((&error.file, error.document), (&dir.0.join("a.yaml"), Some(2)));
    assert_eq!((error.kind.as_deref(), error.name.as_deref()), (Some("Service"), Some("a2")));
    assert_eq!(error.field, "spec.ports[0].port");
    assert_eq!(error.message, "invalid type: string \"x\", expected i32");

    dir.write("a.yaml", &format!("{}{}", service("a1", 9), service("a3", 3)));
    let (found, status) = look(&mut source);
    assert_eq!(found, ["a1 10.96.0.9", "a3 10.96.0.3", "b 10.96.0.4"]);
    assert_eq!((status.errors.len(), status.files_kept_back.len()), (0, 0));
}

#[test]
fn of_a_file_that_was_never_good_the_good_documents_are_used() {
    let dir = Dir::new();
    let bad = service("bad", 2).replace("10.96.0.2", "10.96.0");
    dir.write("a.yaml", &format!("{}{bad}", service("good", 1)));
    let mut source = dir.source();
    let (found, status) = look(&mut source);
    assert_eq!(found, ["good 10.96.0.1"]);
    assert_eq!((status.errors.len(), status.files_kept_back.len()), (1, 1));
    dir.write("a.yaml", &format!("{}{bad}{}", service("good", 7), service("more", 8)));
    assert_eq!(look(&mut source).0, ["good 10.96.0.7", "more 10.96.0.8"]);
}

#[test]
fn removing_a_file_removes_its_resources_even_if_it_was_bad() {
    let dir = Dir::new();
    dir.write("a.yaml", &service("a", 1));
    dir.write("b.yaml", &service("b", 2));
    let mut source = dir.source();
    look(&mut source);
    dir.write("a.yaml", "kind: [");
    assert_eq!(look(&mut source).0.len(), 2);
    fs::remove_file(dir.0.join("a.yaml")).unwrap();
    let (found, status) = look(&mut source);
    assert_eq!(found, ["b 10.96.0.2"]);
    assert_eq!((status.files, status.errors.len()), (1, 0));
}

#[test]
fn a_renamed_file_changes_nothing() {
    let dir = Dir::new();
    dir.write("a.yaml", &service("a", 1));
    let mut source = dir.source();
    let (before, _) = source.refresh().unwrap();
    fs::rename(dir.0.join("a.yaml"), dir.0.join("z.yaml")).unwrap();
    let (after, status) = source.refresh().unwrap();
    assert!(Arc::ptr_eq(&before, &after));
    assert_eq!(status.errors, []);
}

#[test]
fn an_edit_of_equal_length_within_the_clocks_grain_is_seen() {
    let dir = Dir::new();
    let mut source = dir.source();
    for last in 1..=9 {
        dir.write("a.yaml", &service("a", last));
        assert_eq!(look(&mut source).0, [format!("a 10.96.0.{last}")]);
    }
}

#[test]
fn a_duplicate_in_another_file_is_reported_and_takes_over_when_the_first_goes() {
    let dir = Dir::new();
    dir.write("a.yaml", &service("a", 1));
    dir.write("b.yaml", &service("a", 2));
    let mut source = dir.source();
    let (found, status) = look(&mut source);
    assert_eq!(found, ["a 10.96.0.1"]);
    let text = status.errors[0].to_string();
    assert!(text.contains("b.yaml") && text.contains("a.yaml"), "{text}");
    fs::remove_file(dir.0.join("a.yaml")).unwrap();
    let (found, status) = look(&mut source);
    assert_eq!((found, status.errors), (vec!["a 10.96.0.2".to_owned()], vec![]));
}

#[test]
fn a_file_that_cannot_be_read_keeps_its_last_good_state() {
    let dir = Dir::new();
    dir.write("a.yaml", &service("a", 1));
    let mut source = dir.source();
    look(&mut source);
    // Not UTF-8: even root cannot read that as a manifest.
    fs::write(dir.0.join("a.yaml"), [0xff, 0xfe, 0x00]).unwrap();
    let (found, status) = look(&mut source);
    assert_eq!(found, ["a 10.96.0.1"]);
    assert!(status.errors[0].message.starts_with("cannot be read: "), "{:?}", status.errors);
    dir.write("a.yaml", &service("a", 1));
    assert_eq!(look(&mut source).1.errors, []);
}

#[test]
fn a_directory_that_went_away_keeps_everything() {
    let dir = Dir::new();
    dir.write("a.yaml", &service("a", 1));
    let mut source = dir.source();
    look(&mut source);
    let away = dir.0.with_extension("away");
    fs::rename(&dir.0, &away).unwrap();
    assert!(source.refresh().is_err());
    fs::rename(&away, &dir.0).unwrap();
    assert_eq!(look(&mut source).0, ["a 10.96.0.1"]);
}

#[test]
fn a_missing_directory_is_an_error_that_names_it() {
    let error = FileSource::start("/nowhere/at/all", MeshSettings::default()).unwrap_err();
    assert_eq!(error.to_string(), "cannot list the configuration directory /nowhere/at/all");
    assert!(std::error::Error::source(&error).is_some());
}

#[test]
fn the_status_is_the_same_after_json() {
    let dir = Dir::new();
    dir.write(
        "a.yaml",
        &format!("{}---\n{{apiVersion: apps/v1, kind: Deployment}}\n---\nkind: [", service("a", 1)),
    );
    let (_, status) = look(&mut dir.source());
    assert_eq!((status.errors.len(), status.ignored.len(), status.by_kind.len()), (1, 1, 1));
    let json = serde_json::to_string(&status).unwrap();
    assert_eq!(serde_json::from_str::<SourceStatus>(&json).unwrap(), status);
}

/// Time between looks without an event, where events must do.
const NEVER: Duration = Duration::from_secs(3600);

#[test]
fn without_events_a_rescan_finds_the_change() {
    let dir = Dir::new();
    let elsewhere = Dir::new();
    elsewhere.write("a.yaml", &service("a", 1));
    symlink(elsewhere.0.join("a.yaml"), dir.0.join("a.yaml")).unwrap();
    let (snapshots, _statuses) = dir.source().watch(Duration::from_millis(50)).unwrap();
    // The link's target is outside of what is watched.
    elsewhere.write("a.yaml", &service("b", 1));
    wait_for(&snapshots, "a change behind a link", |s| has(s, "b"));
}

#[test]
fn a_thread_that_has_nothing_to_do_gives_signs_of_life() {
    let dir = Dir::new();
    let pulse = Pulse::default();
    let source = FileSource { pulse: pulse.clone(), ..dir.source() };
    assert_eq!(pulse.silence(), None, "there is no thread yet");
    let (_snapshots, _statuses) = source.watch(Duration::from_millis(50)).unwrap();
    let long_ago = Instant::now().checked_sub(pulse::STALE * 2).unwrap();
    // Twice: the first may be the one that the thread begins with.
    for _ in 0..2 {
        pulse.beat(long_ago);
        let until = Instant::now() + Duration::from_secs(30);
        while pulse.silence().is_none_or(|silence| silence > pulse::STALE) {
            assert!(Instant::now() < until, "no sign of life");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Waits for a value that satisfies `done`; fails after thirty seconds, far beyond what a slow machine needs.
fn wait_for<T: Clone>(receiver: &watch::Receiver<Arc<T>>, what: &str, done: impl Fn(&T) -> bool) -> Arc<T> {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let now = Arc::clone(&receiver.borrow());
        if done(&now) {
            return now;
        }
        assert!(Instant::now() < until, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn has(snapshot: &Snapshot, name: &str) -> bool {
    snapshot.service(&Name::new("default", name)).is_some()
}

#[test]
fn edits_are_published_as_they_happen_and_only_when_they_mean_something() {
    let dir = Dir::new();
    dir.write("a.yaml", &service("a", 1));
    let (mut snapshots, statuses) = dir.source().watch(NEVER).unwrap();
    assert!(has(&snapshots.borrow_and_update(), "a"), "the first snapshot is there at once");

    dir.write("new/folder/b.yaml", &service("b", 2));
    wait_for(&snapshots, "a file in a new folder", |s| has(s, "b"));
    // The way editors write.
    dir.write("c.yaml.tmp", &service("c", 3));
    fs::rename(dir.0.join("c.yaml.tmp"), dir.0.join("c.yaml")).unwrap();
    wait_for(&snapshots, "a renamed file", |s| has(s, "c"));

    let version = wait_for(&statuses, "the status", |s| s.files == 3).version;
    dir.write("c.yaml", "kind: [");
    wait_for(&statuses, "an error", |s| s.errors.len() == 1);
    assert_eq!(snapshots.borrow_and_update().version(), version, "the last good state is kept");
    dir.write("c.yaml", &format!("# a comment\n{}", service("c", 3)));
    wait_for(&statuses, "no error", |s| s.errors.is_empty());
    assert!(!snapshots.has_changed().unwrap());

    fs::remove_file(dir.0.join("a.yaml")).unwrap();
    let after = wait_for(&snapshots, "a removed file", |s| !has(s, "a"));
    assert!(after.version() > version && has(&after, "b") && has(&after, "c"));
}

#[test]
fn a_directory_that_is_replaced_is_watched_again() {
    let dir = Dir::new();
    dir.write("conf/a.yaml", &service("a", 1));
    let (snapshots, _statuses) =
        FileSource::new(dir.0.join("conf"), MeshSettings::default()).watch(NEVER).unwrap();
    dir.write("next/b.yaml", &service("b", 2));
    fs::rename(dir.0.join("conf"), dir.0.join("old")).unwrap();
    fs::rename(dir.0.join("next"), dir.0.join("conf")).unwrap();
    let now = wait_for(&snapshots, "the new directory", |s| has(s, "b"));
    assert!(!has(&now, "a"));
    dir.write("conf/c.yaml", &service("c", 3));
    wait_for(&snapshots, "an edit in the new directory", |s| has(s, "c"));
}

#[test]
fn what_cannot_be_looked_at_is_reported_and_what_was_below_it_is_kept() {
    let dir = Dir::new();
    dir.write("a.yaml", &service("a", 1));
    dir.write("b.yaml", &service("b", 2));
    let mut source = dir.source();
    look(&mut source);
    // A link to itself stands for every error but "not found"; root may read everything else.
    fs::remove_file(dir.0.join("a.yaml")).unwrap();
    symlink("a.yaml", dir.0.join("a.yaml")).unwrap();
    dir.write("b.yaml", &service("b", 3));
    let (found, status) = look(&mut source);
    assert_eq!(found, ["a 10.96.0.1", "b 10.96.0.3"]);
    assert_eq!(status.errors.len(), 1);
    assert!(status.errors[0].to_string().contains("a.yaml: cannot be read: "), "{:?}", status.errors);
}
