//! Header lists: one allocation for the text, and the rules that make a list a request, a response or trailers.
//!
//! Invariants: names are lower-case tokens; values hold no control bytes; pseudo-headers come first and once.

use super::violation::Violation;

/// Fields kept of one list, whatever their size.
const MAX_FIELDS: usize = 128;

/// A decoded header list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Headers {
    text: Vec<u8>,
    /// Ends of name and value in `text`; a field begins where the one before ends.
    fields: Vec<(u32, u32)>,
}

/// What a list turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Request,
    Response(u16),
    Trailers,
}

impl Headers {
    /// All fields in order, pseudo-headers among them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut start = 0;
        self.fields.iter().map(move |&(name, value)| {
            let field = (&self.text[start..name as usize], &self.text[name as usize..value as usize]);
            start = value as usize;
            field
        })
    }

    /// The first value of a field; names are lower-case, pseudo-headers begin with a colon.
    pub(crate) fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter().find_map(|(key, value)| (key == name.as_bytes()).then_some(value))
    }

    /// `:method` of a request.
    pub(crate) fn method(&self) -> Option<&[u8]> {
        self.get(":method")
    }

    /// `:authority` of a request.
    pub(crate) fn authority(&self) -> Option<&[u8]> {
        self.get(":authority")
    }

    /// Adds a field; false if the list has as many as it may.
    pub(crate) fn push(&mut self, name: &[u8], value: &[u8]) -> bool {
        if self.fields.len() >= MAX_FIELDS {
            return false;
        }
        self.text.extend_from_slice(name);
        let name_end = self.text.len();
        self.text.extend_from_slice(value);
        let (Ok(name_end), Ok(value_end)) = (u32::try_from(name_end), u32::try_from(self.text.len())) else {
            return false;
        };
        self.fields.push((name_end, value_end));
        true
    }

    /// Checks the list against RFC 9113 §8.2 and §8.3.
    pub(crate) fn shape(&self) -> Result<Shape, Violation> {
        const MALFORMED: Violation = Violation::MalformedHeaders;
        let mut pseudo = Pseudo::default();
        let mut regular = false;
        for (name, value) in self.iter() {
            if !is_value(value) {
                return Err(MALFORMED);
            }
            if let Some(name) = name.strip_prefix(b":") {
                if regular {
                    return Err(MALFORMED);
                }
                pseudo.set(name, value)?;
            } else {
                regular = true;
                if !is_name(name) || is_forbidden(name, value) {
                    return Err(MALFORMED);
                }
            }
        }
        pseudo.shape()
    }
}

#[derive(Default)]
struct Pseudo<'a> {
    method: Option<&'a [u8]>,
    authority: Option<&'a [u8]>,
    scheme: Option<&'a [u8]>,
    path: Option<&'a [u8]>,
    status: Option<&'a [u8]>,
}

impl<'a> Pseudo<'a> {
    fn set(&mut self, name: &[u8], value: &'a [u8]) -> Result<(), Violation> {
        let place = match name {
            b"method" => &mut self.method,
            b"authority" => &mut self.authority,
            b"scheme" => &mut self.scheme,
            b"path" => &mut self.path,
            b"status" => &mut self.status,
            // `:protocol` is for peers to whom ENABLE_CONNECT_PROTOCOL was announced.
            _ => return Err(Violation::MalformedHeaders),
        };
        match place.replace(value) {
            None => Ok(()),
            Some(_) => Err(Violation::MalformedHeaders),
        }
    }

    fn shape(&self) -> Result<Shape, Violation> {
        let request_parts = self.authority.is_some() || self.scheme.is_some() || self.path.is_some();
        match (self.method, self.status) {
            (Some(b"CONNECT"), None) => {
                let complete = self.authority.is_some_and(|authority| !authority.is_empty());
                if complete && self.scheme.is_none() && self.path.is_none() {
                    return Ok(Shape::Request);
                }
            }
            (Some(method), None) => {
                let complete = self.scheme.is_some() && self.path.is_some_and(|path| !path.is_empty());
                if complete && is_method(method) {
                    return Ok(Shape::Request);
                }
            }
            (None, Some(&[a @ b'1'..=b'9', b @ b'0'..=b'9', c @ b'0'..=b'9'])) if !request_parts => {
                let digit = |byte: u8| u16::from(byte - b'0');
                return Ok(Shape::Response(digit(a) * 100 + digit(b) * 10 + digit(c)));
            }
            (None, None) if !request_parts => return Ok(Shape::Trailers),
            _ => {}
        }
        Err(Violation::MalformedHeaders)
    }
}

