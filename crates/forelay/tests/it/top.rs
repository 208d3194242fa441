//! `forelay top` in a real terminal, tmux's: what is on the screen after keys, another size, a
//! daemon that goes away; and that the terminal is given back.

use crate::fixture::{Host, Settings, bench, idle, lives};
use crate::screen::{self, Screen};

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
    if !screen::is_there(test) {
        return;
    }
    let script = "\"$@\"; echo \"top left with $?\"; exec sleep 1000";
    let screen = Screen::new(&host, "terminal", script, &["top"]);
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
    let screen = Screen::new(host, "ended", script, &["top"]);
    screen.shows(host, &["Forelay  0 VMs"]);
    let children = format!("/proc/{0}/task/{0}/children", screen.pid());
    let child = std::fs::read_to_string(children).unwrap();
    crate::fixture::signal("TERM", child.trim().parse().unwrap());
    let left = screen.shows(host, &["ended with 0"]);
    assert!(!left.contains("overview"), "{left}");
    let screen = Screen::new(host, "gone", "exec \"$@\"", &["top"]);
    screen.shows(host, &["Forelay  0 VMs"]);
    let pid = screen.pid();
    drop(screen);
    host.until("it ends with its terminal", |_| !lives(pid));
}
