//! Components come and go while a VM runs; what cannot be is refused in words.

use crate::fixture::{Host, Settings, bench, idle};

#[test]
fn privileged_a_component_is_attached_used_and_detached() {
    let test = "privileged_a_component_is_attached_used_and_detached";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let manifest = host.write("plain.toml", &idle("plain", "[]", ""));
    host.launch(&manifest, "plain", &[]);
    let has = |name: &str| -> bool {
        let vm = host.vm("plain");
        let components = vm["components"].as_array().unwrap();
        components.iter().any(|one| one["name"] == name)
    };

    // An attach that a later daemon could not know of is taken back.
    let unfinished = host.dir().join("run/vms/plain/instance.json.new");
    std::fs::create_dir(&unfinished).unwrap();
    let refused = host.refused(["attach", "plain", "forelay-tool"]);
    assert!(refused.contains("nothing was attached"), "{refused}");
    assert!(!has("forelay-tool"));
    let devices = || {
        host.json(["map", "plain"])["devices"]
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!(devices(), 2, "map image and base");
    let absent = host.run([
        "exec",
        "plain",
        "--",
        "test",
        "-e",
        "/usr/share/forelay-tool",
    ]);
    assert_eq!(absent.code, Some(1));
    std::fs::remove_dir(&unfinished).unwrap();

    host.ok(["attach", "plain", "forelay-tool"]);
    assert!(has("forelay-tool"));
    let says = host.sh("plain", "ls /usr/share/forelay-tool; forelay-tool");
    assert_eq!(says, "words\nhello from the tool\n");
    assert_eq!(devices(), 3, "map image, base and what was attached");

    // What cannot be attached; each says why, and leaves the VM as it was.
    let refused = host.refused(["attach", "plain", "forelay-tool"]);
    assert!(refused.contains("already"), "{refused}");
    let refused = host.refused(["attach", "plain", "forelay-rival"]);
    assert!(
        refused.contains("forelay-rival 2.0 excludes forelay-tool 1.0"),
        "{refused}"
    );
    let refused = host.refused(["attach", "plain", "forelay-needy"]);
    assert!(refused.contains("forelay-absent"), "{refused}");
    let refused = host.refused(["attach", "plain", "forelay-toll"]);
    assert!(refused.contains("did you mean forelay-tool?"), "{refused}");
    let refused = host.refused(["attach", "absent-vm", "forelay-tool"]);
    assert!(
        refused.contains("no VM is called \"absent-vm\""),
        "{refused}"
    );
    assert!(!has("forelay-rival") && !has("forelay-needy"));
    assert_eq!(host.sh("plain", "forelay-tool"), "hello from the tool\n");

    // In use: refused, and still there.
    let user = "cd /usr/share/forelay-tool; sleep 1000 < /dev/null > /dev/null 2>&1 & echo $!";
    let user = host.sh("plain", user);
    let refused = host.refused(["detach", "plain", "forelay-tool"]);
    assert!(
        refused.contains("in use") && refused.contains(user.trim()),
        "{refused}"
    );
    assert_eq!(host.sh("plain", "forelay-tool"), "hello from the tool\n");
    let refused = host.refused(["detach", "plain", "debian"]);
    assert!(
        refused.contains("only attached components can go"),
        "{refused}"
    );

    host.sh("plain", &format!("kill {user}"));
    host.ok(["detach", "plain", "forelay-tool"]);
    assert!(!has("forelay-tool"));
    let gone = host.run(["exec", "plain", "--", "ls", "/usr/share/forelay-tool"]);
    assert_eq!(gone.code, Some(2), "{}", gone.stderr);

    // The rival excludes it no more, and what was detached may come back in another VM.
    host.ok(["attach", "plain", "forelay-rival"]);
    assert_eq!(host.sh("plain", "forelay-rival"), "hello from the rival\n");
}

#[test]
fn privileged_an_attach_that_fails_half_way_leaves_nothing() {
    let test = "privileged_an_attach_that_fails_half_way_leaves_nothing";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let manifest = host.write("whole.toml", &idle("whole", "[]", ""));
    host.launch(&manifest, "whole", &[]);
    let before = host.vm("whole")["components"].clone();
    let part = "command -v forelay-part || echo none";

    // Its dependency goes in first; then its own files do not fit.
    let refused = host.refused(["attach", "whole", "forelay-clash"]);
    assert!(refused.contains("/usr/bin/bash"), "{refused}");
    assert_eq!(host.vm("whole")["components"], before);
    assert_eq!(host.sh("whole", part), "none\n");
    let devices = host.json(["map", "whole"])["devices"].clone();
    assert_eq!(devices.as_array().unwrap().len(), 2, "{devices}");

    // What was taken back can come again.
    let vm = host.json(["attach", "whole", "forelay-part"]);
    assert_eq!(host.sh("whole", "forelay-part"), "hello from the part\n");
    let attached = vm["components"].as_array().unwrap().last().unwrap();
    let figures = attached["attach"].as_object().unwrap();
    let sum: f64 = figures.values().map(|part| part.as_f64().unwrap()).sum();
    assert!(figures.len() >= 7 && sum > 0.0, "{figures:?}");
}