const fn is_token(byte: u8) -> bool {
    matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'0'..=b'9' | b'A'..=b'Z' | b'^'..=b'z' | b'|' | b'~')
}

fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|&byte| is_token(byte) && !byte.is_ascii_uppercase())
}

fn is_method(method: &[u8]) -> bool {
    !method.is_empty() && method.iter().all(|&byte| is_token(byte))
}

fn is_value(value: &[u8]) -> bool {
    let blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    !blank(value.first())
        && !blank(value.last())
        && value.iter().all(|&byte| (byte >= b' ' || byte == b'\t') && byte != 0x7f)
}

/// Fields that speak about an HTTP/1 connection (RFC 9113 §8.2.2).
fn is_forbidden(name: &[u8], value: &[u8]) -> bool {
    match name {
        b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade" => true,
        b"te" => !value.eq_ignore_ascii_case(b"trailers"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{Headers, Shape};

    fn list(fields: &[(&str, &str)]) -> Headers {
        let mut headers = Headers::default();
        for (name, value) in fields {
            assert!(headers.push(name.as_bytes(), value.as_bytes()));
        }
        headers
    }

    #[test]
    fn fields_come_back_in_order() {
        let headers = list(&[("a", "1"), ("b", ""), ("a", "2")]);
        assert_eq!(headers.iter().count(), 3);
        assert_eq!(headers.get("b"), Some(&b""[..]));
        assert_eq!(headers.get("a"), Some(&b"1"[..]));
        assert_eq!(headers.get("c"), None);
    }

    #[test]
    fn lists_are_told_apart() {
        let connect = [(":method", "CONNECT"), (":authority", "10.0.0.1:80")];
        let get = [(":method", "GET"), (":scheme", "https"), (":path", "/"), ("te", "trailers")];
        for (fields, shape) in [
            (&connect[..], Shape::Request),
            (&get[..], Shape::Request),
            (&[(":status", "200")][..], Shape::Response(200)),
            (&[("grpc-status", "0")][..], Shape::Trailers),
            (&[][..], Shape::Trailers),
        ] {
            assert_eq!(list(fields).shape(), Ok(shape), "{fields:?}");
        }
    }

    #[test]
    fn malformed_lists_are_refused() {
        let with = |name, value| vec![(":method", "CONNECT"), (":authority", "a:1"), (name, value)];
        for fields in [
            vec![(":method", "CONNECT")],
            vec![(":method", "CONNECT"), (":authority", "")],
            with(":scheme", "https"),
            with(":path", "/"),
            with(":protocol", "websocket"),
            with(":method", "CONNECT"),
            with(":status", "200"),
            with("Upper", "x"),
            with("", "x"),
            with("sp ace", "x"),
            with("connection", "close"),
            with("te", "gzip"),
            with("x", " padded"),
            with("x", "a\nb"),
            with("x", "a\0b"),
            vec![("x", "y"), (":method", "CONNECT"), (":authority", "a:1")],
            vec![(":method", "GET"), (":path", "/")],
            vec![(":status", "99")],
            vec![(":status", "20x")],
            vec![(":status", "200"), (":path", "/")],
            vec![(":authority", "a:1")],
        ] {
            assert!(list(&fields).shape().is_err(), "{fields:?}");
        }
    }

    #[test]
    fn a_list_takes_a_bounded_number_of_fields() {
        let mut headers = Headers::default();
        let taken = (0..1_000).take_while(|_| headers.push(b"a", b"")).count();
        assert_eq!(taken, super::MAX_FIELDS);
    }
}
