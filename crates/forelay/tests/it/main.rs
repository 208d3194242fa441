//! The command and the daemon as users have them: the real binary, real components, real
//! guests. Each file walks one side of it.
//!
//! Tests named `privileged_*` need root, FUSE, QEMU and the guest init; without them they
//! print a loud `SKIPPED` line. They run one at a time, also under plain `cargo test`.

mod access;
mod attach;
mod bad_input;
mod brought;
mod browser;
mod bundle;
mod command_line;
mod daemon_dies;
mod dashboard;
mod entrypoint;
mod exec;
mod failed_launch;
mod fixture;
mod flood;
mod foresight;
#[path = "../../../../xtask/src/frames.rs"]
mod frames;
mod full_disk;
mod images;
mod inherit;
mod life_of_a_page;
mod lifecycle;
mod making_images;
mod memory;
mod monitoring;
mod not_resumed;
mod premap;
#[path = "../../../forelay-store/tests/it/proxy.rs"]
mod proxy;
mod real_images;
mod repositories;
mod screen;
mod self_control;
#[path = "../../../forelay-store/tests/it/servers.rs"]
mod servers;
mod snapshots;
mod systemd;
mod top;
mod waiting;
mod watching;
mod worker_serves;
