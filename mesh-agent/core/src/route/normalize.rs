//! Normal forms of paths (S96), so that a rule and the server behind it read one path alike.
//!
//! Invariants:
//! - What is matched is what is forwarded.
//! - Nothing is decoded twice: `%252e` stays what it is.
//! - A path that is in normal form already is not copied.

use std::borrow::Cow;

/// How far paths are normalised; `pathNormalization` of MeshConfig.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PathNormalization {
    /// Not at all.
    None,
    /// Dot segments, backslashes, and encoded characters that need no encoding.
    #[default]
    Base,
    /// And runs of slashes become one.
    MergeSlashes,
    /// And `%2F` and `%5C` are slashes.
    DecodeAndMergeSlashes,
}

/// A path that is not forwarded: 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// `%00`, which servers read differently.
    #[error("the path has an encoded NUL")]
    EncodedNul,
}

impl PathNormalization {
    /// The normal form of a path without query. What is no path (`*`, or the authority of a CONNECT) stays as it is.
    ///
    /// # Errors
    /// When it must not be forwarded.
    pub fn apply<'p>(self, path: &'p str) -> Result<Cow<'p, str>, PathError> {
        if self == Self::None || !path.starts_with('/') {
            return Ok(Cow::Borrowed(path));
        }
        let merges = matches!(self, Self::MergeSlashes | Self::DecodeAndMergeSlashes);
        let decoded = decode(path, self == Self::DecodeAndMergeSlashes)?;
        let undotted = match decoded {
            Cow::Borrowed(path) if !has_dot_segment(path) => Cow::Borrowed(path),
            decoded => Cow::Owned(remove_dot_segments(&decoded)),
        };
        if merges && undotted.contains("//") {
            let mut merged = String::with_capacity(undotted.len());
            for piece in undotted.chars() {
                if piece != '/' || !merged.ends_with('/') {
                    merged.push(piece);
                }
            }
            return Ok(Cow::Owned(merged));
        }
        Ok(undotted)
    }
}

/// Decodes what needs no encoding, and slashes if told so; backslashes become slashes.
fn decode(path: &str, slashes: bool) -> Result<Cow<'_, str>, PathError> {
    if !path.bytes().any(|byte| byte == b'%' || byte == b'\\') {
        return Ok(Cow::Borrowed(path));
    }
    let mut decoded = String::with_capacity(path.len());
    let mut rest = path;
    // Where a `%` stands that begins no escape: what is decoded behind it must not make one of it (`%2%65`).
    let mut stray = None;
    while let Some(at) = rest.find(['%', '\\']) {
        let (clean, special) = rest.split_at(at);
        decoded.push_str(clean);
        let escape = special.get(..3).filter(|escape| escape.starts_with('%'));
        let byte = escape.and_then(|escape| hex(escape.as_bytes().get(1..)?));
        let behind_stray = stray.is_some_and(|stray: usize| decoded.len() - stray <= 2);
        let (replacement, len) = match byte {
            Some(0) => return Err(PathError::EncodedNul),
            Some(_) if behind_stray => ('%', 1),
            Some(byte) if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => (char::from(byte), 3),
            Some(b'/' | b'\\') if slashes => ('/', 3),
            None if special.starts_with('\\') => ('/', 1),
            // Encoded for a reason.
            Some(_) => ('%', 1),
            None => {
                stray = Some(decoded.len());
                ('%', 1)
            }
        };
        decoded.push(replacement);
        rest = special.get(len..).unwrap_or_default();
    }
    decoded.push_str(rest);
    Ok(Cow::Owned(decoded))
}

fn hex(digits: &[u8]) -> Option<u8> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    match digits {
        [high, low] => u8::try_from(digit(high)? << 4 | digit(low)?).ok(),
        _ => None,
    }
}

fn has_dot_segment(path: &str) -> bool {
    path.split('/').any(|segment| segment == "." || segment == "..")
}

