//! Components come and go while a VM runs; what cannot be is refused in words.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use serde_json::Value;

use crate::fixture::{Host, Settings, bench, idle, signal};

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
    let refused = host.refused(["attach", "plain", "forelay-foreign"]);
    assert!(
        refused.contains("forelay-foreign 1.0 for s390x"),
        "{refused}"
    );
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

    let user = user.trim();
    let end = format!("kill {user}; while [ -e /proc/{user} ]; do sleep 0.01; done");
    host.sh("plain", &end);
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

/// A host whose VM `held` stands still, so that an attach to it lasts as long as the test wants.
struct HeldVm {
    host: Host,
    vmm: u32,
}

impl HeldVm {
    fn new(host: Host) -> Self {
        let manifest = host.write("held.toml", &idle("held", "[]", ""));
        let vm = host.launch(&manifest, "held", &[]);
        let vmm = u32::try_from(vm["pid"].as_u64().unwrap()).unwrap();
        signal("STOP", vmm);
        Self { host, vmm }
    }

    /// The file that attaching a component maps, before anything is asked of the VMM.
    fn file(&self, component: &str) -> PathBuf {
        let shown = self.host.json(["component", "show", component]);
        let image = shown["image"]["digest"].as_str().unwrap();
        let name = format!("{}.img", image.replace("sha256:", ""));
        self.host.dir().join("run/memory/tests").join(name)
    }

    fn attach(&self, component: &str) -> Child {
        let mut attach = self.host.command(["attach", "held", component]);
        let attach = attach.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        attach.unwrap()
    }

    fn has(&self, component: &str) -> bool {
        let vm = self.host.vm("held");
        let components = vm["components"].as_array().unwrap();
        components.iter().any(|one| one["name"] == component)
    }
}

#[test]
fn privileged_an_attach_is_finished_though_its_client_goes_away() {
    let test = "privileged_an_attach_is_finished_though_its_client_goes_away";
    let Some(bench) = bench(test) else { return };
    let held = HeldVm::new(Host::started(&bench, &Settings::default()));
    let mut client = UnixStream::connect(held.host.dir().join("run/forelay.sock")).unwrap();
    let body = "{\"component\": \"forelay-tool\"}";
    write!(
        client,
        "POST /v1/vms/held/attach HTTP/1.1\r\nHost: forelay\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let file = held.file("forelay-tool");
    held.host.until("the attach has begun", |_| file.exists());
    drop(client);
    // Answered after the daemon has seen the client's end.
    assert!(!held.has("forelay-tool"));
    signal("CONT", held.vmm);
    held.host
        .until("it is attached", |_| held.has("forelay-tool"));
    assert_eq!(
        held.host.sh("held", "forelay-tool"),
        "hello from the tool\n"
    );
    let record = std::fs::read(held.host.dir().join("run/vms/held/instance.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    assert!(
        record["manifest"]
            .as_str()
            .unwrap()
            .contains("forelay-tool")
    );
}

#[test]
fn privileged_two_attaches_at_once_both_count() {
    let test = "privileged_two_attaches_at_once_both_count";
    let Some(bench) = bench(test) else { return };
    let held = HeldVm::new(Host::started(&bench, &Settings::default()));
    let names = ["forelay-tool", "forelay-part"];
    let files = names.map(|name| held.file(name));
    let attaches = names.map(|name| held.attach(name));
    held.host
        .until("one has begun", |_| files.iter().any(|file| file.exists()));
    signal("CONT", held.vmm);
    for mut attach in attaches {
        assert!(attach.wait().unwrap().success(), "{}", held.host.log());
    }
    // Both are in what the next daemon reads, and in what the next attach is solved with.
    let record = std::fs::read(held.host.dir().join("run/vms/held/instance.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    for name in names {
        assert!(held.has(name));
        for text in ["manifest", "lock"] {
            assert!(
                record[text].as_str().unwrap().contains(name),
                "{name}: {record}"
            );
        }
    }
    let refused = held.host.refused(["attach", "held", "forelay-rival"]);
    assert!(refused.contains("excludes forelay-tool"), "{refused}");
}
