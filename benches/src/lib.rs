//! The load program of the benchmarks, shared by the binaries `load` (by hand) and `bench` (in pods).

pub mod load;
