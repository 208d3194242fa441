//! Discrete observations, stored sparsely: per row only what differs from each variable's
//! commonest value.
//!
//! A variable of `card` values has `card - 1` *indicators*, one per value other than its commonest
//! (value 0 here). A row is the sorted list of its indicators; pair statistics over indicators give
//! every joint table, since the cells of value 0 follow by subtraction.
//!
//! Invariants: indicators of a row ascend and belong to distinct variables; equal rows are joined,
//! their weights added.

use std::collections::BTreeMap;

/// Which indicators belong to which variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schema {
    /// First indicator of each variable; one more entry at the end.
    first: Vec<u32>,
    /// Variable of each indicator.
    variable: Vec<u32>,
}

impl Schema {
    /// Variables with these numbers of values. A variable of one value has no indicator.
    pub fn new(cards: impl IntoIterator<Item = usize>) -> Self {
        let mut first = vec![0];
        let mut variable = Vec::new();
        for (i, card) in cards.into_iter().enumerate() {
            for _ in 1..card {
                variable.push(i as u32);
            }
            first.push(variable.len() as u32);
        }
        Self { first, variable }
    }

    /// `variables` variables of two values each.
    pub fn binary(variables: usize) -> Self {
        Self::new(std::iter::repeat_n(2, variables))
    }

    /// Number of variables.
    pub fn variables(&self) -> usize {
        self.first.len() - 1
    }

    /// Number of indicators.
    pub fn indicators(&self) -> usize {
        self.variable.len()
    }

    /// Number of values of a variable.
    pub fn card(&self, variable: usize) -> usize {
        (self.first[variable + 1] - self.first[variable]) as usize + 1
    }

    /// The indicator of a value other than 0.
    pub fn indicator(&self, variable: usize, value: usize) -> Option<u32> {
        let at = self.first[variable] + value.checked_sub(1)? as u32;
        (at < self.first[variable + 1]).then_some(at)
    }

    /// The variable and value of an indicator.
    pub fn value(&self, indicator: u32) -> (usize, usize) {
        let variable = self.variable[indicator as usize] as usize;
        (variable, (indicator - self.first[variable]) as usize + 1)
    }

    /// The first indicator of a variable.
    pub(super) fn first(&self, variable: usize) -> usize {
        self.first[variable] as usize
    }
}

/// Weighted rows.
#[derive(Clone, Debug)]
pub struct Rows {
    /// The variables.
    pub schema: Schema,
    starts: Vec<u32>,
    items: Vec<u32>,
    weights: Vec<f32>,
}

impl Rows {
    /// Joins equal rows. Indicators out of range or of one variable twice are dropped (the first
    /// counts).
    pub fn new(schema: Schema, rows: impl IntoIterator<Item = (Vec<u32>, f32)>) -> Self {
        let mut joined: BTreeMap<Vec<u32>, f32> = BTreeMap::new();
        let indicators = schema.indicators() as u32;
        for (mut row, weight) in rows {
            row.retain(|i| *i < indicators);
            row.sort_unstable();
            row.dedup_by_key(|i| schema.variable[*i as usize]);
            *joined.entry(row).or_insert(0.0) += weight;
        }
        let mut out = Self {
            schema,
            starts: vec![0],
            items: Vec::new(),
            weights: Vec::with_capacity(joined.len()),
        };
        for (row, weight) in joined {
            out.items.extend(row);
            out.starts.push(out.items.len() as u32);
            out.weights.push(weight);
        }
        out
    }

    /// Number of distinct rows.
    pub fn len(&self) -> usize {
        self.weights.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty()
    }

    /// Indicators of a row.
    pub fn row(&self, i: usize) -> &[u32] {
        &self.items[self.starts[i] as usize..self.starts[i + 1] as usize]
    }

    /// Sum of the weights.
    pub fn total(&self) -> f64 {
        self.weights.iter().map(|w| f64::from(*w)).sum()
    }

    /// Rows and weights.
    pub fn iter(&self) -> impl Iterator<Item = (&[u32], f32)> {
        (0..self.len()).map(|i| (self.row(i), self.weights[i]))
    }
}
