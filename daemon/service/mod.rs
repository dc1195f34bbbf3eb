//! The daemon as a service: configuration, log, notification, signals, bus.
