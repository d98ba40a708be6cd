//! Forms that Istio's kinds share: hosts, visibility, patterns, selectors, percentages.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use mesh_core::route::{
    http::Millionths,
    matching::{FullRegex, StringMatch},
};

use super::{
    Labels,
    fields::{Node, Object},
    metadata,
};
use crate::problem::Problems;

/// Longest regular expression that is accepted, as Istio has it (S13).
const REGEX_BYTES_MAX: usize = 1024;

/// Which namespaces see a resource (`exportTo`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportTo {
    /// `*`.
    pub everyone: bool,
    /// `.`: that of the resource.
    pub own: bool,
    /// By name. With nothing else either, nobody sees it (`~`).
    pub namespaces: BTreeSet<Arc<str>>,
}

impl ExportTo {
    /// Everyone.
    pub fn everyone() -> Self {
        Self { everyone: true, ..Self::default() }
    }

    /// Whether a client of `client` sees a resource of `own`.
    pub fn includes(&self, client: &str, own: &str) -> bool {
        self.everyone || (self.own && client == own) || self.namespaces.contains(client)
    }
}

/// Reads `exportTo` and the like; `None` when it is not there or empty.
pub(super) fn export_to(
    object: &mut Object<'_>,
    name: &'static str,
    problems: &mut Problems,
) -> Option<ExportTo> {
    export_to_of(object.texts(name, problems), problems)
}

/// Reads an annotation with names of namespaces and commas between; `None` when it is empty.
pub(super) fn export_to_text(text: &str, field: &str, problems: &mut Problems) -> Option<ExportTo> {
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    export_to_of(items.map(|item| (field.to_owned(), item)).collect(), problems)
}

fn export_to_of(texts: Vec<(String, &str)>, problems: &mut Problems) -> Option<ExportTo> {
    if texts.is_empty() {
        return None;
    }
    let (mut to, mut nobody) = (ExportTo::default(), false);
    let several = texts.len() > 1;
    for (path, text) in texts {
        match text {
            "*" => to.everyone = true,
            "." => to.own = true,
            "~" => nobody = true,
            text if metadata::is_label(text) => {
                if !to.namespaces.insert(text.into()) {
                    problems.error(path.as_str(), format!("is {text:?}, which is there already"));
                }
            }
            text => {
                problems.error(path.as_str(), format!("is {text:?}, wanted a namespace, '.', '*' or '~'"))
            }
        }
        if several && matches!(text, "*" | "~") {
            problems.error(path, format!("is {text:?} beside other namespaces, wanted it alone"));
        }
    }
    if nobody {
        to = ExportTo::default();
    }
    Some(to)
}

/// Where a pattern for a text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Of headers and query parameters: a regular expression that is just `*` means that it is there (S14).
    Named,
    /// Elsewhere.
    Plain,
}

/// Reads a pattern for a text. Nothing at all (`null` or `{}`) is [`StringMatch::Present`].
pub(super) fn string_match(node: &Node<'_>, place: Place, problems: &mut Problems) -> Option<StringMatch> {
    if node.value.is_null() {
        return Some(StringMatch::Present);
    }
    let mut object = node.object(problems)?;
    let which = object.one_of(&["exact", "prefix", "regex"], problems);
    let read = match which {
        None => Some(StringMatch::Present),
        Some(name) => {
            let found = object.get(name)?;
            let text = found.text(problems)?;
            match name {
                "exact" => Some(StringMatch::Exact(text.into())),
                _ if text.is_empty() => {
                    problems.error(found.path, "is empty, wanted text");
                    None
                }
                "prefix" => Some(StringMatch::Prefix(text.into())),
                _ if text == "*" && place == Place::Named => Some(StringMatch::Present),
                _ => regex(text, &found.path, problems).map(StringMatch::Regex),
            }
        }
    };
    object.finish(problems);
    read
}

