//! Tests that boot real VMs with QEMU (TCG unless KVM works). They fetch a Debian kernel and
//! busybox once into `target/test-cache`, and skip loudly where that or QEMU is missing.

mod attach;
mod boot;
mod disks;
mod failures;
mod fixture;
mod init;
mod snapshot;
