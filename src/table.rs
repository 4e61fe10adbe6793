//! The alias table: host → what to do with an image at that host. Immutable, and made anew when an alias changes.

use foldhash::{HashMap, HashMapExt as _, HashSet};

use crate::{
    alias::{Alias, Group, MAX_HOST},
    crd::PullSecret,
    matching,
};

/// Every alias that holds in the cluster, by group.
#[derive(Debug, Default)]
pub struct AliasTable {
    groups: HashMap<Group, HostTable>,
}

/// The aliases of one group, by host.
#[derive(Debug, Default)]
pub struct HostTable {
    rules: HashMap<Box<str>, Rule>,
    /// The digests of the parts that the group is split into.
    digests: HashSet<String>,
}

/// What to do with an image at a host.
#[derive(Debug, PartialEq, Eq)]
pub enum Rule {
    /// Move it to the registry.
    Rewrite {
        /// The canonical ECR host.
        registry: Box<str>,
        /// Put before the repository.
        prefix: Option<Box<str>>,
        /// Whether the pod gets the pull secret.
        pull_secret: bool,
    },
    /// It is at the registry already; the pod gets the pull secret.
    Canonical,
    /// The alias's registry is not known, so the name means nothing yet.
    Unresolved {
        /// The alias's name.
        alias: Box<str>,
    },
}

impl AliasTable {
    /// The table of the aliases that were accepted.
    #[must_use]
    pub fn new(aliases: &[Alias]) -> Self {
        let mut groups: HashMap<Group, HostTable> = HashMap::new();
        for part in matching::parts(aliases) {
            let table = groups.entry(part.group).or_default();
            part.aliases.iter().for_each(|alias| table.add(alias));
            table.digests.insert(part.digest);
        }
        Self { groups }
    }

    /// The aliases of a group, by the group's name.
    #[must_use]
    pub fn group(&self, name: &str) -> Option<&HostTable> {
        self.groups.get(name)
    }
}

impl HostTable {
    /// One table of all aliases, whatever namespaces they select: for commands that know no namespaces.
    #[must_use]
    pub fn of_all(aliases: &[Alias]) -> Self {
        let mut table = Self::default();
        aliases.iter().for_each(|alias| table.add(alias));
        table
    }

    /// Whether the webhook entry of this digest names the very hosts that this table knows.
    #[must_use]
    pub fn agrees_with(&self, digest: &str) -> bool {
        self.digests.contains(digest)
    }

    /// What to do with images at a host, which is compared as a whole, with its port and without regard to case.
    #[must_use]
    pub fn rule(&self, host: &str) -> Option<&Rule> {
        // Without a way out in between, the compiler takes many bytes at a time.
        if !host.bytes().fold(false, |found, byte| found | byte.is_ascii_uppercase()) {
            return self.rules.get(host);
        }
        let mut buffer = [0; MAX_HOST];
        let lower = buffer.get_mut(..host.len())?;
        lower.copy_from_slice(host.as_bytes());
        lower.make_ascii_lowercase();
        self.rules.get(std::str::from_utf8(lower).ok()?)
    }

    fn add(&mut self, alias: &Alias) {
        let rule = match alias.registry() {
            Some(registry) => {
                if alias.pull_secret == PullSecret::Registry {
                    self.rules.insert(registry.as_str().into(), Rule::Canonical);
                }
                Rule::Rewrite {
                    registry: registry.as_str().into(),
                    prefix: alias.repository_prefix.as_deref().map(Into::into),
                    pull_secret: alias.pull_secret != PullSecret::None,
                }
            }
            None => Rule::Unresolved { alias: alias.name.as_str().into() },
        };
        self.rules.insert(alias.host.as_str().into(), rule);
    }
}
