//! Users of the host beside root: each acts for the owners that the configuration gives to it,
//! as if there were no others.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;

use crate::fixture::{Host, Settings, bench, idle};

/// A user and its group, which need no names.
const USER: u32 = 65_534;

#[test]
fn privileged_a_user_acts_for_its_owners_alone_and_what_it_does_is_written_down() {
    let test = "privileged_a_user_acts_for_its_owners_alone_and_what_it_does_is_written_down";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        no_vmm: true,
        over_tcp: true,
        ..Settings::default()
    };
    let mut host = Host::new(&bench, &settings);
    let config = host.dir().join("forelay.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let access = format!("[[access]]\nuser = \"{USER}\"\nowners = [\"mine\"]\n");
    std::fs::write(&config, format!("group = \"{USER}\"\n{text}\n{access}")).unwrap();
    let open = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(host.dir(), 0o711);
    open(&config, 0o644);
    host.start();
    let manifest = |name: &str, owner: &str| {
        let text =
            idle(name, "[]", "").replace("owner = \"tests\"", &format!("owner = \"{owner}\""));
        let path = host.write(&format!("{name}.toml"), &text);
        open(&path, 0o644);
        path.display().to_string()
    };
    let (mine, other) = (manifest("mine-1", "mine"), manifest("other-1", "others"));
    // There is no VMM: both are listed as failed.
    for one in [&mine, &other] {
        host.refused(["run", "--detach", one]);
    }
    let as_user = |arguments: &[&str]| {
        let mut command = host.command(arguments);
        let output = command.uid(USER).gid(USER).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (
            output.status.success(),
            text + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let (done, listed) = as_user(&["ps", "--all", "--json"]);
    assert!(
        done && listed.contains("mine-1") && !listed.contains("other-1"),
        "{listed}"
    );
    let (done, top) = as_user(&["top", "--once"]);
    assert!(
        done && top.contains("mine-1") && top.contains("all owners") && !top.contains("other-1"),
        "{top}"
    );
    let (done, learned) = as_user(&["history", "--json"]);
    assert!(
        done && learned.contains("mine") && !learned.contains("others"),
        "{learned}"
    );
    for (arguments, why) in [
        (vec!["stop", "other-1"], "other-1"),
        (vec!["exec", "other-1", "true"], "other-1"),
        (vec!["pause", "other-1"], "no VM is called"),
        (vec!["resume", "other-1"], "no VM is called"),
        (vec!["hibernate", "other-1"], "no VM is called"),
        (vec!["fork", "other-1"], "no VM is called"),
        (vec!["run", "--detach", &other], "owner others"),
        (vec!["prefetch", &other], "owner others"),
        (vec!["memory"], "whole host"),
        (vec!["dashboard"], "cannot read the token"),
    ] {
        let (done, said) = as_user(&arguments);
        assert!(!done && said.contains(why), "{arguments:?}: {said}");
    }
    let (_, said) = as_user(&["run", "--detach", "--name", "mine-2", &mine]);
    assert!(!said.contains("may not act"), "{said}");
    assert!(
        host.run(["ps", "--all", "--json"])
            .stdout
            .contains("mine-2"),
        "asked for by its user"
    );
    let log = std::fs::read_to_string(host.dir().join("state/audit.log")).unwrap();
    let deeds: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let was = |user: u32, method: &str, path: &str, status: u64| {
        deeds.iter().any(|deed| {
            deed["user"] == user
                && deed["method"] == method
                && deed["path"] == path
                && deed["status"] == status
        })
    };
    assert!(was(USER, "DELETE", "/v1/vms/other-1", 404), "{log}");
    assert!(was(USER, "POST", "/v1/vms", 403), "{log}");
    assert!(was(USER, "POST", "/v1/vms/other-1/fork", 404), "{log}");
    assert!(
        deeds
            .iter()
            .any(|deed| deed["user"] == 0 && deed["path"] == "/v1/vms"),
        "{log}"
    );
}
