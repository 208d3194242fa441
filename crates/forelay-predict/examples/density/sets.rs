//! Thirteen standard binary data sets, from where `FORELAY_TRACES` says.
//!
//! Columns are flipped so that 1 is the rarer value of each, which makes rows sparse; likelihoods
//! do not change by it.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use forelay_predict::needs::data::{Rows, Schema};

/// Where the sets are.
pub struct DensitySets(PathBuf);

/// One set in its three parts.
pub struct DensitySet {
    pub name: String,
    pub train: Rows,
    pub valid: Rows,
    pub test: Rows,
}

impl DensitySets {
    /// The sets in the traces' folder, for a test that says so if there are none.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "the example is told the folder")
    )]
    pub fn find(test: &str) -> Option<Self> {
        let folder = std::env::var_os("FORELAY_TRACES").map(PathBuf::from);
        let folder = folder.map(|folder| folder.join("density"));
        let found = folder.filter(|folder| folder.is_dir()).map(Self);
        if found.is_none() {
            println!("SKIPPED {test}: no data sets in FORELAY_TRACES");
        }
        found
    }

    /// The sets in a folder.
    #[cfg_attr(test, expect(dead_code, reason = "tests look for the folder"))]
    pub fn open(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    /// Reads a set; one that is damaged is a panic, since nothing can be judged by it.
    pub fn load(&self, name: &str) -> DensitySet {
        let part = |part: &str| read(&self.0.join(format!("{name}.{part}.data.gz")));
        let train = part("train");
        let flip = commonest(&train);
        DensitySet {
            name: name.to_owned(),
            valid: sparse(&part("valid"), &flip),
            test: sparse(&part("test"), &flip),
            train: sparse(&train, &flip),
        }
    }
}

fn read(path: &Path) -> Vec<Vec<bool>> {
    let mut text = String::new();
    let file = std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    flate2::read::GzDecoder::new(file)
        .read_to_string(&mut text)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| line.split(',').map(|cell| cell.trim() == "1").collect())
        .collect()
}

/// The columns in which 1 is the commoner value.
fn commonest(rows: &[Vec<bool>]) -> Vec<bool> {
    let columns = rows.first().map_or(0, Vec::len);
    (0..columns)
        .map(|v| rows.iter().filter(|row| row[v]).count() * 2 > rows.len())
        .collect()
}

fn sparse(rows: &[Vec<bool>], flip: &[bool]) -> Rows {
    let sparse = rows.iter().map(|row| {
        let differ = (0..row.len()).filter(|v| row[*v] != flip[*v]);
        (differ.map(|v| v as u32).collect(), 1.0)
    });
    Rows::new(Schema::binary(flip.len()), sparse)
}
