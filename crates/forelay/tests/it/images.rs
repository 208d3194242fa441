//! Container images: from an archive and from a registry into a VM, by the tools that others
//! make them with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use forelay_image::Digest;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::fixture::{Host, RepositoryOf, Settings, bench, http_get, reserved_port};
use crate::proxy::Proxy;
use crate::servers::Server;

/// More layers than a VM may have devices.
const LAYERS: usize = 60;
/// Devices of a VM.
const SLOTS: usize = 12;

/// Runs a tool that must succeed.
#[track_caller]
fn tool(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
}

fn is_there(program: &str) -> bool {
    let tried = Command::new(program).arg("--version").output();
    tried.is_ok_and(|output| output.status.success())
}

/// A directory with the layout of the OCI and one image, `app:1`: busybox with nothing
/// beside it, then many small layers. The last deletes what the second made.
fn layout(at: &Path) -> PathBuf {
    let layout = at.join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let blob = |bytes: &[u8], kind: &str| -> Value {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        let kind = format!("application/vnd.oci.image.{kind}");
        json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
    };
    let (mut layers, mut ids) = (Vec::new(), Vec::new());
    for number in 0..LAYERS {
        let root = at.join(format!("layer{number}"));
        let file = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        match number {
            0 => {
                file("www/index.html", "hello from an image\n");
                fs::create_dir_all(root.join("bin")).unwrap();
                fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
                std::os::unix::fs::symlink("busybox", root.join("bin/sh")).unwrap();
            }
            _ => file(&format!("parts/{number}"), &format!("part {number}\n")),
        }
        if number == LAYERS - 1 {
            file("parts/.wh.1", "");
        }
        let archive = at.join("layer.tar");
        let mut tar = Command::new("tar");
        tar.args(["--owner=0", "--group=0", "--mtime=@1600000000"]);
        tool(tar.arg("-C").arg(&root).arg("-cf").arg(&archive).arg("."));
        let bytes = fs::read(&archive).unwrap();
        ids.push(Digest::of(&bytes).to_string());
        layers.push(blob(&bytes, "layer.v1.tar"));
    }
    let config = json!({"architecture": "amd64", "os": "linux",
        "config": {"Entrypoint": ["/bin/busybox"], "Cmd": ["httpd", "-f", "-p", "8080", "-h", "/www"],
            "Env": ["WORD=of the image"], "User": "1234", "WorkingDir": "/srv/app",
            "StopSignal": "SIGINT"},
        "rootfs": {"type": "layers", "diff_ids": ids}});
    let config = blob(&serde_json::to_vec(&config).unwrap(), "config.v1+json");
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers,
        "mediaType": "application/vnd.oci.image.manifest.v1+json"});
    let mut manifest = blob(&serde_json::to_vec(&manifest).unwrap(), "manifest.v1+json");
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "app:1"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    let version = json!({"imageLayoutVersion": "1.0.0"});
    for (name, value) in [("index.json", index), ("oci-layout", version)] {
        fs::write(layout.join(name), serde_json::to_vec(&value).unwrap()).unwrap();
    }
    layout
}

fn skopeo(from: &str, to: &str) {
    let mut command = Command::new("skopeo");
    command.args(["--insecure-policy", "copy", "--dest-tls-verify=false"]);
    tool(command.args([from, to]));
}

fn layers_of(host: &Host) -> usize {
    let all = host.json(["component", "list"]);
    let all = all.as_array().unwrap().iter();
    all.filter(|one| one["role"] == "layer").count()
}

