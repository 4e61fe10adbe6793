//! Which aliases select a namespace, and whose token each registry gets there.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use kube::core::{Selector, SelectorExt as _};

use crate::{
    alias::{Alias, Identity},
    ecr::Token,
    tokens::Tokens,
};

/// The aliases that share a namespace selector, each with its place in the order of age.
#[derive(PartialEq)]
pub(super) struct Group {
    selector: Selector,
    aliases: Vec<(usize, Alias)>,
}

/// All groups. A namespace remembers the places of those that select it.
#[derive(Default, PartialEq)]
pub(super) struct Groups(Vec<Group>);

/// Whose token a registry gets in one namespace.
pub(super) struct Choice<'a> {
    pub(super) identity: &'a Identity,
    pub(super) token: Option<Arc<Token>>,
}

impl Groups {
    /// Sorts aliases, which come by age, by selector.
    pub(super) fn of(aliases: &[Alias]) -> Self {
        let mut groups: BTreeMap<_, Group> = BTreeMap::new();
        for (order, alias) in aliases.iter().enumerate() {
            let empty = || Group { selector: alias.namespaces.clone(), aliases: Vec::new() };
            groups.entry(alias.group()).or_insert_with(empty).aliases.push((order, alias.clone()));
        }
        Self(groups.into_values().collect())
    }

    /// The places of the groups that select a namespace with these labels.
    pub(super) fn selecting(&self, labels: &BTreeMap<String, String>) -> Vec<usize> {
        self.0
            .iter()
            .enumerate()
            .filter(|(_, group)| group.selector.matches(labels))
            .map(|(i, _)| i)
            .collect()
    }

    /// Every alias.
    pub(super) fn aliases(&self) -> impl Iterator<Item = &Alias> {
        self.0.iter().flat_map(|group| &group.aliases).map(|(_, alias)| alias)
    }

    /// The aliases of the groups at these places, with their order.
    pub(super) fn members(&self, places: &[usize]) -> impl Iterator<Item = &(usize, Alias)> {
        places.iter().filter_map(|place| self.0.get(*place)).flat_map(|group| &group.aliases)
    }

    /// Whose token each registry gets where the groups at these places select. Where two aliases lead to one registry as
    /// two identities, the older has it, unless only the younger has a token.
    pub(super) fn choices(
        &self,
        places: &[usize],
        tokens: &Tokens,
        now: Timestamp,
    ) -> BTreeMap<&str, Choice<'_>> {
        let mut aliases: Vec<_> = self.members(places).collect();
        aliases.sort_by_key(|(order, _)| *order);
        let mut choices: BTreeMap<&str, Choice<'_>> = BTreeMap::new();
        for (_, alias) in aliases {
            let (Some(principal), Some(registry)) = (alias.principal(), alias.registry()) else { continue };
            let token = tokens.get(&principal).and_then(|state| state.usable(now)).cloned();
            let known = choices.get(registry.as_str());
            if known.is_none_or(|choice| choice.token.is_none() && token.is_some()) {
                choices.insert(registry.as_str(), Choice { identity: &alias.identity, token });
            }
        }
        choices
    }
}
