//! HPACK against the RFC's examples, against itself, and against hostile blocks.

use proptest::prelude::*;

use super::{Decoder, Encoder, Headers, Violation};

const LIMIT: usize = 16 << 10;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<_> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn fields(headers: &Headers) -> Vec<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    headers.iter().map(|(name, value)| (text(name), text(value))).collect()
}

fn owned(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn the_requests_of_the_rfc_decode_with_and_without_huffman() {
    // RFC 7541 C.3 and C.4: three requests on one connection.
    for blocks in [
        [
            "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "8286 84be 5808 6e6f 2d63 6163 6865",
            "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
        ],
        [
            "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
            "8286 84be 5886 a8eb 1064 9cbf",
            "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
        ],
    ] {
        let mut decoder = Decoder::new();
        let lists: Vec<_> = blocks
            .iter()
            .map(|block| fields(&decoder.decode(&hex(block), LIMIT).unwrap().unwrap()))
            .collect();
        let first =
            [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")];
        assert_eq!(lists[0], owned(&first));
        assert_eq!(lists[1], owned(&[&first[..], &[("cache-control", "no-cache")]].concat()));
        assert_eq!(
            lists[2],
            owned(&[
                (":method", "GET"),
                (":scheme", "https"),
                (":path", "/index.html"),
                (":authority", "www.example.com"),
                ("custom-key", "custom-value"),
            ])
        );
    }
}

#[test]
fn what_the_encoder_writes_the_decoder_reads() {
    let long = "x".repeat(5_000);
    let list = [
        (":method", "CONNECT"),
        (":authority", "[fd00::1]:15008"),
        (":status", "200"),
        ("baggage", "k8s.namespace.name=a,k8s.pod.name=b"),
        ("via", long.as_str()),
        ("", ""),
    ];
    let (mut encoder, mut decoder) = (Encoder::default(), Decoder::new());
    for _ in 0..3 {
        let mut block = Vec::new();
        encoder.encode(list.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())), &mut block);
        assert_eq!(fields(&decoder.decode(&block, LIMIT).unwrap().unwrap()), owned(&list));
    }
}

#[test]
fn invalid_blocks_are_refused() {
    for block in [
        "80",                      // index 0
        "be",                      // index 62 of an empty table
        "ff ff ff ff ff ff 7f",    // an integer of too many bytes
        "00",                      // a literal without name and value
        "00 05 61 62",             // a name cut short
        "00 01 61",                // no value
        "00 81 00 00",             // wrong padding of a Huffman string
        "3f e2 1f",                // a resize to 4097
        "82 20",                   // a resize after a field
        "7f ff ff ff ff ff ff 01", // an index of too many bytes
    ] {
        assert_eq!(Decoder::new().decode(&hex(block), LIMIT), Err(Violation::HeaderCompression), "{block}");
    }
}

#[test]
fn a_resize_to_zero_and_back_empties_the_table() {
    let mut decoder = Decoder::new();
    decoder.decode(&hex("40 01 61 01 62"), LIMIT).unwrap();
    assert!(decoder.decode(&hex("be"), LIMIT).is_ok());
    assert!(decoder.decode(&hex("20 3f e1 1f"), LIMIT).is_ok());
    assert_eq!(decoder.decode(&hex("be"), LIMIT), Err(Violation::HeaderCompression));
}

#[test]
fn a_list_too_large_is_not_kept_but_the_table_is() {
    let mut decoder = Decoder::new();
    let mut block = hex("40 01 61 01 62");
    block.extend_from_slice(&[0x00, 0x01, b'c', 0x7f, 0xe1, 0x06]);
    block.extend(std::iter::repeat_n(b'v', 127 + 0x61 + 6 * 128));
    assert_eq!(decoder.decode(&block, 512), Ok(None));
    let later = decoder.decode(&hex("be"), 512).unwrap().unwrap();
    assert_eq!(fields(&later), owned(&[("a", "b")]));
}

#[test]
fn a_list_far_too_large_ends_the_connection() {
    let mut decoder = Decoder::new();
    let mut block = vec![0x40, 0x01, b'a', 0x7f, 0x81, 0x1e];
    block.extend(std::iter::repeat_n(b'v', 127 + 1 + 30 * 128));
    block.extend(std::iter::repeat_n(0xbe, 1_000));
    assert_eq!(decoder.decode(&block, LIMIT), Err(Violation::HeaderBomb));
}

proptest! {
    #[test]
    fn any_bytes_decode_or_are_refused(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..4)) {
        let mut decoder = Decoder::new();
        for block in blocks {
            if let Ok(Some(headers)) = decoder.decode(&block, 1_024) {
                let size: usize = headers.iter().map(|(name, value)| name.len() + value.len() + 32).sum();
                prop_assert!(size <= 1_024);
                // Every shape is an answer.
                let _shape = headers.shape();
            }
        }
    }

    #[test]
    fn any_list_survives(list in prop::collection::vec((any::<Vec<u8>>(), any::<Vec<u8>>()), 0..20)) {
        let mut block = Vec::new();
        Encoder::default().encode(list.iter().map(|(name, value)| (&name[..], &value[..])), &mut block);
        let headers = Decoder::new().decode(&block, 1 << 20).unwrap().unwrap();
        let back: Vec<_> = headers.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
        prop_assert_eq!(back, list);
    }
}
