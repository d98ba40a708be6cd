//! Headers of HBONE: what a CONNECT request says besides the bytes it carries.

pub mod canonical;
