//! The plugin in folders like those of a node: put in, repaired, taken away.

use std::{collections::BTreeMap, os::unix::fs::PermissionsExt as _};

use serde_json::{Value, json};

use super::*;

/// CNI folders of a node; removed on drop.
struct Folders {
    root: PathBuf,
    installer: Installer,
}

impl Folders {
    fn new(test: &str) -> Self {
        let root = std::env::temp_dir().join(format!("nodemesh-install-{}-{test}", std::process::id()));
        let (bin_dir, conf_dir) = (root.join("bin"), root.join("net.d"));
        fs::create_dir_all(&conf_dir).unwrap();
        fs::create_dir_all(&bin_dir).unwrap();
        // The program of a test is large; its place is what matters.
        fs::write(bin_dir.join(PLUGIN), "program").unwrap();
        Self { root, installer: Installer { bin_dir, conf_dir, settings: Settings::default() } }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.installer.conf_dir.join(name)
    }

    fn write(&self, name: &str, content: &Value) {
        fs::write(self.path(name), content.to_string()).unwrap();
    }

    fn all(&self) -> BTreeMap<String, Value> {
        let entries = fs::read_dir(&self.installer.conf_dir).unwrap().flatten();
        entries
            .map(|entry| {
                let text = fs::read_to_string(entry.path()).unwrap();
                let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
                (entry.file_name().into_string().unwrap(), value)
            })
            .collect()
    }

    fn types(&self, name: &str) -> Vec<String> {
        let plugins = self.all()[name]["plugins"].as_array().cloned().unwrap_or_default();
        plugins.iter().map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.root).unwrap();
    }
}

fn chain(plugins: &[&str]) -> Value {
    let plugins: Vec<Value> = plugins.iter().map(|kind| json!({"type": kind})).collect();
    json!({"cniVersion": "1.0.0", "name": "net", "plugins": plugins})
}

fn single(kind: &str) -> Value {
    json!({"cniVersion": "0.3.1", "name": "net", "type": kind})
}

#[test]
fn the_first_usable_chain_gets_the_plugin_and_the_others_do_not() {
    let folders = Folders::new("first");
    fs::write(folders.path("00-broken.conflist"), "{").unwrap();
    folders.write("05-empty.conflist", &chain(&[]));
    folders.write("10-net.conflist", &chain(&["ptp", "portmap"]));
    folders.write("20-late.conflist", &chain(&["bridge", PLUGIN]));
    assert_eq!(folders.installer.ensure().unwrap(), Installed::Put(folders.path("10-net.conflist")));
    assert_eq!(folders.types("10-net.conflist"), ["ptp", "portmap", PLUGIN]);
    assert_eq!(folders.types("20-late.conflist"), ["bridge"]);
    let before = folders.all();
    folders.installer.ensure().unwrap();
    assert_eq!(folders.all(), before, "nothing to do the second time");
}

#[test]
fn a_chain_that_another_tool_rewrites_is_repaired() {
    let folders = Folders::new("repair");
    folders.write("10-net.conflist", &chain(&["ptp"]));
    folders.installer.ensure().unwrap();
    folders.write("10-net.conflist", &chain(&["ptp", "bandwidth"]));
    folders.installer.ensure().unwrap();
    assert_eq!(folders.types("10-net.conflist"), ["ptp", "bandwidth", PLUGIN]);
    folders.write("01-other.conflist", &chain(&["cilium"]));
    folders.installer.ensure().unwrap();
    assert_eq!(folders.types("01-other.conflist"), ["cilium", PLUGIN]);
    assert_eq!(folders.types("10-net.conflist"), ["ptp", "bandwidth"]);
}

#[test]
fn removal_restores_every_file_and_takes_the_program() {
    let folders = Folders::new("remove");
    folders.write("10-net.conflist", &chain(&["ptp"]));
    folders.write("20-single.conf", &single("bridge"));
    let before = folders.all();
    folders.installer.ensure().unwrap();
    assert_ne!(folders.all(), before);
    assert!(folders.installer.remove().unwrap());
    assert_eq!(folders.all(), before);
    assert!(!folders.installer.bin_dir.join(PLUGIN).exists());
    assert!(!folders.installer.remove().unwrap(), "there is nothing left");
}

#[test]
fn a_single_plugin_becomes_a_chain_and_comes_back() {
    for (test, name) in [("conf", "10-net.conf"), ("json", "10-net.json")] {
        let folders = Folders::new(test);
        folders.write(name, &single("bridge"));
        let before = folders.all();
        assert_eq!(folders.installer.ensure().unwrap(), Installed::Put(folders.path("10-net.conflist")));
        assert_eq!(folders.types("10-net.conflist"), ["bridge", PLUGIN]);
        assert!(!folders.path(name).exists(), "it would be first again");
        assert_eq!(folders.installer.ensure().unwrap(), Installed::In(folders.path("10-net.conflist")));
        folders.installer.remove().unwrap();
        assert_eq!(folders.all(), before);
    }
}

#[test]
fn a_single_plugin_that_is_written_anew_is_what_comes_back() {
    let folders = Folders::new("anew");
    folders.write("10-net.conf", &single("bridge"));
    folders.installer.ensure().unwrap();
    folders.write("10-net.conf", &single("macvlan"));
    folders.installer.ensure().unwrap();
    assert_eq!(folders.types("10-net.conflist"), ["macvlan", PLUGIN]);
    folders.installer.remove().unwrap();
    assert_eq!(folders.all(), BTreeMap::from([("10-net.conf".to_owned(), single("macvlan"))]));
}

#[test]
fn a_node_without_a_network_is_waited_for() {
    let folders = Folders::new("none");
    assert_eq!(folders.installer.ensure().unwrap(), Installed::NoNetwork);
    let missing = Installer { conf_dir: folders.root.join("missing"), ..folders.installer.clone() };
    assert_eq!(missing.ensure().unwrap(), Installed::NoNetwork);
}

#[test]
fn a_chain_in_a_version_that_is_not_spoken_is_left_alone() {
    let folders = Folders::new("version");
    folders.write("10-net.conflist", &json!({"cniVersion": "0.2.0", "plugins": [{"type": "x"}]}));
    let before = folders.all();
    let error = folders.installer.ensure().unwrap_err();
    assert!(matches!(error, InstallError::Chain { .. }), "{error}");
    assert_eq!(folders.all(), before);
}

#[test]
fn the_program_is_copied_whole_and_can_be_run() {
    let folders = Folders::new("copy");
    folders.installer.copy_program().unwrap();
    let copy = fs::metadata(folders.installer.bin_dir.join(PLUGIN)).unwrap();
    assert_eq!(copy.len(), fs::metadata("/proc/self/exe").unwrap().len());
    assert_eq!(copy.permissions().mode() & 0o777, 0o755);
    assert_eq!(fs::read_dir(&folders.installer.bin_dir).unwrap().count(), 1, "nothing unfinished is left");
}
