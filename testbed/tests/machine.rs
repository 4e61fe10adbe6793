//! The machine that a node is on leaves its host as it was, however it ends.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use testbed::node::{self, Machine};

/// Set for the copy of this test that has a machine and is killed.
const OWNER: &str = "TESTBED_TEST_OWNER";

/// The host's end of the link to a machine.
const LINK: &str = "/sys/class/net/ecr-cname0";

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_machine_is_apart_from_its_host_and_nothing_of_it_outlives_its_owner() -> Result<()> {
    if std::env::var_os(OWNER).is_some() {
        let machine = Machine::start()?;
        machine.write("/etc/resolv.conf", "nameserver 198.18.0.2\n")?;
        println!("\nready {}", machine.dir().display());
        // Waits for SIGKILL.
        machine.run(machine.command("sleep").arg("600"))?;
        return Ok(());
    }
    if !node::available()? {
        return Ok(());
    }

    let resolver = fs::read("/etc/resolv.conf")?;
    let mut owner = Command::new(std::env::current_exe()?)
        .args([
            "--exact",
            "a_machine_is_apart_from_its_host_and_nothing_of_it_outlives_its_owner",
            "--nocapture",
        ])
        .env(OWNER, "1")
        .stdout(Stdio::piped())
        .spawn()?;
    // It may have to wait for another node on this machine.
    let output = BufReader::new(owner.stdout.take().context("the owner has no standard output")?);
    let ready =
        output.lines().map_while(Result::ok).find_map(|line| line.strip_prefix("ready ").map(PathBuf::from));
    let dir = ready.context("the owner got no machine")?;
    assert!(Path::new(LINK).exists());
    assert!(dir.join("etc/resolv.conf").exists());
    assert_eq!(fs::read("/etc/resolv.conf")?, resolver);

    kill_process(Pid::from_child(&owner), Signal::KILL)?;
    owner.wait()?;
    let deadline = Instant::now() + LIMIT;
    while dir.exists() || Path::new(LINK).exists() {
        ensure!(Instant::now() < deadline, "something is left after {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(20));
    }

    // The next one has everything it needs; and a socket in it is reached from here.
    let machine = Machine::start()?;
    let dir = machine.dir().to_owned();
    let listener = machine.within_network(|| Ok(TcpListener::bind((Machine::ADDRESS, 443))?))?;
    TcpStream::connect(listener.local_addr()?)?;
    let inside = machine.run(machine.command("cat").arg("/etc/resolv.conf"))?;
    assert_eq!(inside.as_bytes(), resolver, "the last machine's files are still there");
    drop(machine);
    assert!(!dir.exists() && !Path::new(LINK).exists());
    Ok(())
}