#[test]
fn privileged_an_image_becomes_a_vm_that_answers() {
    let test = "privileged_an_image_becomes_a_vm_that_answers";
    let Some(bench) = bench(test) else { return };
    for program in ["skopeo", "docker-registry"] {
        if !is_there(program) {
            return println!("SKIPPED {test}: needs {program}");
        }
    }
    if !Path::new("/bin/busybox").exists() {
        return println!("SKIPPED {test}: needs busybox-static");
    }
    let settings = Settings {
        repository: RepositoryOf::Test,
        pmem_slots: Some(SLOTS),
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let layout = layout(host.dir());
    let saved = host.dir().join("saved.tar");
    let from = format!("oci:{}:app:1", layout.display());
    let saved = format!("docker-archive:{}", saved.display());
    skopeo(&from, &format!("{saved}:example/app:1"));
    let port = reserved_port();
    let publish = format!("{port}:8080");
    let image = ["run", "--image", &saved, "--memory", "160M"];
    let detached = ["--detach", "--name", "app", "--publish", &publish];
    host.ok(image.iter().chain(&detached));
    assert!(http_get(port, "/").contains("hello from an image"));
    let devices = host.json(["map", "app"])["devices"].clone();
    assert_eq!(devices.as_array().unwrap().len(), SLOTS, "{devices}");
    let parts = host.ok(["exec", "app", "--", "/bin/busybox", "ls", "/parts"]);
    assert_eq!(parts.lines().count(), LAYERS - 2, "{parts}");
    assert!(!parts.lines().any(|name| name == "1"), "{parts}");
    host.ok(["stop", "app"]);

    // The same from a registry: nothing of it is new.
    assert_eq!(layers_of(&host), LAYERS);
    let registry = Server::registry().unwrap();
    let runtime = Runtime::new().unwrap();
    let proxy = runtime.block_on(Proxy::to(registry.address));
    skopeo(
        &from,
        &format!("docker://{}/example/app:1", registry.address),
    );
    let reference = format!("{}/example/app:1", proxy.address);
    let build = ["component", "build", "--oci", &reference];
    for (further, fetched) in [(&[][..], 1), (&["--refetch"], 1 + LAYERS)] {
        proxy.meet("", []);
        let said = host.ok(build.iter().chain(further));
        assert!(said.contains("60 layers, 0 of them new"), "{said}");
        // Its configuration, and no layer that is there.
        assert_eq!(proxy.count("blobs/sha"), fetched, "{said}");
    }
    // One that is not there is fetched.
    let all = host.json(["component", "list"]);
    let mut all = all.as_array().unwrap().iter();
    let lost = all.rfind(|one| one["role"] == "layer");
    host.ok(["component", "remove", lost.unwrap()["id"].as_str().unwrap()]);
    proxy.meet("", []);
    let said = host.ok(build);
    assert!(said.contains("60 layers, 1 of them new"), "{said}");
    assert_eq!(proxy.count("blobs/sha"), 2, "{said}");
    let none = format!("{}/example/none:1", proxy.address);
    let said = host.refused(["component", "build", "--oci", &none]);
    assert!(said.contains("has no such image or tag"), "{said}");
    let same = [
        "component",
        "build",
        "--oci",
        &reference,
        "--name",
        "oci-example+app",
    ];
    let said = host.refused(same);
    assert!(
        said.contains("is archive:docker.io/example/app:1"),
        "{said}"
    );
    drop(registry);

    // By its name, without its registry, with another command and to its end.
    let words = ["--env", "MORE=and more", "--", "sh", "-c"];
    let script = "/bin/busybox id -u; pwd; echo $WORD $MORE; exit 7";
    let image = ["run", "--image", &reference, "--memory", "160M"];
    let ran = host.run(image.iter().chain(&words).chain(&[script]));
    assert_eq!(ran.code, Some(7), "{}{}", ran.stdout, ran.stderr);
    for line in ["1234", "/srv/app", "of the image and more"] {
        let mut lines = ran.stdout.lines();
        assert!(
            lines.any(|one| one.trim() == line),
            "{line}: {}",
            ran.stdout
        );
    }
    let name = format!("oci-127.0.0.1++{}+example+app", proxy.address.port());
    host.ok(["component", "remove", &name]);
    assert_eq!(layers_of(&host), LAYERS);
    host.ok(["component", "remove", "oci-example+app"]);
    assert_eq!(layers_of(&host), 0);
}
