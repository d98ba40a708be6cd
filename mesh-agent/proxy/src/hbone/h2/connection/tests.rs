//! The connection against hand-made frames, floods, random input, itself, and the `h2` crate.

mod fixture;
mod floods;
mod frames;
mod interop;
mod pair;
mod properties;
mod speed;
