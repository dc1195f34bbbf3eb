//! The decoder: its shape, its frozen weights, its passes.

pub mod config;
