//! One line on standard error that says how long a build has taken so far.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// The build of one program. On a terminal its line is written over; elsewhere there is a line each time.
pub(super) struct Progress<'a> {
    name: &'a str,
    started: Instant,
    terminal: bool,
}

impl<'a> Progress<'a> {
    pub(super) fn start(name: &'a str) -> Self {
        let progress = Self { name, started: Instant::now(), terminal: std::io::stderr().is_terminal() };
        if progress.terminal {
            progress.write("building");
        }
        progress
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn tick(&self) {
        self.write("building");
    }

    pub(super) fn done(self) {
        self.write("built");
        if self.terminal {
            eprintln!();
        }
    }

    fn write(&self, what: &str) {
        let mut stderr = std::io::stderr().lock();
        let (name, seconds) = (self.name, self.started.elapsed().as_secs());
        // Nobody to tell is no reason to fail.
        let _ = if self.terminal {
            write!(stderr, "\r\x1b[Ktestbed: {what} {name} ({seconds} s)").and_then(|()| stderr.flush())
        } else {
            writeln!(stderr, "testbed: {what} {name} ({seconds} s)")
        };
    }
}
