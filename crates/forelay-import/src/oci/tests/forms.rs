//! One image in all its forms: compressions, indexes, archives.

use super::*;

#[test]
fn a_layer_is_one_component_whatever_its_form_and_its_image() {
    let mut first = Made::new(&[BASE, &[(Regular, "etc/new", "new")]]);
    let imported = first.import().unwrap();
    let expected = names(&imported);
    assert_eq!(expected.len(), 2);
    let container = imported.main.draft.container.clone().unwrap();
    assert_eq!(container.command, ["a"]);
    assert_eq!(container.env.get("A").map(String::as_str), Some("b=c"));
    assert_eq!((&*container.workdir, &*container.user), ("/data", "me"));
    assert_eq!(container.stop_signal, 3);
    assert_eq!(container.health, ["/bin/sh", "-c", "true"]);
    assert_eq!(container.ports, ["80/tcp"]);
    assert_eq!(imported.main.draft.entrypoint, ["/run"]);
    assert_eq!(imported.main.draft.version, "t");
    for how in ["", "zstd"] {
        first.layers.iter_mut().for_each(|layer| layer.0 = how);
        assert_eq!(names(&first.import().unwrap()), expected, "{how}");
    }
    let other = Made::new(&[&[(Directory, "x", "")], BASE]);
    let build = |made: &Made| {
        made.write();
        let cache = tempfile::tempdir().unwrap();
        let source = ImageSource::parse(&format!("oci:{}:t", made.path().display())).unwrap();
        let options = ImageOptions {
            source,
            plain_http: false,
            ca: None,
        };
        let request = BuildRequest::new(BuildSource::Image(options));
        let builder = Builder::new(cache.path()).unwrap();
        let built = builder.build(&request, &|_| {}).unwrap();
        let ids = built.split_off.iter().map(|one| one.component.id());
        let named = built.main.component.container.unwrap().layers;
        assert_eq!(ids.collect::<Vec<_>>(), named);
        named
    };
    assert_eq!(build(&first)[0], build(&other)[1]);
}

#[test]
fn of_an_index_the_hosts_image_is_taken_or_the_one_that_is_named() {
    let mut made = Made::new(&[BASE]);
    made.twist_index = |index| {
        let one = index["manifests"][0].clone();
        let platform = |architecture: &str| {
            let mut one = one.clone();
            one["digest"] = Digest::of(architecture.as_bytes()).to_string().into();
            one["platform"] = json!({"os": "linux", "architecture": architecture});
            one
        };
        let mut here = one.clone();
        here["platform"] = json!({"os": "linux", "architecture": go_name()});
        index["manifests"] = json!([platform("unknown"), platform("mips"), here]);
    };
    made.import().unwrap();
    made.twist_index = |index| {
        index["manifests"][0]["platform"] = json!({"os": "linux", "architecture": "mips"});
    };
    let said = made.refused();
    assert!(
        said.contains("no image for linux/") && said.contains("linux/mips"),
        "{said}"
    );
    made.twist_index = |index| {
        let mut other = index["manifests"][0].clone();
        other["annotations"] = json!({"org.opencontainers.image.ref.name": "u"});
        index["manifests"] = json!([index["manifests"][0], other]);
    };
    assert!(made.refused().contains("it has t, u"));
    import(made.path(), Some("u")).unwrap();
    let none = import(made.path(), Some("v")).err().unwrap().to_string();
    assert!(none.contains("no image \"v\" in it"), "{none}");
    let empty = tempfile::tempdir().unwrap();
    let none = import(empty.path(), None).err().unwrap().to_string();
    assert!(none.contains("no container images"), "{none}");
}

#[test]
fn archives_of_docker_old_and_new_are_the_same_image() {
    let made = Made::new(&[BASE, &[(Regular, "etc/new", "new")], BASE]);
    let expected = made.import().unwrap();
    let config = made.full_config();
    let name = format!("{}.json", Digest::of(&config).hex());
    let old = |name: &str| {
        let mut builder = tar::Builder::new(Vec::new());
        let mut put = |path: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, bytes).unwrap();
        };
        put(name, &config);
        put("one/layer.tar", &made.layers[0].1);
        put("two/layer.tar", &made.layers[1].1);
        let list = json!([{"Config": name, "RepoTags": ["web/app:2.0"],
            "Layers": ["one/layer.tar", "two/layer.tar", "three/layer.tar"]}]);
        put("manifest.json", &serde_json::to_vec(&list).unwrap());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(Symlink);
        header.set_size(0);
        builder
            .append_link(&mut header, "three/layer.tar", "../one/layer.tar")
            .unwrap();
        builder.into_inner().unwrap()
    };
    let file = made.path().join("saved.tar");
    for bytes in [old(&name), compressed("gzip", &old(&name)), old("any.json")] {
        fs::write(&file, bytes).unwrap();
        for tag in [None, Some("web/app:2.0"), Some("docker.io/web/app:2.0")] {
            let imported = import(&file, tag).unwrap();
            assert_eq!(names(&imported), names(&expected));
            assert_eq!(imported.main.draft.name, "oci-web+app");
            assert_eq!(imported.main.draft.version, "2.0");
        }
    }
    let other = import(&file, Some("web/app:3")).err().unwrap().to_string();
    assert!(other.contains("it has web/app:2.0"), "{other}");
    let wrong = format!("{}.json", Digest::of(b"other").hex());
    fs::write(&file, old(&wrong)).unwrap();
    let error = import(&file, None).err().unwrap().to_string();
    assert!(error.contains("configuration is not of digest"), "{error}");
    fs::remove_file(&file).unwrap();
    // As Docker 25 and later: the OCI's files and Docker's list of them.
    let ids = made.layers.iter().map(|(_, tar)| {
        made.blob(tar);
        format!("blobs/sha256/{}", Digest::of(tar).hex())
    });
    let path = format!("blobs/sha256/{}", Digest::of(&config).hex());
    let list = json!([{"Config": path, "RepoTags": null, "Layers": ids.collect::<Vec<_>>()}]);
    fs::write(
        made.path().join("manifest.json"),
        serde_json::to_vec(&list).unwrap(),
    )
    .unwrap();
    let archive = tempfile::Builder::new().suffix(".tar").tempfile().unwrap();
    let mut tar = Command::new("tar");
    tar.arg("-C")
        .arg(made.path())
        .arg("-cf")
        .arg(archive.path());
    assert!(tar.arg(".").status().unwrap().success());
    assert_eq!(
        names(&import(archive.path(), None).unwrap()),
        names(&expected)
    );
}
