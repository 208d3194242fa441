//! Launches of the development traces, with profiles and owners as dense numbers.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::PathBuf;

use forelay_cache::policy::Request;

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

impl Launch {
    /// The launch as a request for a unit slot.
    pub fn unit_request(&self) -> Request {
        Request {
            object: self.profile,
            owner: self.owner,
            bytes: 1,
            load_s: 1.0,
            now_ms: self.now_ms,
        }
    }
}

fn number(names: &mut BTreeMap<String, u32>, name: &str) -> u32 {
    let next = names.len() as u32;
    *names.entry(name.to_owned()).or_insert(next)
}

/// The Google launches; exits with a message when the trace is not there.
pub fn google() -> Vec<Launch> {
    read("google2011-days00-14.csv.gz")
}

/// Launches of a trace file in the directory of traces.
pub fn read(file: &str) -> Vec<Launch> {
    let dir = std::env::var_os("FORELAY_TRACES").unwrap_or_else(|| "/work/shared/traces".into());
    let path = PathBuf::from(dir).join(file);
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
        let (time, profile, owner, last) = (field(), field(), field(), field());
        let time_s: f64 = time.parse().expect("the first column is a time");
        let launch = Launch {
            now_ms: (time_s * 1e3) as i64,
            profile: number(&mut profiles, profile),
            owner: number(&mut owners, owner),
        };
        let counted = file.starts_with("azure");
        let count = if counted {
            last.parse().unwrap_or(1)
        } else {
            1
        };
        launches.extend(std::iter::repeat_n(launch, count));
    }
    launches
}
