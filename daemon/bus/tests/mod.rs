//! Tests of the bus over a pair of connections.
