//! The daemon's processes: the holder that stays, the pinner, the worker that may die; what a
//! worker takes over from the one before, and what it does without.

pub(super) mod health;
pub(super) mod heartbeat;
pub(super) mod holder;
mod log_lines;
pub(super) mod startup;
pub(super) mod takeover;
pub(super) mod worker;

/// Log lines on standard error, filtered by `FORELAY_LOG`.
fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("FORELAY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| log_lines::OneLine(std::io::stderr()));
    // Fails only if a test has set one already.
    let _ = match std::env::var("FORELAY_LOG_FORMAT").as_deref() {
        Ok("json") => builder.json().try_init(),
        _ => builder.with_ansi(false).try_init(),
    };
}

/// What this process and its children make is root's alone, whatever umask it was started
/// with: records, logs and images hold what VMs are given, sockets lead to their VMMs.
fn keep_private() {
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
}
