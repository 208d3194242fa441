//! `xtask hog`: a process that takes memory when told to.
//!
//! Reads a number of MiB a line, allocates and fills so much more, and answers with what
//! it holds. Gives everything back when its input ends.

use std::io::{BufRead as _, Write as _};

use anyhow::Result;

/// Runs until standard input ends.
pub fn run() -> Result<()> {
    let mut held: Vec<Vec<u8>> = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let mib: usize = line?.trim().parse()?;
        // Not zero: the pages have to be real.
        held.push(vec![1; mib << 20]);
        let bytes: usize = held.iter().map(Vec::len).sum();
        println!("{bytes}");
        std::io::stdout().flush()?;
    }
    Ok(())
}
