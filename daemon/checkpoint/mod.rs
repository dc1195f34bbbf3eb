//! Placeholder head; written with its first content.
