//! Ports that stay ours while nothing listens on them.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Result, bail};

use crate::{random, workspace};

/// Below every system's range of ephemeral ports: a server that is down for a while would otherwise
/// come back to find that some client connects from its port.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

/// A TCP port on 127.0.0.1 that no other process of the test bed takes while this value lives.
pub(crate) struct Port {
    number: u16,
    _reservation: File,
}

impl Port {
    /// Reserves a free port.
    pub(crate) fn reserve() -> Result<Self> {
        let reservations = workspace::testbed_dir().join("ports");
        fs::create_dir_all(&reservations)?;
        for _ in 0..1_000 {
            let number = random::number(RANGE)?;
            let reservation = File::create(reservations.join(number.to_string()))?;
            if reservation.try_lock().is_ok() && TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok() {
                return Ok(Self { number, _reservation: reservation });
            }
        }
        bail!("no free port between {} and {}", RANGE.start, RANGE.end);
    }

    /// The number of the port.
    pub(crate) fn number(&self) -> u16 {
        self.number
    }
}
