//! Values as block-style YAML, the way people write manifests.

use serde_json::Value;

/// One YAML document, without a separator.
pub(crate) fn document(value: &Value) -> String {
    let mut out = String::new();
    block(value, 0, &mut out);
    out
}

fn block(value: &Value, indent: usize, out: &mut String) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, field) in fields {
                out.push_str(&" ".repeat(indent));
                out.push_str(&key(name));
                out.push(':');
                nested(field, indent + 2, out);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                let mut text = String::new();
                block(item, indent + 2, &mut text);
                out.push_str(&" ".repeat(indent));
                out.push_str("- ");
                out.push_str(text.trim_start_matches(' '));
            }
        }
        scalar => {
            out.push_str(&" ".repeat(indent));
            // JSON's scalars, `{}` and `[]` are YAML as they stand.
            out.push_str(&scalar.to_string());
            out.push('\n');
        }
    }
}

fn nested(value: &Value, indent: usize, out: &mut String) {
    let is_block = match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if is_block {
        out.push('\n');
        block(value, indent, out);
    } else {
        out.push(' ');
        block(value, 0, out);
    }
}

fn key(name: &str) -> String {
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
    if plain && !name.is_empty() { name.to_owned() } else { Value::from(name).to_string() }
}

#[cfg(test)]
mod tests {
    use super::document;
    use serde_json::json;

    #[test]
    fn manifests_look_like_manifests() {
        let value = json!({
            "kind": "Service",
            "metadata": {"name": "a", "labels": {}},
            "spec": {"ports": [{"name": "http", "port": 80}, {"port": 81}], "ips": ["::1"]},
        });
        let expected = "\
kind: \"Service\"
metadata:
  labels: {}
  name: \"a\"
spec:
  ips:
    - \"::1\"
  ports:
    - name: \"http\"
      port: 80
    - port: 81
";
        assert_eq!(document(&value), expected);
    }
}
