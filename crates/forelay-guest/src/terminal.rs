//! A terminal of a program that the host runs in the guest.
//!
//! Owns the side of who shows it: what is written there is typed, what is read is shown. All of
//! the program's standard streams are the other side. Invariant: when the program has ended the
//! kernel takes the terminal from its children, so that what is read has an end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

use forelay_guest_protocol::messages::TerminalSize;

use crate::sys;

/// See the module's header.
pub struct Terminal {
    shown: File,
    programs: OwnedFd,
}

impl Terminal {
    /// A new one of this size.
    pub fn open(size: TerminalSize) -> io::Result<Self> {
        let (shown, programs) = sys::open_terminal()?;
        let shown = File::from(shown);
        sys::set_nonblocking(shown.as_fd())?;
        resize(&shown, size);
        Ok(Self { shown, programs })
    }

    /// Makes it the program's.
    pub fn give_to(&self, command: &mut Command) -> io::Result<()> {
        let side = || self.programs.try_clone().map(Stdio::from);
        command.stdin(side()?).stdout(side()?).stderr(side()?);
        Ok(())
    }

    /// Where to type, if anybody may, and where to read what is shown.
    pub fn sides(self, typed: bool) -> io::Result<(Option<File>, File)> {
        let typed = typed.then(|| self.shown.try_clone()).transpose()?;
        Ok((typed, self.shown))
    }
}

/// Gives a terminal another size, by its side of who shows it.
pub fn resize(shown: &File, size: TerminalSize) {
    // A size is what is shown best, and no more.
    let _ = sys::set_terminal_size(shown.as_fd(), size.rows, size.columns);
}
