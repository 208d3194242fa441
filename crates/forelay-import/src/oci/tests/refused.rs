//! What is refused, and in which words.

use super::*;

#[test]
fn what_is_not_what_the_image_says_is_refused() {
    let plain = || Made::new(&[BASE]);
    let twisted = |twist: fn(&mut serde_json::Value), said: &str| {
        let mut made = plain();
        made.twist = twist;
        let refused = made.refused();
        assert!(refused.contains(said), "{refused}");
    };
    twisted(|all| all["layers"][0]["size"] = 7.into(), "is not as long");
    twisted(
        |all| all["layers"][0]["urls"] = json!(["http://x"]),
        "layer 1 is foreign",
    );
    twisted(
        |all| {
            all["layers"][0]["mediaType"] =
                "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip".into()
        },
        "layer 1 is foreign",
    );
    twisted(
        |all| all["layers"][0]["mediaType"] = "text/x".into(),
        "\"text/x\", which is not known",
    );
    twisted(
        |all| all["config"]["mediaType"] = "application/vnd.cncf.helm".into(),
        "an artifact",
    );
    twisted(|all| all["schemaVersion"] = 1.into(), "2015");
    twisted(
        |all| all["layers"] = json!([]),
        "0 layers, but its configuration has digests of 1",
    );
    twisted(
        |all| *all = json!({"schemaVersion": 2}),
        "neither an index nor a manifest",
    );
    twisted(
        |all| {
            let layer = all["layers"][0].clone();
            all["layers"] = vec![layer; 257].into();
        },
        "257 layers; at most 256",
    );
    let mut wrong = plain();
    wrong.config["rootfs"] = json!({"diff_ids": [Digest::of(b"other")]});
    assert!(
        wrong
            .refused()
            .contains("layer 1 does not unpack to sha256:")
    );
    let mut windows = plain();
    windows.config["os"] = "windows".into();
    assert!(windows.refused().contains("for windows; VMs run Linux"));
    let mut settings = plain();
    settings.config["config"]["Env"] = json!([format!("A={}", "x".repeat(300 << 10))]);
    assert!(settings.refused().contains("bytes of settings"));
    for path in ["/x".repeat(2100), "y".repeat(256), "a\0b".to_owned()] {
        for key in ["WorkingDir", "Volumes"] {
            let mut made = plain();
            made.config["config"][key] = match key {
                "Volumes" => json!({ (path.as_str()): {} }),
                _ => path.as_str().into(),
            };
            assert!(made.refused().contains("no usable path"), "{key}");
        }
    }
    twisted(
        |all| all["manifests"] = json!([]),
        "neither an index nor a manifest",
    );
    // A blob that is not its name's.
    for number in 0..3 {
        let made = plain();
        made.write();
        let mut blobs: Vec<_> = fs::read_dir(made.path().join("blobs/sha256"))
            .unwrap()
            .collect();
        blobs.sort_by_key(|blob| blob.as_ref().unwrap().file_name());
        let path = blobs[number].as_ref().unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        let error = import(made.path(), None).err().unwrap().to_string();
        assert!(
            error.contains("digest") || error.contains("damaged"),
            "{error}"
        );
    }
}

#[test]
fn hostile_layers_are_refused() {
    let above = |entries: &[TarEntry<'_>]| Made::new(&[BASE, entries]).refused();
    let deep = ["d"; 600].join("/");
    assert!(above(&[(Regular, &deep, "x")]).contains("directories deep"));
    assert!(
        above(&[(Symlink, "a", "b"), (Symlink, "b", "a"), (Link, "c", "a/x")]).contains("no file")
    );
    assert!(above(&[(Regular, "f", "x"), (Regular, "f/x", "y")]).contains("not a directory"));
    assert!(above(&[(Regular, "a/.wh.", "")]).contains("without a name"));
    // Links lead anywhere within the image and nowhere else.
    let out: &[TarEntry<'_>] = &[
        (Symlink, "up", "../../.."),
        (Regular, "up/x", "x"),
        (Symlink, "abs", "/etc"),
        (Regular, "abs/y", "y"),
    ];
    let tree = laid(&Made::new(&[out]).import().unwrap());
    assert!(tree.lookup(b"x").is_some() && tree.lookup(b"etc/y").is_some());
    let mut bytes = layer(&[(Regular, "ab", "x")]);
    let name = b"..";
    let at = bytes
        .windows(4)
        .rposition(|four| four == b"ab\0\0")
        .unwrap();
    bytes[at..at + 2].copy_from_slice(name);
    let header = &mut bytes[at..at + 512];
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut made = Made::new(&[]);
    made.layers = vec![("", bytes)];
    assert!(made.refused().contains("leaves the archive"));
    made.layers = vec![("gzip", b"no tar".to_vec())];
    assert!(made.refused().contains("cut off"));
}
