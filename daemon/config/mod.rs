//! The TOML files a person writes.

pub mod spec;
