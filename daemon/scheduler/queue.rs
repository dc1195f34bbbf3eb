//! The queue: one run has the device; the next is the one with the highest priority, of several the one with the earliest
//! deadline, of several the oldest. A run without a deadline comes after those that have one.
//!
//! ```text
//!                     device free                         device taken by A
//!   hold in force     first candidate waits               A waits (parked), later gives its memory back
//!   no hold           first ready candidate begins        A goes on; a ready candidate of a higher priority takes over
//! ```
//!
//! A candidate that waits for its next attempt (backoff) is not ready and lets others go first. Runs of equal priority
//! never take the device from each other.

use crate::reason::Reason;
use crate::units::RunId;
use std::cmp::Reverse;

/// A run that is not over and has no worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The run.
    pub id: RunId,
    /// Higher goes first.
    pub priority: i32,
    /// When it should be done, in microseconds since 1970, if that matters.
    pub deadline: Option<u64>,
    /// Its number in the order of submission.
    pub submitted: u64,
    /// Whether it may begin now: it is not paused, and its backoff is over.
    pub ready: bool,
}

/// The run with a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Active {
    /// The run.
    pub id: RunId,
    /// Higher goes first.
    pub priority: i32,
    /// Told to stop already.
    pub stopping: bool,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing: no run is ready.
    Idle,
    /// This run begins.
    Begin(RunId),
    /// This run would begin, but for the hold.
    Wait(RunId, Reason),
    /// The run with the device computes.
    Go,
    /// The run with the device parks.
    Park(Reason),
    /// The run with the device gives it up for this one.
    Preempt(RunId),
    /// The run with the device is stopping: wait for it.
    Stopping,
}

/// Who is next.
pub fn turn(candidates: &[Candidate], active: Option<&Active>, hold: Option<Reason>) -> Turn {
    let ready = candidates.iter().filter(|candidate| candidate.ready);
    let first = ready.min_by_key(|candidate| place(candidate));
    match (active, first, hold) {
        (Some(Active { stopping: true, .. }), _, _) => Turn::Stopping,
        (Some(_), _, Some(reason)) => Turn::Park(reason),
        (Some(active), Some(first), None) if first.priority > active.priority => {
            Turn::Preempt(first.id.clone())
        }
        (Some(_), _, None) => Turn::Go,
        (None, None, _) => Turn::Idle,
        (None, Some(first), Some(reason)) => Turn::Wait(first.id.clone(), reason),
        (None, Some(first), None) => Turn::Begin(first.id.clone()),
    }
}

/// Its place among the others: the least goes first.
fn place(candidate: &Candidate) -> (Reverse<i32>, u64, u64) {
    (Reverse(candidate.priority), candidate.deadline.unwrap_or(u64::MAX), candidate.submitted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(n: u8) -> RunId {
        RunId::from_bits([0, 0, 0, 0, 0, n])
    }

    fn candidate(n: u8, priority: i32, ready: bool) -> Candidate {
        Candidate { id: id(n), priority, deadline: None, submitted: n.into(), ready }
    }

    #[test]
    fn priority_then_age_then_readiness() {
        let queue = [candidate(1, 0, true), candidate(2, 5, true), candidate(3, 5, true)];
        assert_eq!(turn(&queue, None, None), Turn::Begin(id(2)));
        assert_eq!(turn(&queue[..1], None, None), Turn::Begin(id(1)));
        let backing_off = [candidate(1, 0, true), candidate(2, 5, false)];
        assert_eq!(turn(&backing_off, None, None), Turn::Begin(id(1)));
        assert_eq!(turn(&backing_off, None, Some(Reason::Inhibited)), Turn::Wait(id(1), Reason::Inhibited));
        assert_eq!(turn(&[], None, Some(Reason::Inhibited)), Turn::Idle);
    }

    #[test]
    fn of_equal_priority_the_earliest_deadline_goes_first_and_takes_the_device_from_nobody() {
        let due = |n, priority, deadline| Candidate { deadline, ..candidate(n, priority, true) };
        let queue = [due(1, 0, None), due(2, 0, Some(900)), due(3, 0, Some(500)), due(4, -1, Some(1))];
        assert_eq!(turn(&queue, None, None), Turn::Begin(id(3)));
        assert_eq!(turn(&queue[..2], None, None), Turn::Begin(id(2)), "before one that has time");
        assert_eq!(turn(&[due(1, 0, Some(5)), due(2, 0, Some(5))], None, None), Turn::Begin(id(1)));
        let active = Active { id: id(9), priority: 0, stopping: false };
        assert_eq!(turn(&queue, Some(&active), None), Turn::Go);
    }

    #[test]
    fn only_a_higher_priority_takes_the_device() {
        let active = |priority, stopping| Active { id: id(9), priority, stopping };
        let queue = [candidate(1, 5, true)];
        assert_eq!(turn(&queue, Some(&active(4, false)), None), Turn::Preempt(id(1)));
        assert_eq!(turn(&queue, Some(&active(5, false)), None), Turn::Go);
        assert_eq!(turn(&queue, Some(&active(4, true)), None), Turn::Stopping);
        let held = turn(&queue, Some(&active(4, false)), Some(Reason::Inhibited));
        assert_eq!(held, Turn::Park(Reason::Inhibited));
        assert_eq!(turn(&[candidate(1, 9, false)], Some(&active(0, false)), None), Turn::Go);
    }

    proptest! {
        #[test]
        fn the_one_that_begins_is_ready_and_nobody_ready_is_before_it(
            runs in prop::collection::vec((-3..3i32, any::<bool>(), prop::option::of(0..3u64)), 0..20)
        ) {
            let queue: Vec<_> = runs
                .iter()
                .enumerate()
                .map(|(n, &(priority, ready, deadline))| Candidate { deadline, ..candidate(n as u8, priority, ready) })
                .collect();
            match turn(&queue, None, None) {
                Turn::Idle => prop_assert!(queue.iter().all(|c| !c.ready)),
                Turn::Begin(first) => {
                    let first = queue.iter().find(|c| c.id == first).unwrap();
                    prop_assert!(first.ready);
                    for other in queue.iter().filter(|c| c.ready && c.id != first.id) {
                        let later = match (other.deadline, first.deadline) {
                            (Some(theirs), Some(ours)) if theirs != ours => theirs > ours,
                            (None, Some(_)) => true,
                            (Some(_), None) => false,
                            _ => other.submitted > first.submitted,
                        };
                        prop_assert!(
                            other.priority < first.priority || (other.priority == first.priority && later)
                        );
                    }
                }
                other => prop_assert!(false, "{other:?} with a free device and no hold"),
            }
        }
    }
}
