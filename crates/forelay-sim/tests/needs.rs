//! What launches consist of, foretold on traces that name components.

use std::fmt::Write as _;

use forelay_sim::launch_rows::OnBadRow;
use forelay_sim::trace::Trace;
use forelay_sim::{NeedsOutcome, SimulateConfig, simulate_trace};

fn judge(text: &str) -> Option<NeedsOutcome> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.csv");
    std::fs::write(&path, text).unwrap();
    let trace = Trace::read(&path, OnBadRow::Stop).unwrap();
    let mut config = SimulateConfig::new(path);
    config.policies = vec!["none".parse().unwrap()];
    simulate_trace(&trace, &config).unwrap().needs
}

/// Forty profiles of two kinds: those of `web` have one set of components and get a debugger,
/// those of `ci` have another. `mixed` gives each launch a kind that its profile does not tell.
fn trace(mixed: bool) -> String {
    let mut text = "time_s,profile,owner,components,attached\n".to_owned();
    for launch in 0..800 {
        let profile = launch / 20;
        let is_web = match mixed {
            true => launch % 3 == 0,
            false => profile % 2 == 0,
        };
        let owner = if profile % 2 == 0 { "web" } else { "ci" };
        let (components, attached) = match is_web {
            true => ("debian|nginx|openssl|php", "gdb"),
            false => ("debian|git|rust|cache", ""),
        };
        let at = launch * 60;
        writeln!(text, "{at},p{profile},{owner},{components},{attached}").unwrap();
    }
    text
}

#[test]
fn components_that_a_profile_tells_are_found_also_for_profiles_that_never_ran() {
    let needs = judge(&trace(false)).unwrap();
    assert_eq!(
        (needs.launches.judged, needs.first_launches.judged),
        (800, 40)
    );
    assert_eq!(
        (needs.attachments.judged, needs.attachments.components),
        (400, 400)
    );
    let gain = |found: forelay_sim::Found| found.found_pct - found.found_by_popularity_pct;
    assert!(gain(needs.launches) > 20.0, "{needs:?}");
    // What never ran is told by its owner.
    assert!(gain(needs.first_launches) > 10.0, "{needs:?}");
    assert!(needs.attachments.found_pct > 95.0, "{needs:?}");
}

#[test]
fn components_that_nothing_tells_are_found_no_better_than_by_popularity() {
    let needs = judge(&trace(true)).unwrap();
    let gain = needs.launches.found_pct - needs.launches.found_by_popularity_pct;
    assert!(gain.abs() < 5.0, "{needs:?}");
}

#[test]
fn a_trace_without_components_has_no_such_figures() {
    assert_eq!(judge("time_s,profile,owner\n1,a,o\n2,a,o\n"), None);
}
