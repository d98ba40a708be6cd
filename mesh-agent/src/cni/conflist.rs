//! Owns the node's CNI configuration as text: putting the plugin's entry into a chain, and taking it out.
//!
//! Invariants:
//! - Pure. Ours is in a chain once, and last; every other entry stays as it is and where it is.
//! - Taking it out gives what was there before it was put in.
//! - A chain that is as it should be is left alone, so that two who repair do not fight.

use serde_json::{Value, json};

use super::{PLUGIN, VERSIONS, input::Settings};

/// What a file of the configuration folder holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A chain: `*.conflist`.
    List,
    /// One plugin: `*.conf`, `*.json`.
    Single,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChainError {
    /// Not JSON, or not of the shape of a configuration.
    #[error("is no CNI configuration: {0}")]
    Shape(String),
    /// The runtime would ask our plugin in a version it does not speak, and no pod would start.
    #[error("has cniVersion {found:?}, wanted one of {wanted}", found = .0, wanted = VERSIONS.join(", "))]
    Version(String),
}

impl Form {
    /// By the end of a file's name; `None` for files that are no configuration.
    pub fn of(file: &str) -> Option<Self> {
        match file.rsplit_once('.')?.1 {
            "conflist" => Some(Self::List),
            "conf" | "json" => Some(Self::Single),
            _ => None,
        }
    }
}

/// The plugin's entry in a chain.
pub fn entry(settings: &Settings) -> Value {
    json!({"type": PLUGIN, "nodemesh": settings})
}

/// Whether a text is a configuration that a runtime would take: one with at least one plugin besides ours.
pub fn is_usable(text: &str, form: Form) -> bool {
    parse(text, form).is_ok_and(|chain| others(&chain) > 0)
}

/// Whether the entry is in there, in whatever shape.
pub fn has_ours(text: &str, form: Form) -> bool {
    parse(text, form)
        .is_ok_and(|chain| chain["plugins"].as_array().is_some_and(|all| all.iter().any(is_ours)))
}

/// The chain with `entry` last; `None` when it is so already. A single plugin becomes a chain.
///
/// # Errors
/// [`ChainError`].
pub fn insert(text: &str, form: Form, entry: &Value) -> Result<Option<String>, ChainError> {
    let mut chain = parse(text, form)?;
    let version = chain["cniVersion"].as_str().unwrap_or_default();
    if !VERSIONS.contains(&version) {
        return Err(ChainError::Version(version.to_owned()));
    }
    let before = chain.clone();
    let Some(plugins) = chain["plugins"].as_array_mut() else {
        return Err(ChainError::Shape("plugins is no list".to_owned()));
    };
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.push(entry.clone());
    Ok((form == Form::Single || chain != before).then(|| pretty(&chain)))
}

/// The chain without the entry; `None` when it is not in there.
///
/// # Errors
/// [`ChainError`].
pub fn remove(text: &str) -> Result<Option<String>, ChainError> {
    let mut chain = parse(text, Form::List)?;
    let Some(plugins) = chain["plugins"].as_array_mut() else {
        return Err(ChainError::Shape("plugins is no list".to_owned()));
    };
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    let changed = plugins.len() != before;
    Ok(changed.then(|| pretty(&chain)))
}

/// A configuration as a chain.
fn parse(text: &str, form: Form) -> Result<Value, ChainError> {
    let shape = |message: &str| ChainError::Shape(message.to_owned());
    let value: Value = serde_json::from_str(text).map_err(|error| shape(&error.to_string()))?;
    if !value.is_object() {
        return Err(shape("it is no object"));
    }
    match form {
        Form::List if value["plugins"].is_array() => Ok(value),
        Form::List => Err(shape("plugins is missing")),
        Form::Single if value["type"].is_string() => {
            let mut chain = json!({"plugins": [value]});
            for field in ["cniVersion", "name"] {
                if let Some(given) = chain["plugins"][0].get(field).cloned() {
                    chain[field] = given;
                }
            }
            Ok(chain)
        }
        Form::Single => Err(shape("type is missing")),
    }
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN
}

fn others(chain: &Value) -> usize {
    chain["plugins"].as_array().map_or(0, |all| all.iter().filter(|plugin| !is_ours(plugin)).count())
}