/// RFC 3986 §5.2.4. `path` begins with `/`, and so does the result.
fn remove_dot_segments(path: &str) -> String {
    let mut segments: Vec<&str> = Vec::new();
    let mut ends_in_directory = false;
    for segment in path.split('/').skip(1) {
        ends_in_directory = matches!(segment, "." | "..");
        match segment {
            "." => {}
            ".." => {
                segments.pop();
            }
            segment => segments.push(segment),
        }
    }
    let mut clean = String::with_capacity(path.len());
    for segment in &segments {
        clean.push('/');
        clean.push_str(segment);
    }
    if ends_in_directory || clean.is_empty() {
        clean.push('/');
    }
    clean
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_level_normalises_what_it_says() {
        use PathNormalization::*;
        // Path, then its form by NONE, BASE, MERGE_SLASHES, DECODE_AND_MERGE_SLASHES.
        let cases = [
            ("/a/b", ["/a/b", "/a/b", "/a/b", "/a/b"]),
            ("/a/./b", ["/a/./b", "/a/b", "/a/b", "/a/b"]),
            ("/a/../b", ["/a/../b", "/b", "/b", "/b"]),
            ("/..", ["/..", "/", "/", "/"]),
            ("/../../b", ["/../../b", "/b", "/b", "/b"]),
            ("/a/..", ["/a/..", "/", "/", "/"]),
            ("/a/b/.", ["/a/b/.", "/a/b/", "/a/b/", "/a/b/"]),
            ("/a\\b", ["/a\\b", "/a/b", "/a/b", "/a/b"]),
            ("/a\\..\\b", ["/a\\..\\b", "/b", "/b", "/b"]),
            ("/%61%7e", ["/%61%7e", "/a~", "/a~", "/a~"]),
            ("/a/%2e%2E/b", ["/a/%2e%2E/b", "/b", "/b", "/b"]),
            ("/%252e", ["/%252e", "/%252e", "/%252e", "/%252e"]),
            ("/a//b", ["/a//b", "/a//b", "/a/b", "/a/b"]),
            ("//", ["//", "//", "/", "/"]),
            ("/a%2Fb", ["/a%2Fb", "/a%2Fb", "/a%2Fb", "/a/b"]),
            ("/a%5c%2f../b", ["/a%5c%2f../b", "/a%5c%2f../b", "/a%5c%2f../b", "/a/b"]),
            ("/%2%65%2%65/", ["/%2%65%2%65/", "/%2%65%2%65/", "/%2%65%2%65/", "/%2%65%2%65/"]),
            ("/a%zz%", ["/a%zz%", "/a%zz%", "/a%zz%", "/a%zz%"]),
            ("/%C3%A9/%20", ["/%C3%A9/%20", "/%C3%A9/%20", "/%C3%A9/%20", "/%C3%A9/%20"]),
            ("/a...", ["/a...", "/a...", "/a...", "/a..."]),
            ("*", ["*", "*", "*", "*"]),
            ("", ["", "", "", ""]),
        ];
        for (path, forms) in cases {
            for (level, form) in [None, Base, MergeSlashes, DecodeAndMergeSlashes].into_iter().zip(forms) {
                assert_eq!(level.apply(path).as_deref(), Ok(form), "{path} by {level:?}");
            }
        }
    }

    #[test]
    fn an_encoded_nul_is_refused_unless_nothing_is_normalised() {
        assert_eq!(PathNormalization::Base.apply("/a%00b"), Err(PathError::EncodedNul));
        assert!(PathNormalization::None.apply("/a%00b").is_ok());
    }

    #[test]
    fn a_path_in_normal_form_is_not_copied() {
        for level in [PathNormalization::Base, PathNormalization::DecodeAndMergeSlashes] {
            assert!(matches!(level.apply("/a/b.c/..d"), Ok(Cow::Borrowed(_))));
        }
    }

    proptest! {
        #[test]
        fn no_dot_segment_is_left_and_a_second_time_changes_nothing(
            path in "/(/|\\.|\\\\|%2e|%2F|%5c|%|2|25|65|%65|%32|a){0,24}",
        ) {
            let base = PathNormalization::Base.apply(&path).unwrap();
            prop_assert!(base.starts_with('/'));
            prop_assert_eq!(PathNormalization::Base.apply(&base).unwrap(), base.clone());
            prop_assert!(!base.split('/').any(|segment| segment == "." || segment == ".."));
            let all = PathNormalization::DecodeAndMergeSlashes.apply(&path).unwrap();
            prop_assert_eq!(PathNormalization::DecodeAndMergeSlashes.apply(&all).unwrap(), all.clone());
            prop_assert!(!all.contains("//") && !all.contains('\\'), "{}", all);
            prop_assert!(!all.split('/').any(|segment| segment == "." || segment == ".."));
        }
    }
}
