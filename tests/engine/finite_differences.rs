//! Finite differences.