fn pretty(chain: &Value) -> String {
    format!("{chain:#}\n")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ours() -> Value {
        entry(&Settings::default())
    }

    fn value(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-zA-Z]{1,8}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// A plugin: any object with a type, which may be ours.
    fn plugin() -> impl Strategy<Value = Value> {
        let kind = prop_oneof![4 => "[a-z]{1,10}", 1 => Just(PLUGIN.to_owned())];
        (kind, prop::collection::btree_map("[a-zA-Z]{1,8}", json_value(), 0..4)).prop_map(|(kind, fields)| {
            let mut object: serde_json::Map<String, Value> = fields.into_iter().collect();
            object.insert("type".into(), kind.into());
            Value::Object(object)
        })
    }

    fn chain() -> impl Strategy<Value = Value> {
        let version = prop::sample::select(VERSIONS.to_vec());
        (version, "[a-z]{1,8}", prop::collection::vec(plugin(), 0..5), json_value())
            .prop_map(|(version, name, plugins, extra)| {
                json!({"cniVersion": version, "name": name, "plugins": plugins, "extra": extra})
            })
    }

    proptest! {
        #[test]
        fn ours_is_in_once_and_last_and_the_others_are_untouched(chain in chain()) {
            let text = chain.to_string();
            let with = insert(&text, Form::List, &ours()).unwrap().map_or_else(|| chain.clone(), |t| value(&t));
            let plugins = with["plugins"].as_array().unwrap();
            prop_assert_eq!(plugins.last(), Some(&ours()));
            prop_assert_eq!(plugins.iter().filter(|p| is_ours(p)).count(), 1);
            let before = chain["plugins"].as_array().unwrap();
            let foreign: Vec<&Value> = before.iter().filter(|p| !is_ours(p)).collect();
            prop_assert_eq!(plugins[..plugins.len() - 1].iter().collect::<Vec<_>>(), foreign);
            prop_assert_eq!(&with["extra"], &value(&text)["extra"]);
            // A chain that is as it should be is left alone.
            prop_assert_eq!(insert(&with.to_string(), Form::List, &ours()).unwrap(), None);
        }

        #[test]
        fn taking_it_out_gives_what_was_there_before(mut chain in chain()) {
            let plugins = chain["plugins"].as_array_mut().unwrap();
            plugins.retain(|plugin| !is_ours(plugin));
            let text = chain.to_string();
            let with = insert(&text, Form::List, &ours()).unwrap().unwrap();
            prop_assert_eq!(value(&remove(&with).unwrap().unwrap()), value(&text));
            prop_assert_eq!(remove(&text).unwrap(), None);
        }

        #[test]
        fn a_single_plugin_becomes_a_chain_of_itself_and_ours(plugin in plugin(), version in prop::sample::select(VERSIONS.to_vec())) {
            prop_assume!(!is_ours(&plugin));
            let mut single = plugin;
            single["cniVersion"] = version.into();
            single["name"] = "net".into();
            let chain = value(&insert(&single.to_string(), Form::Single, &ours()).unwrap().unwrap());
            prop_assert_eq!(&chain["plugins"], &json!([value(&single.to_string()), ours()]));
            prop_assert_eq!((&chain["cniVersion"], &chain["name"]), (&json!(version), &json!("net")));
        }

        #[test]
        fn no_text_is_a_panic(text: String) {
            for form in [Form::List, Form::Single] {
                drop(insert(&text, form, &ours()));
                is_usable(&text, form);
            }
            drop(remove(&text));
        }
    }

    #[test]
    fn a_version_that_the_plugin_does_not_speak_is_refused() {
        for version in ["0.2.0", "9.9.9"] {
            let chain = json!({"cniVersion": version, "plugins": [{"type": "x"}]}).to_string();
            assert_eq!(insert(&chain, Form::List, &ours()), Err(ChainError::Version(version.into())));
        }
    }

    #[test]
    fn an_older_entry_of_ours_is_replaced() {
        let old = json!({"cniVersion": "1.0.0", "plugins": [{"type": PLUGIN, "nodemesh": 1}, {"type": "x"}]});
        let new = insert(&old.to_string(), Form::List, &ours()).unwrap().unwrap();
        assert_eq!(value(&new)["plugins"], json!([{"type": "x"}, ours()]));
    }
}
