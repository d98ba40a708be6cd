//! Request targets that the HTTP library would refuse although clients send them: `?query=up{job="x"}`.
//!
//! A target may hold no `"`, `<`, `>` or backtick (RFC 3986), but curl, browsers and Envoy let them pass. They are percent-encoded
//! here, which means the same to every server.
//!
//! Not here: spaces, controls, and what follows a `#`. They stay as they are, and are refused or dropped as before.

/// The request line with such characters percent-encoded; `None`: it has none.
pub(super) fn encoded(line: &[u8]) -> Option<Vec<u8>> {
    if !line.iter().any(|byte| matches!(byte, b'"' | b'<' | b'>' | b'`')) {
        return None;
    }
    let start = line.iter().position(|byte| *byte == b' ')? + 1;
    let end = line.iter().rposition(|byte| *byte == b' ').filter(|end| *end > start)?;
    let target = &line[start..end];
    let path = match target {
        [b'/', ..] => 0,
        _ => {
            let authority = target.windows(3).position(|three| three == b"://")? + 3;
            authority + target[authority..].iter().position(|byte| matches!(byte, b'/' | b'?'))?
        }
    };
    let mut fitted = line[..start + path].to_vec();
    let (mut in_query, mut in_fragment) = (false, false);
    for byte in &target[path..] {
        in_fragment |= *byte == b'#';
        in_query |= *byte == b'?';
        let is_refused = match byte {
            b'<' | b'>' => true,
            b'"' => in_query,
            b'`' => !in_query,
            _ => false,
        };
        if is_refused && !in_fragment {
            const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
            fitted.extend([b'%', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        } else {
            fitted.push(*byte);
        }
    }
    fitted.extend_from_slice(&line[end..]);
    (fitted.len() > line.len()).then_some(fitted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_library_refuses_in_a_target_is_encoded() {
        for (target, expected) in [
            ("/q?a={b=\"c\"}", Some("/q?a={b=%22c%22}")),
            ("/<a>`b`?<c>`", Some("/%3Ca%3E%60b%60?%3Cc%3E`")),
            ("http://web:80/a?\"", Some("http://web:80/a?%22")),
            ("http://web?\"", Some("http://web?%22")),
            ("/{\"a\":1}", None),
            ("/a?b=`^|\\{}[]'", None),
            ("/a#<\"", None),
            ("/<#<", Some("/%3C#<")),
            ("http://<web>/", None),
            ("web<:80", None),
            ("*", None),
        ] {
            let line = format!("GET {target} HTTP/1.1");
            let expected = expected.map(|target| format!("GET {target} HTTP/1.1").into_bytes());
            assert_eq!(encoded(line.as_bytes()), expected, "{target}");
            let taken = expected.as_deref().unwrap_or(line.as_bytes());
            assert_eq!(encoded(taken), None, "once is enough: {target}");
        }
        assert_eq!(encoded(b"G`T"), None);
        assert_eq!(encoded(b"G`T /a HTTP/1.1"), None);
        assert_eq!(encoded(b"\" HTTP/1.1"), None);
    }

    #[test]
    fn every_visible_character_is_taken_by_the_library_afterwards() {
        for byte in b'!'..=b'~' {
            for target in [format!("/{}", char::from(byte)), format!("/?{}", char::from(byte))] {
                let line = format!("GET {target} HTTP/1.1").into_bytes();
                let line = String::from_utf8(encoded(&line).unwrap_or(line)).unwrap();
                let target = line.split(' ').nth(1).unwrap();
                assert!(target.parse::<http::Uri>().is_ok(), "{target}");
            }
        }
    }
}
