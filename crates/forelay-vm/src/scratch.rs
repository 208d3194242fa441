//! Scratch disks: sparse ext4 files for the upper of a VM's root.
//!
//! Made by the host (`mkfs.ext4`), since the guest's image need not have the tools. No
//! journal: the disk is thrown away with the VM.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::process::output_within;

/// Smallest useful size.
const MIN_BYTES: u64 = 16 << 20;
/// A sparse file takes a moment; a disk that takes longer does not answer.
const FORMAT_LIMIT: Duration = Duration::from_secs(120);

/// Why a scratch disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// Too small to hold a file system.
    #[error("{bytes} bytes are too small: at least {MIN_BYTES}")]
    TooSmall {
        /// The size asked for.
        bytes: u64,
    },
    /// The file could not be made.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `mkfs.ext4` is missing or failed.
    #[error("mkfs.ext4 (Debian package e2fsprogs) on {}: {output}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it said.
        output: String,
    },
}

/// Makes the disk unless the file exists.
pub async fn ensure(path: &Path, bytes: u64) -> Result<(), ScratchError> {
    if path.exists() {
        return Ok(());
    }
    if bytes < MIN_BYTES {
        return Err(ScratchError::TooSmall { bytes });
    }
    let file_error = |source| ScratchError::File {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(file_error)?;
    }
    // Formatted under another name: a half-made disk is never taken for a good one.
    let temporary = path.with_extension("formatting");
    let file = std::fs::File::create(&temporary).map_err(file_error)?;
    file.set_len(bytes).map_err(file_error)?;
    drop(file);
    let formatted = format(&temporary).await;
    if formatted.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    formatted?;
    std::fs::rename(&temporary, path).map_err(file_error)
}

async fn format(path: &Path) -> Result<(), ScratchError> {
    let failed = |output: String| ScratchError::Format {
        path: path.to_owned(),
        output,
    };
    let mut command = tokio::process::Command::new("mkfs.ext4");
    command
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-E"])
        .arg("lazy_itable_init=1,nodiscard")
        .arg(path)
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
    let output = output_within(&mut command, FORMAT_LIMIT).await;
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn disks_are_sparse_made_once_and_not_too_small() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scratch");
        assert!(matches!(
            ensure(&path, 4096).await,
            Err(ScratchError::TooSmall { .. })
        ));
        if let Err(error) = ensure(&path, 64 << 20).await {
            println!("SKIPPED disks_are_sparse_made_once_and_not_too_small: {error}");
            return;
        }
        use std::os::unix::fs::MetadataExt;
        let made = std::fs::metadata(&path).unwrap();
        assert_eq!(made.len(), 64 << 20);
        assert!(made.blocks() * 512 < 8 << 20, "{} blocks", made.blocks());
        ensure(&path, 128 << 20).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 64 << 20);
    }
}
