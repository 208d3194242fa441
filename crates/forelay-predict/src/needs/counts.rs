//! Weighted counts of indicators and of pairs of them: all that learning a tree needs.

use super::data::{Rows, Schema};

/// Counts over the indicators of a schema.
#[derive(Clone, Debug)]
pub struct PairCounts {
    indicators: usize,
    /// Sum of weights.
    pub total: f64,
    /// `pairs[i * indicators + j]` for `i <= j`: weight of rows that have both; the diagonal has
    /// single counts.
    pairs: Vec<f32>,
}

impl PairCounts {
    /// No rows yet.
    pub fn new(schema: &Schema) -> Self {
        let indicators = schema.indicators();
        Self {
            indicators,
            total: 0.0,
            pairs: vec![0.0; indicators * indicators],
        }
    }

    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.total = 0.0;
        self.pairs.fill(0.0);
    }

    /// Counts of all rows.
    pub fn of(rows: &Rows) -> Self {
        let mut counts = Self::new(&rows.schema);
        for (row, weight) in rows.iter() {
            counts.add(row, weight);
        }
        counts
    }

    /// Adds one row.
    pub fn add(&mut self, row: &[u32], weight: f32) {
        self.total += f64::from(weight);
        for (at, i) in row.iter().enumerate() {
            let start = *i as usize * self.indicators;
            let line = &mut self.pairs[start..start + self.indicators];
            for j in &row[at..] {
                line[*j as usize] += weight;
            }
        }
    }

    /// Weight of rows with indicator `i`.
    pub fn single(&self, i: usize) -> f32 {
        self.pairs[i * self.indicators + i]
    }

    /// Weight of rows with both indicators, which are of different variables.
    pub fn pair(&self, i: usize, j: usize) -> f32 {
        let (low, high) = if i < j { (i, j) } else { (j, i) };
        self.pairs[low * self.indicators + high]
    }
}

/// How counts become probabilities. Pseudo-rows are spread evenly over the cells of a table, so
/// that all tables of a variable agree on it, and a variable of many values is not drowned.
#[derive(Clone, Copy)]
pub enum Prior<'a> {
    /// A Dirichlet prior of four times this many pseudo-rows: for two binary variables, this many
    /// in each cell of their joint table (1 is Laplace's rule).
    Cells(f64),
    /// `strength` pseudo-rows distributed as `of`, itself smoothed with `cells` as above.
    Shrink {
        /// What is shrunk towards.
        of: &'a PairCounts,
        /// Pseudo-rows of it.
        strength: f64,
        /// Its own smoothing.
        cells: f64,
    },
}

impl Prior<'_> {
    /// Writes the smoothed distribution of one variable.
    pub fn marginal(&self, counts: &PairCounts, schema: &Schema, v: usize, out: &mut Vec<f64>) {
        let mut scratch = Vec::new();
        let fill = |counts: &PairCounts, out: &mut Vec<f64>| fill_marginal(counts, schema, v, out);
        self.smoothed(counts, fill, out, &mut scratch);
    }

    /// Writes the smoothed joint distribution of two variables, row-major in `v`.
    pub fn joint(
        &self,
        counts: &PairCounts,
        schema: &Schema,
        (v, w): (usize, usize),
        out: &mut Vec<f64>,
        scratch: &mut Vec<f64>,
    ) {
        let fill = |counts: &PairCounts, out: &mut Vec<f64>| fill_joint(counts, schema, v, w, out);
        self.smoothed(counts, fill, out, scratch);
    }

    fn smoothed(
        &self,
        counts: &PairCounts,
        fill: impl Fn(&PairCounts, &mut Vec<f64>),
        out: &mut Vec<f64>,
        scratch: &mut Vec<f64>,
    ) {
        fill(counts, out);
        match self {
            Self::Cells(alpha) => smooth(out, counts.total, 4.0 * alpha),
            Self::Shrink {
                of,
                strength,
                cells,
            } => {
                fill(of, scratch);
                smooth(scratch, of.total, 4.0 * cells);
                let total = counts.total + strength;
                for (p, b) in out.iter_mut().zip(scratch.iter()) {
                    *p = (*p + strength * b) / total;
                }
            }
        }
    }
}

/// Spreads `pseudo` rows evenly over the cells and makes them a distribution.
fn smooth(cells: &mut [f64], total: f64, pseudo: f64) {
    let each = pseudo / cells.len() as f64;
    for cell in cells {
        *cell = (*cell + each) / (total + pseudo);
    }
}

fn fill_marginal(counts: &PairCounts, schema: &Schema, v: usize, out: &mut Vec<f64>) {
    let first = schema.first(v);
    out.clear();
    out.push(0.0);
    let mut rest = counts.total;
    for value in 0..schema.card(v) - 1 {
        let n = f64::from(counts.single(first + value));
        rest -= n;
        out.push(n);
    }
    out[0] = rest.max(0.0);
}

fn fill_joint(counts: &PairCounts, schema: &Schema, v: usize, w: usize, out: &mut Vec<f64>) {
    let (cv, cw) = (schema.card(v), schema.card(w));
    let (fv, fw) = (schema.first(v), schema.first(w));
    out.clear();
    out.resize(cv * cw, 0.0);
    let mut corner = counts.total;
    for (b, cell) in out.iter_mut().enumerate().take(cw).skip(1) {
        let n = f64::from(counts.single(fw + b - 1));
        *cell = n;
        corner -= n;
    }
    for a in 1..cv {
        let mut rest = f64::from(counts.single(fv + a - 1));
        corner -= rest;
        for b in 1..cw {
            let n = f64::from(counts.pair(fv + a - 1, fw + b - 1));
            out[a * cw + b] = n;
            out[b] -= n;
            rest -= n;
            corner += n;
        }
        out[a * cw] = rest.max(0.0);
    }
    for cell in out.iter_mut().take(cw).skip(1) {
        *cell = cell.max(0.0);
    }
    out[0] = corner.max(0.0);
}
