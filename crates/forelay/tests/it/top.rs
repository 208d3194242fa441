//! `forelay top` in a real terminal, tmux's: what is on the screen after keys, another size, a
//! daemon that goes away; and that the terminal is given back.

use std::path::PathBuf;
use std::process::Command;

use crate::fixture::{Host, Settings, bench, idle, lives};

/// A terminal of 100 columns and 30 lines.
struct Screen {
    socket: PathBuf,
}

impl Screen {
    /// In which `script` runs, with the command under test as `$@`.
    fn new(host: &Host, name: &str, script: &str) -> Self {
        let socket = host.dir().join(name);
        let screen = Self { socket };
        let top = host.command(["top"]);
        let mut words = vec!["new-session".into(), "-d".into()];
        words.extend(["-x", "100", "-y", "30", "sh", "-c", script, "sh"].map(Into::into));
        words.push(top.get_program().to_owned());
        words.extend(top.get_args().map(ToOwned::to_owned));
        screen.tmux(words);
        screen
    }

    fn tmux<I: AsRef<std::ffi::OsStr>>(&self, words: impl IntoIterator<Item = I>) -> String {
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

    fn press(&self, key: &str) {
        self.tmux(["send-keys", key]);
    }

    /// What is on it.
    fn text(&self) -> String {
        self.tmux(["capture-pane", "-p"])
    }

    /// Waits until all of `words` are on it; its text.
    #[track_caller]
    fn shows(&self, host: &Host, words: &[&str]) -> String {
        let mut text = String::new();
        host.until(&format!("the screen shows {words:?}"), |_| {
            text = self.text();
            words.iter().all(|word| text.contains(word))
        });
        text
    }

    /// Process id of what runs in it.
    fn pid(&self) -> u64 {
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

#[test]
fn privileged_top_is_seen_in_a_terminal_and_gives_it_back() {
    let test = "privileged_top_is_seen_in_a_terminal_and_gives_it_back";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        no_vmm: true,
        ..Settings::default()
    };
    let mut host = Host::started(&bench, &settings);
    let manifest = host.write("one.toml", &idle("one-1", "[]", ""));
    host.refused(["run", "--detach", manifest.to_str().unwrap()]);
    // No terminal: one frame can be had, and it is told how.
    assert!(host.refused(["top"]).contains("forelay top --once"));
    let once = host.ok(["top", "--once"]);
    for words in [
        "Forelay  0 VMs",
        "one-1",
        "failed",
        "sharing saves",
        "launching",
    ] {
        assert!(once.contains(words), "{words}: {once}");
    }
    assert!(!once.contains('\u{1b}'), "{once}");
    if Command::new("tmux").arg("-V").output().is_err() {
        println!("SKIPPED the rest of {test}: needs tmux");
        return;
    }
    let script = "\"$@\"; echo \"top left with $?\"; exec sleep 1000";
    let screen = Screen::new(&host, "terminal", script);
    screen.shows(&host, &["Forelay  0 VMs", "one-1", "WHAT HAPPENED"]);
    screen.press("5");
    host.until("the events are seen alone", |_| {
        let text = screen.text();
        text.contains("launching") && !text.contains("COMPONENT") && !text.contains("STATE")
    });
    screen.press("2");
    screen.shows(&host, &["one-1", "PORTS"]);
    // A narrow terminal has fewer columns, and no line is broken.
    screen.tmux(["resize-window", "-x", "44", "-y", "12"]);
    host.until("the columns fit", |_| {
        let text = screen.text();
        text.contains("one-1") && text.contains("STATE") && !text.contains("PORTS")
    });
    // The daemon goes away and comes back: both are told, and what was known stays.
    screen.tmux(["resize-window", "-x", "100", "-y", "30"]);
    assert_eq!(host.terminate(), Some(0));
    screen.shows(&host, &["no daemon answers", "one-1"]);
    host.start();
    host.until("it is asked again", |_| {
        !screen.text().contains("no daemon answers")
    });
    screen.press("q");
    let left = screen.shows(&host, &["top left with 0"]);
    assert!(!left.contains("overview"), "the screen of before: {left}");
    ends(&host);
}

/// Signals and the end of the terminal end it, too.
fn ends(host: &Host) {
    let script = "\"$@\"; echo \"ended with $?\"; exec sleep 1000";
    let screen = Screen::new(host, "ended", script);
    screen.shows(host, &["Forelay  0 VMs"]);
    let children = format!("/proc/{0}/task/{0}/children", screen.pid());
    let child = std::fs::read_to_string(children).unwrap();
    crate::fixture::signal("TERM", child.trim().parse().unwrap());
    let left = screen.shows(host, &["ended with 0"]);
    assert!(!left.contains("overview"), "{left}");
    let screen = Screen::new(host, "gone", "exec \"$@\"");
    screen.shows(host, &["Forelay  0 VMs"]);
    let pid = screen.pid();
    drop(screen);
    host.until("it ends with its terminal", |_| !lives(pid));
}
