//! Tests of single values.
