//! The process that computes: one per attempt of a run.
//!
//! ```text
//!   daemon                                               worker
//!   launch ──► Worker { connection, process }            main ──► train::run
//!                          │                              │  ▲
//!                          └──── wire: protocol ─────── link: permit, requests, last word
//! ```

pub mod launch;
pub mod main;
pub mod priorities;
pub mod protocol;
pub mod survey;
pub mod wire;

mod failure;
mod link;
