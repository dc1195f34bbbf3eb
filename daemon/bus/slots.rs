//! Places for calls that take long, a few for each caller and so many in all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The places.
#[derive(Debug)]
pub(super) struct Slots {
    taken: Arc<Mutex<HashMap<String, u32>>>,
    each: u32,
    all: u32,
}

/// A place that is taken; dropping it frees it.
#[derive(Debug)]
pub(super) struct Slot {
    taken: Arc<Mutex<HashMap<String, u32>>>,
    key: String,
}

impl Slots {
    /// `each` for every caller, `all` together.
    pub fn new(each: u32, all: u32) -> Slots {
        Slots { taken: Arc::default(), each, all }
    }

    /// How many places one caller may take.
    pub fn each(&self) -> u32 {
        self.each
    }

    /// Whether no place is taken.
    #[cfg(test)]
    pub fn is_free(&self) -> bool {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// A place for `key`, if one is free.
    pub fn take(&self, key: &str) -> Option<Slot> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.values().sum::<u32>() >= self.all {
            return None;
        }
        let own = taken.get(key).copied().unwrap_or(0);
        if own >= self.each {
            return None;
        }
        taken.insert(key.to_string(), own + 1);
        Some(Slot { taken: self.taken.clone(), key: key.to_string() })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.get_mut(&self.key) {
            Some(own) if *own > 1 => *own -= 1,
            _ => {
                taken.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_for_each_and_for_all() {
        let slots = Slots::new(2, 3);
        let a1 = slots.take("a").unwrap();
        let a2 = slots.take("a").unwrap();
        assert!(slots.take("a").is_none());
        let b1 = slots.take("b").unwrap();
        assert!(slots.take("b").is_none(), "all are taken");
        drop(a1);
        let a3 = slots.take("a").unwrap();
        drop((a2, a3, b1));
        assert!(slots.is_free(), "nothing is kept of callers that are gone");
    }
}
