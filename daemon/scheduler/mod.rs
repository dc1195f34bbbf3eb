//! What decides which run has the device, and when.
