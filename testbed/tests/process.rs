//! A child process does not outlive its parent, however the parent ends.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use testbed::process::Process;

const LIMIT: Duration = Duration::from_secs(20);

/// A file that no other test uses.
fn log(name: &str) -> Result<std::path::PathBuf> {
    let dir = testbed::testbed_dir().join("tests");
    std::fs::create_dir_all(&dir)?;
    let path = dir.join(format!("{name}-{}.log", std::process::id()));
    let _ = std::fs::remove_file(&path);
    Ok(path)
}

fn shell(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    command
}

/// Polls until `condition` holds.
fn eventually(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !condition()? {
        ensure!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn is_alive(pid: i32) -> bool {
    // A zombie that nobody has reaped yet is dead, too.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let zombie = stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'));
    Pid::from_raw(pid).is_some_and(|pid| test_kill_process(pid).is_ok()) && !zombie
}

#[test]
fn tells_its_end_and_its_output() -> Result<()> {
    let mut command = shell(r#"echo "$WORD"; cat; echo bad >&2; exit 3"#);
    command.env("WORD", "good");
    let process = Process::spawn("echo", &command, &log("echo")?)?;
    let status = process.wait(LIMIT).context("still running")?;
    assert_eq!(status.code(), Some(3));
    assert_eq!(process.log()?, "good\nbad\n");
    assert_eq!(process.log_tail(1), "bad");
    assert!(!process.is_running());
    process.terminate()?;
    Ok(())
}

#[test]
fn signals_reach_it() -> Result<()> {
    use std::os::unix::process::ExitStatusExt as _;

    let process = Process::spawn("sleep", Command::new("sleep").arg("600"), &log("sleep")?)?;
    assert_eq!(process.wait(Duration::ZERO), None);
    process.pause()?;
    process.terminate()?;
    assert_eq!(process.wait(Duration::from_millis(100)), None, "a paused process ends");
    process.resume()?;
    assert_eq!(process.wait(LIMIT).and_then(|status| status.signal()), Some(15));
    Ok(())
}

#[test]
fn dropping_kills_it_and_what_it_started() -> Result<()> {
    let process = Process::spawn("family", &shell("sleep 600 & echo $!; wait"), &log("family")?)?;
    eventually("the grandchild starts", || Ok(!process.log()?.is_empty()))?;
    let (child, grandchild) = (process.pid().try_into()?, process.log()?.trim().parse()?);
    assert!(is_alive(child) && is_alive(grandchild));
    drop(process);
    assert!(!is_alive(child));
    eventually("the grandchild ends", || Ok(!is_alive(grandchild)))
}

/// Set for the copy of this test that plays the parent.
const PARENT: &str = "TESTBED_TEST_PARENT";

#[test]
fn dies_with_a_parent_that_is_killed() -> Result<()> {
    if let Some(log) = std::env::var_os(PARENT) {
        let child = Process::spawn("child", &shell("echo $$; exec sleep 600"), log.as_ref())?;
        // Waits for SIGKILL. A second child must not keep the first one's lifeline open.
        let _other = Process::spawn("other", Command::new("sleep").arg("600"), log.as_ref())?;
        child.wait(LIMIT);
        return Ok(());
    }

    let log = log("orphan")?;
    let mut parent = Command::new(std::env::current_exe()?)
        .args(["--exact", "dies_with_a_parent_that_is_killed"])
        .env(PARENT, &log)
        .stdout(Stdio::null())
        .spawn()?;
    let mut pid = String::new();
    eventually("the child starts", || {
        pid = std::fs::read_to_string(&log).unwrap_or_default();
        Ok(pid.ends_with('\n'))
    })?;
    let child = pid.trim().parse()?;
    assert!(is_alive(child));

    kill_process(Pid::from_child(&parent), Signal::KILL)?;
    parent.wait()?;
    eventually("the child ends", || Ok(!is_alive(child)))
}
