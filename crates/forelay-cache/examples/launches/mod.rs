//! Launches of the development traces, with profiles and owners as dense numbers.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::PathBuf;

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// When, in milliseconds from the trace's start.
    pub now_ms: i64,
    /// Profile, numbered by first appearance.
    pub profile: u32,
    /// Owner, numbered by first appearance.
    pub owner: u32,
}

fn number(names: &mut BTreeMap<String, u32>, name: &str) -> u32 {
    let next = names.len() as u32;
    *names.entry(name.to_owned()).or_insert(next)
}

/// The file of the Google launches.
pub const GOOGLE: &str = "google2011-days00-14.csv.gz";

/// Where the traces are.
pub fn directory() -> PathBuf {
    let dir = std::env::var_os("FORELAY_TRACES");
    dir.unwrap_or_else(|| "/work/shared/traces".into()).into()
}

/// The Google launches, or those of the trace after `--trace` on the command line; exits
/// with a message when the trace is not there.
pub fn google() -> Vec<Launch> {
    let arguments: Vec<String> = std::env::args().collect();
    let given = arguments.iter().position(|argument| argument == "--trace");
    let given = given
        .and_then(|at| arguments.get(at + 1))
        .map(PathBuf::from);
    let path = given.unwrap_or_else(|| directory().join(GOOGLE));
    let opened = std::fs::File::open(&path).unwrap_or_else(|cause| {
        eprintln!("{}: {cause}; set FORELAY_TRACES", path.display());
        std::process::exit(2);
    });
    let mut text = String::new();
    let mut decoder = flate2::read::GzDecoder::new(opened);
    decoder
        .read_to_string(&mut text)
        .expect("the trace is gzipped text");
    let (mut profiles, mut owners) = (BTreeMap::new(), BTreeMap::new());
    let mut launches = Vec::new();
    for line in text.lines().skip(1) {
        let mut fields = line.split(',');
        let mut field = || fields.next().unwrap_or_default();
        let (time, profile, owner) = (field(), field(), field());
        let time_s: f64 = time.parse().expect("the first column is a time");
        let launch = Launch {
            now_ms: (time_s * 1e3) as i64,
            profile: number(&mut profiles, profile),
            owner: number(&mut owners, owner),
        };
        launches.push(launch);
    }
    launches
}
