//! The macro that defines a shared struct: fixed layout, checked padding, and a layout hash.

/// FNV-1a over bytes, usable in constants. Used only to tell layouts apart, never for security.
pub(crate) const fn fnv1a(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

/// Defines a `#[repr(C)]` struct without padding that both sides of the kernel boundary share.
///
/// Adds `LAYOUT` (a hash of name, field names and field types), `ZERO`, and `aya::Pod` in user space.
macro_rules! shared {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $( $(#[$field_meta:meta])* pub $field:ident : $ty:ty ),+ $(,)?
        }
    ) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name {
            $( $(#[$field_meta])* pub $field: $ty ),+
        }

        const _: () = assert!(
            size_of::<$name>() == 0 $( + size_of::<$ty>() )+,
            concat!(stringify!($name), " has implicit padding"),
        );

        impl $name {
            /// Hash of the name, the fields and their types; part of the ABI version.
            pub const LAYOUT: u64 = $crate::layout::fnv1a(
                0xcbf2_9ce4_8422_2325,
                concat!(stringify!($name), $( " ", stringify!($field), ":", stringify!($ty) ),+).as_bytes(),
            );

            /// All bits zero.
            #[allow(unsafe_code, reason = "every field is an integer or an array of integers")]
            // SAFETY: the macro is only used for structs of plain integers, for which zero is valid.
            pub const ZERO: Self = unsafe { core::mem::zeroed() };
        }

        #[cfg(feature = "user")]
        #[allow(unsafe_code, reason = "the marker trait is unsafe to implement")]
        // SAFETY: `repr(C)`, `Copy`, integers only, and the assertion above rules out padding.
        unsafe impl aya::Pod for $name {}
    };
}
