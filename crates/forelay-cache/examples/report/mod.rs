//! Where a benchmark's figures go: to the file that the command line names, or out.

use serde_json::Value;

/// Writes `report`; ends the program if it cannot.
pub fn write(report: &Value) {
    let text = serde_json::to_string_pretty(report).expect("a report always serialises");
    match std::env::args().nth(1) {
        None => println!("{text}"),
        Some(path) => {
            if let Err(cause) = std::fs::write(&path, text) {
                eprintln!("{path}: {cause}");
                std::process::exit(1);
            }
        }
    }
}
