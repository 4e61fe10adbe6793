//! Which calls the operator made, as the API server wrote them down: <https://kubernetes.io/docs/tasks/debug/debug-cluster/audit/>.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::testbed_dir;

/// One line for each request of a service account of the operator, when it comes.
const POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [ResponseStarted, ResponseComplete, Panic]
rules:
  - level: Metadata
    userGroups: [\"system:serviceaccounts:ecr-cname\"]
  - level: None
";

/// The audit log of one control plane.
pub(super) struct Audit {
    log: PathBuf,
    policy: PathBuf,
}

/// How many calls there were, by verb and resource.
pub(super) type Calls = BTreeMap<String, u64>;

impl Audit {
    /// A log of its own.
    pub(super) fn new() -> Result<Self> {
        let dir = testbed_dir();
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let audit = Self {
            log: dir.join(format!("audit-{}.log", std::process::id())),
            policy: dir.join(format!("audit-{}.yaml", std::process::id())),
        };
        fs::write(&audit.policy, POLICY)
            .with_context(|| format!("cannot write {}", audit.policy.display()))?;
        // Of an earlier control plane of this process.
        let _ = fs::remove_file(&audit.log);
        Ok(audit)
    }

    /// The flags of the API server.
    pub(super) fn flags(&self) -> Vec<String> {
        let path = |path: &PathBuf| path.display().to_string();
        vec![
            format!("--audit-policy-file={}", path(&self.policy)),
            format!("--audit-log-path={}", path(&self.log)),
        ]
    }

    /// The calls so far.
    pub(super) fn calls(&self) -> Result<Calls> {
        let mut calls = Calls::new();
        let log = File::open(&self.log).with_context(|| format!("cannot read {}", self.log.display()))?;
        for line in BufReader::new(log).lines() {
            // The last line may be half written.
            let Ok(event) = serde_json::from_str::<Value>(&line?) else { continue };
            let of = &event["objectRef"];
            let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let mut resource = word(&of["resource"]);
            if let Some(part) = of["subresource"].as_str() {
                resource = format!("{resource}/{part}");
            }
            *calls.entry(format!("{} {resource}", word(&event["verb"]))).or_default() += 1;
        }
        Ok(calls)
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.log);
        let _ = fs::remove_file(&self.policy);
    }
}

/// The calls between two counts, as a list.
pub(super) fn since(before: &Calls, after: &Calls) -> String {
    let new = after.iter().filter_map(|(call, n)| {
        let n = n - before.get(call).copied().unwrap_or_default();
        (n > 0).then(|| format!("{n} {call}"))
    });
    let list: Vec<_> = new.collect();
    if list.is_empty() { "none".to_owned() } else { list.join(", ") }
}
