//! `forelay history import` and `forelay daemon --history-reset`: the history's file itself.
//!
//! Works on the database without the daemon; a daemon that runs learns at its next start.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use forelay_predict::time::Timestamp;
use forelay_sim::launch_rows::{self, OnBadRow};

use super::output;
use crate::config::Config;
use crate::daemon::HISTORY_FILE;
use crate::history::{ImportOptions, OnCorrupt, OpenOptions, SqliteHistory, import_csv};

/// What may be done with the history.
#[derive(Debug, clap::Subcommand)]
pub enum HistoryCommand {
    /// Import launches from CSV (gzip accepted): time_s or time_ms, profile, owner, and
    /// duration_s or count.
    Import {
        trace: PathBuf,
        /// What the trace's time zero is, in milliseconds since the epoch.
        #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
        origin_ms: i64,
        /// Leave rows out that cannot be read, instead of stopping at the first.
        #[arg(long)]
        skip_bad_rows: bool,
        #[arg(long)]
        json: bool,
    },
}

/// Runs a command on the history's file.
pub async fn run(command: HistoryCommand, config: &Config) -> Result<()> {
    let HistoryCommand::Import {
        trace,
        origin_ms,
        skip_bad_rows,
        json,
    } = command;
    let input =
        launch_rows::open(&trace).with_context(|| format!("cannot open {}", trace.display()))?;
    std::fs::create_dir_all(&config.state_dir)
        .with_context(|| format!("cannot make {}", config.state_dir.display()))?;
    let path = config.state_dir.join(HISTORY_FILE);
    let history = SqliteHistory::open(&path, OpenOptions::default()).await?;
    let options = ImportOptions {
        origin: Timestamp(origin_ms),
        on_bad_row: if skip_bad_rows {
            OnBadRow::Skip
        } else {
            OnBadRow::Stop
        },
    };
    let report = import_csv(&history, input, options)
        .await
        .with_context(|| format!("cannot import {}", trace.display()))?;
    history.close().await;
    if json {
        return output::json(&report);
    }
    for bad in &report.bad {
        complain!("line {}: {}", bad.line, bad.reason);
    }
    say!(
        "{} rows: {} events stored, {} were there already, {} too old; {} rows left out",
        report.rows,
        report.appended.stored,
        report.appended.duplicates,
        report.appended.late,
        report.bad_rows
    );
    say!("a daemon that runs learns from them when it is restarted");
    Ok(())
}

/// Sets a corrupt history aside, so that the daemon can start again. One that is in order stays.
pub fn reset(config: &Config) -> Result<()> {
    std::fs::create_dir_all(&config.state_dir)
        .with_context(|| format!("cannot make {}", config.state_dir.display()))?;
    let path = config.state_dir.join(HISTORY_FILE);
    let options = OpenOptions {
        on_corrupt: OnCorrupt::MoveAside,
        ..OpenOptions::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let history = SqliteHistory::open(&path, options).await?;
        history.close().await;
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &std::path::Path) -> Config {
        Config {
            state_dir: dir.to_path_buf(),
            ..Config::default()
        }
    }

    #[test]
    fn a_corrupt_history_is_set_aside_and_a_sound_one_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(HISTORY_FILE);
        std::fs::write(
            &path,
            b"this is no database at all, but long enough to be read",
        )
        .unwrap();
        reset(&config(dir.path())).unwrap();
        let aside = dir.path().join(format!("{HISTORY_FILE}.corrupt-1"));
        assert!(aside.is_file() && path.is_file());
        reset(&config(dir.path())).unwrap();
        assert!(
            !dir.path()
                .join(format!("{HISTORY_FILE}.corrupt-2"))
                .exists()
        );
    }

    #[tokio::test]
    async fn a_trace_is_imported_once() {
        let dir = tempfile::tempdir().unwrap();
        let trace = dir.path().join("trace.csv");
        std::fs::write(
            &trace,
            "time_s,profile,owner,duration_s\n60,web,ann,5\n90,ci,ann,5\n",
        )
        .unwrap();
        let import = || HistoryCommand::Import {
            trace: trace.clone(),
            origin_ms: 1_000_000,
            skip_bad_rows: false,
            json: true,
        };
        for _ in 0..2 {
            run(import(), &config(dir.path())).await.unwrap();
        }
        let path = dir.path().join(HISTORY_FILE);
        let history = SqliteHistory::open(&path, OpenOptions::default())
            .await
            .unwrap();
        let profiles = crate::history::History::profiles(&history).await.unwrap();
        assert_eq!(profiles.len(), 2);
        assert!(profiles.iter().all(|one| one.launches == 1));
    }
}
