//! One address form for both families.

shared! {
    /// An IP address as 16 bytes; IPv4 in its mapped form `::ffff:a.b.c.d`.
    ///
    /// The words hold the bytes as they are on the wire (network order in memory), which is how every
    /// BPF context presents them, so no program swaps bytes. A v4-mapped IPv6 socket and a plain IPv4
    /// packet of the same connection therefore have equal keys.
    pub struct Addr {
        /// Network-order bytes, four at a time.
        pub words: [u32; 4],
    }
}

/// The third word of a v4-mapped address: bytes 0, 0, 0xff, 0xff.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// The mapped form of an IPv4 address given as the network-order word of a BPF context.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    /// An IPv6 address given as the network-order words of a BPF context.
    #[inline(always)]
    pub const fn v6(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// Whether this is an IPv4 address in its mapped form.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// Whether this is `0.0.0.0`, `::` or absent (all zero).
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.words[0] == 0
            && self.words[1] == 0
            && (self.words[2] == 0 || self.words[2] == MAPPED)
            && self.words[3] == 0
    }

    /// Whether this is in 127.0.0.0/8 or is `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            return u32::from_be(self.words[3]) >> 24 == 127;
        }
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && u32::from_be(self.words[3]) == 1
    }

    /// Whether this is in 169.254.0.0/16 or fe80::/10: of this node's link alone.
    #[inline(always)]
    pub const fn is_link_local(&self) -> bool {
        if self.is_v4() {
            return u32::from_be(self.words[3]) >> 16 == 0xa9fe;
        }
        u32::from_be(self.words[0]) >> 22 == 0xfe80 >> 6
    }

    /// Compares word by word, which compiles to four loads and no call on the BPF target.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.words[0] == other.words[0]
            && self.words[1] == other.words[1]
            && self.words[2] == other.words[2]
            && self.words[3] == other.words[3]
    }

    /// The address family as [`FAMILY_V4`] or [`FAMILY_V6`].
    #[inline(always)]
    pub const fn family(&self) -> u8 {
        if self.is_v4() { FAMILY_V4 } else { FAMILY_V6 }
    }

    /// A cheap hash of address and port, used to spread destinations over the outbound ports.
    #[inline(always)]
    pub const fn spread(&self, port: u16) -> u32 {
        let mut h = self.words[0] ^ self.words[1].rotate_left(7) ^ self.words[3].rotate_left(13);
        h = h.wrapping_add(port as u32).wrapping_mul(0x9e37_79b1);
        h ^ (h >> 15)
    }
}

/// Family number of IPv4 in keys and values.
pub const FAMILY_V4: u8 = 4;
/// Family number of IPv6 in keys and values.
pub const FAMILY_V6: u8 = 6;

impl From<core::net::IpAddr> for Addr {
    fn from(ip: core::net::IpAddr) -> Self {
        let bytes = match ip {
            core::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            core::net::IpAddr::V6(v6) => v6.octets(),
        };
        let mut words = [0; 4];
        let mut i = 0;
        while i < 4 {
            words[i] =
                u32::from_ne_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]);
            i += 1;
        }
        Self { words }
    }
}

impl From<Addr> for core::net::IpAddr {
    /// Mapped addresses come back as IPv4.
    fn from(addr: Addr) -> Self {
        let mut bytes = [0; 16];
        for (i, word) in addr.words.iter().enumerate() {
            bytes[4 * i..4 * i + 4].copy_from_slice(&word.to_ne_bytes());
        }
        core::net::Ipv6Addr::from(bytes).to_canonical()
    }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn both_families_survive_the_round_trip() {
        for text in ["10.1.2.3", "0.0.0.0", "fd00::1:2", "::1"] {
            assert_eq!(IpAddr::from(addr(text)), text.parse::<IpAddr>().unwrap());
        }
    }

    #[test]
    fn a_mapped_address_equals_the_plain_one() {
        assert_eq!(addr("::ffff:10.0.0.1"), addr("10.0.0.1"));
        assert_eq!(addr("10.0.0.1").family(), FAMILY_V4);
        assert_eq!(addr("fd00::1").family(), FAMILY_V6);
    }

    #[test]
    fn loopback_is_a_whole_block_in_v4_and_one_address_in_v6() {
        assert!(addr("127.9.9.9").is_loopback());
        assert!(addr("::1").is_loopback());
        assert!(!addr("::2").is_loopback());
        assert!(!addr("128.0.0.1").is_loopback());
        assert!(!addr("::7f00:1").is_loopback());
    }
}
