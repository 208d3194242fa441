//! Names as small numbers, within a bound.
//!
//! Invariant: a number stands for the same name until [`Vocabulary::keep`] frees it, and numbers
//! stay below the bound.

use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Clone, Debug, Default)]
pub(super) struct Vocabulary {
    ids: BTreeMap<Arc<str>, u16>,
    names: Vec<Option<Arc<str>>>,
    max: usize,
}

impl Vocabulary {
    pub fn new(max: usize) -> Self {
        Self {
            max: max.min(usize::from(u16::MAX)),
            ..Self::default()
        }
    }

    /// Numbers in use or freed: every id is below.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    pub fn get(&self, name: &str) -> Option<u16> {
        self.ids.get(name).copied()
    }

    pub fn name(&self, id: u16) -> Option<&Arc<str>> {
        self.names.get(usize::from(id))?.as_ref()
    }

    /// The number of a name, new if there is room.
    pub fn add(&mut self, name: &str) -> Option<u16> {
        if let Some(id) = self.get(name) {
            return Some(id);
        }
        let free = self.names.iter().position(Option::is_none);
        let at = match free {
            Some(at) => at,
            None if self.names.len() < self.max => {
                self.names.push(None);
                self.names.len() - 1
            }
            None => return None,
        };
        let name: Arc<str> = name.into();
        self.names[at] = Some(name.clone());
        self.ids.insert(name, at as u16);
        Some(at as u16)
    }

    /// Frees every number for which `used` is false.
    pub fn keep(&mut self, used: impl Fn(u16) -> bool) {
        for at in 0..self.names.len() {
            if !used(at as u16)
                && let Some(name) = self.names[at].take()
            {
                self.ids.remove(&name);
            }
        }
    }
}
