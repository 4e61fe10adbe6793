//! The webhook's own port, as a stranger finds it: real TLS, real sockets.