/// Compiles a regular expression that matches whole texts.
pub(super) fn regex(text: &str, path: &str, problems: &mut Problems) -> Option<FullRegex> {
    if text.len() > REGEX_BYTES_MAX {
        let message = format!("has {} bytes, wanted at most {REGEX_BYTES_MAX}", text.len());
        problems.error(path, message);
        return None;
    }
    match FullRegex::new(text) {
        Ok(regex) => Some(regex),
        Err(error) => {
            let error = error.to_string();
            let why = error.lines().last().unwrap_or_default().trim().trim_start_matches("error: ");
            problems.error(path, format!("is {text:?}, wanted a regular expression: {why}"));
            None
        }
    }
}

/// Reads a map of labels.
pub(super) fn labels(object: &mut Object<'_>, name: &'static str, problems: &mut Problems) -> Labels {
    let mut labels = Labels::new();
    for (key, node) in object.entries(name, problems) {
        let Some(value) = node.text(problems) else { continue };
        if let Err(wanted) = check_label(key, value) {
            problems.error(node.path, format!("is {value:?}, wanted {wanted}"));
        }
        labels.insert(key.into(), value.into());
    }
    labels
}

/// Checks a label as Kubernetes does.
fn check_label(key: &str, value: &str) -> Result<(), &'static str> {
    let is_fit = |text: &str| {
        let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
        text.len() <= 63
            && edge(text.bytes().next())
            && edge(text.bytes().next_back())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let (prefix, name) = key.rsplit_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if !is_fit(name) || !prefix.is_none_or(metadata::is_subdomain) {
        return Err("a label whose key is a name, or a domain and a name as in example.com/name");
    }
    if !value.is_empty() && !is_fit(value) {
        return Err("a label's value: letters, digits, '-', '_' and '.', at most 63");
    }
    Ok(())
}

/// Reads `workloadSelector`; `inner` is the name of its map of labels. Empty when there is none.
pub(super) fn selector(
    object: &mut Object<'_>,
    name: &'static str,
    inner: &'static str,
    problems: &mut Problems,
) -> Labels {
    let Some(mut selector) = object.object(name, problems) else { return Labels::new() };
    let labels = labels(&mut selector, inner, problems);
    if labels.is_empty() {
        problems.warning(selector.at(inner), "is empty: all workloads of the namespace are selected");
    }
    selector.finish(problems);
    labels
}

/// Reads a percentage as `{value: 12.5}`.
pub(super) fn percent(
    object: &mut Object<'_>,
    name: &'static str,
    problems: &mut Problems,
) -> Option<Millionths> {
    let mut percent = object.object(name, problems)?;
    let value = percent.float("value", 0.0..=100.0, problems).unwrap_or_default();
    percent.finish(problems);
    Some(share(value))
}

/// Per cent in millionths, to the nearest; what is smaller is none.
pub(super) fn share(percent: f64) -> Millionths {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 1,000,000")]
    Millionths((percent.clamp(0.0, 100.0) * 10_000.0).round() as u32)
}

/// Reads a list of networks; an address alone is a network of one.
pub(super) fn nets(object: &mut Object<'_>, name: &'static str, problems: &mut Problems) -> Vec<IpNet> {
    let mut nets = Vec::new();
    for (path, text) in object.texts(name, problems) {
        match net(text) {
            Some(net) => nets.push(net),
            None => {
                let wanted =
                    "wanted an address such as 10.0.0.1 or a network such as 10.0.0.0/8 or fd00::/64";
                problems.error(path, format!("is {text:?}, {wanted}"));
            }
        }
    }
    nets
}

/// An address or a network; IPv4 that is written as IPv6 is IPv4.
pub(super) fn net(text: &str) -> Option<IpNet> {
    if let Ok(addr) = text.parse::<IpAddr>() {
        return Some(addr.to_canonical().into());
    }
    let net = text.parse::<IpNet>().ok()?;
    let mapped = match (net.addr().to_canonical(), net.prefix_len().checked_sub(96)) {
        (IpAddr::V4(v4), Some(len)) if net.addr().is_ipv6() => IpNet::new(v4.into(), len).ok(),
        _ => None,
    };
    Some(mapped.unwrap_or(net).trunc())
}
