//! `finetuned worker`, the real binary, with a scripted daemon at the other end: it trains to the same bits as
//! `finetuned run`, computes only under a permit, saves and ends when its daemon is gone, and can be killed at any moment.

#[path = "worker/conversation.rs"]
mod conversation;
#[path = "worker/daemon.rs"]
mod daemon;
#[path = "exactness/fixture.rs"]
#[allow(dead_code, reason = "the fixture of the exactness tests, of which these use a part")]
mod fixture;
#[path = "worker/kills.rs"]
mod kills;
#[path = "worker/launching.rs"]
mod launching;
#[path = "worker/permits.rs"]
mod permits;
