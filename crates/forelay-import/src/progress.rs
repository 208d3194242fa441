//! What a build reports while it runs.
//!
//! Refuses to know the time: a caller that shows rates takes the time of each report.

/// A stage of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BuildPhase {
    /// Package indexes are refreshed.
    Refresh,
    /// Packages are downloaded.
    Download,
    /// Packages are unpacked and configured.
    Install,
    /// The source is read into a tree.
    Read,
    /// The image is written and hashed.
    Write,
}

impl BuildPhase {
    /// A word for people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Refresh => "refreshing indexes",
            Self::Download => "downloading",
            Self::Install => "installing",
            Self::Read => "reading",
            Self::Write => "writing image",
        }
    }
}

/// How far a phase is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A phase began.
    Started(BuildPhase),
    /// Part of a phase is done, in thousandths, with what is being done.
    Permille {
        /// The phase.
        phase: BuildPhase,
        /// 0 to 1000.
        permille: u32,
        /// What is being done, in words.
        detail: String,
    },
    /// Bytes done so far in a phase.
    Bytes {
        /// The phase.
        phase: BuildPhase,
        /// Bytes done.
        done_bytes: u64,
        /// Bytes in all, if known.
        total_bytes: Option<u64>,
    },
}

/// Where reports go.
pub type Reporter<'a> = &'a (dyn Fn(Progress) + Send + Sync);

/// Parses a line of apt's status descriptor: `dlstatus:1:12.5:…`, `pmstatus:dpkg:40:…`.
pub(crate) fn apt_status(line: &str) -> Option<Progress> {
    let mut parts = line.splitn(4, ':');
    let phase = match parts.next()? {
        "dlstatus" => BuildPhase::Download,
        "pmstatus" => BuildPhase::Install,
        _ => return None,
    };
    let percent: f64 = parts.nth(1)?.parse().ok()?;
    let detail = parts.next().unwrap_or_default().to_owned();
    let permille = (percent * 10.0).clamp(0.0, 1000.0) as u32;
    Some(Progress::Permille {
        phase,
        permille,
        detail,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apt_status_lines_are_understood_and_others_are_not() {
        let line = "dlstatus:3:37.5000:Retrieving file 3 of 8 (2s: remaining)";
        let Some(Progress::Permille {
            phase,
            permille,
            detail,
        }) = apt_status(line)
        else {
            panic!("not understood");
        };
        assert_eq!((phase, permille), (BuildPhase::Download, 375));
        assert_eq!(detail, "Retrieving file 3 of 8 (2s: remaining)");
        assert_eq!(apt_status("Setting up nginx (1.22) ..."), None);
    }
}
