//! A real terminal for commands that want one: tmux's, whose screen tests read.

use std::path::PathBuf;
use std::process::Command;

use crate::fixture::Host;

/// Whether there is one; without it a loud line says what is not tested.
pub fn is_there(test: &str) -> bool {
    let found = Command::new("tmux").arg("-V").output().is_ok();
    if !found {
        println!("SKIPPED the rest of {test}: needs tmux");
    }
    found
}

/// A terminal of 100 columns and 30 lines.
pub struct Screen {
    socket: PathBuf,
}

impl Screen {
    /// In which `script` runs, with a command of the program under test as `$@`.
    pub fn new(host: &Host, name: &str, script: &str, words: &[&str]) -> Self {
        let socket = host.dir().join(name);
        let screen = Self { socket };
        let command = host.command(words);
        let mut all = vec!["new-session".into(), "-d".into()];
        all.extend(["-x", "100", "-y", "30", "sh", "-c", script, "sh"].map(Into::into));
        all.push(command.get_program().to_owned());
        all.extend(command.get_args().map(ToOwned::to_owned));
        screen.tmux(all);
        screen
    }

    pub fn tmux<I: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = I>) -> String {
        let mut command = Command::new("tmux");
        command
            .arg("-S")
            .arg(&self.socket)
            .args(["-f", "/dev/null"]);
        command
            .args(words)
            .env_remove("TMUX")
            .env("LC_ALL", "C.UTF-8");
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn press(&self, key: &str) {
        self.tmux(["send-keys", key]);
    }

    /// What is on it.
    pub fn text(&self) -> String {
        self.tmux(["capture-pane", "-p"])
    }

    /// Waits until all of `words` are on it; its text.
    #[track_caller]
    pub fn shows(&self, host: &Host, words: &[&str]) -> String {
        let mut text = String::new();
        host.until(&format!("the screen shows {words:?}"), |_| {
            let now = self.text();
            if now != text {
                // To be seen where it never shows them.
                println!("{}\n---", now.trim_end());
            }
            text = now;
            words.iter().all(|word| text.contains(word))
        });
        text
    }

    /// Process id of what runs in it.
    pub fn pid(&self) -> u64 {
        let pid = self.tmux(["display-message", "-p", "#{pane_pid}"]);
        pid.trim().parse().unwrap()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(&self.socket).arg("kill-server");
        let _ = command.output();
    }
}
