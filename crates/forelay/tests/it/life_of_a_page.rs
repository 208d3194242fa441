//! The life of a page, in the order in which ARCHITECTURE.md tells it: manifest, lock,
//! compose, launch, guest file, mapping, page frame, history, and the next launch, which
//! finds it in memory.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::fixture::{Host, Settings, bench, http_get, idle, md5, web};
use crate::frames::frames;

/// The file whose pages are followed.
const PROGRAM: &str = "/usr/sbin/nginx";

#[test]
fn privileged_a_page_lives_from_the_manifest_into_the_next_launch() {
    let test = "privileged_a_page_lives_from_the_manifest_into_the_next_launch";
    let Some(bench) = bench(test) else { return };
    let mut host = Host::started(&bench, &Settings::default());
    let (manifest, port) = web();
    let manifest = host.write("web.toml", &manifest);

    // Manifest -> lock: versions are chosen and pinned, base first.
    let lock = host.json(["lock", manifest.to_str().unwrap()]);
    let pinned: Vec<&str> = lock["component"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    assert_eq!(pinned, ["debian", "nginx"]);
    let lock_path = host.dir().join("web.lock");
    assert!(
        std::fs::read_to_string(&lock_path)
            .unwrap()
            .contains("sha256:")
    );

    // Lock -> map image and components, the same bytes each time.
    let compose = |out: &str| {
        let mut words = vec!["compose".to_owned(), manifest.display().to_string()];
        words.extend(["--lock".to_owned(), lock_path.display().to_string()]);
        words.extend(["--emit", "files", "--hostname", "web", "--out"].map(str::to_owned));
        words.push(host.dir().join(out).display().to_string());
        host.json(words)
    };
    let (first, second) = (compose("one"), compose("two"));
    assert_eq!(first["digest"], second["digest"]);
    let map = |out: &str| std::fs::read(host.dir().join(out).join("map.img")).unwrap();
    assert!(map("one") == map("two"), "composing twice gives one image");

    // Launch -> a file in the guest is the package's, to the byte.
    let vm = host.launch(&manifest, "web", &["--lock", lock_path.to_str().unwrap()]);
    assert_eq!(vm["state"], "ready");
    let cold = &vm["launch"];
    assert_eq!(cold["mode"], "cold");
    let cold_fetches = cold["demand_fetches"].as_u64().unwrap();
    assert!(cold_fetches > 20, "a cold launch waits: {cold}");
    assert!(http_get(port, "/").ends_with("hello from a test\n"));
    let says =
        "grep -h ' usr/sbin/nginx$' /var/lib/dpkg/info/nginx*.md5sums; md5sum /usr/sbin/nginx";
    let says = host.sh("web", says);
    let sums: Vec<&str> = says
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(sums.len(), 2, "{says}");
    assert_eq!(sums[0], sums[1], "the guest reads what the package has");

    // Guest file -> mapping: a device, an offset, all of it in memory and touched.
    // (The kernel may reclaim some of it at any time; then it is read again.)
    let mut mapped = host.json(["map", "web"]);
    let mounts = host.dir().join("run/memory");
    let mut of_web = frames(vm["pid"].as_u64().unwrap(), &mounts).unwrap();
    host.until("all of the file is in memory and touched", |host| {
        host.sh("web", "cat /usr/sbin/nginx > /dev/null");
        mapped = host.json(["map", "web"]);
        of_web = frames(vm["pid"].as_u64().unwrap(), &mounts).unwrap();
        let file = find(&mapped["files"], "path", PROGRAM);
        let bytes = |of: &str| file[of].as_u64().unwrap();
        let page = bytes("offset") / 4096 * 4096;
        let mut frames = of_web.iter().filter(|((_, at), _)| *at == page);
        bytes("resident_bytes") >= bytes("bytes")
            && bytes("touched_bytes") > 0
            && frames.any(|(_, frame)| *frame != 0)
    });
    let file = find(&mapped["files"], "path", PROGRAM);
    let (slot, offset) = (&file["slot"], file["offset"].as_u64().unwrap());
    let bytes = file["bytes"].as_u64().unwrap();
    let device = mapped["devices"].as_array().unwrap();
    let device = device.iter().find(|one| one["slot"] == *slot).unwrap();
    assert!(device["component"].as_str().unwrap().starts_with("nginx "));

    // The component of the repository and the file that the VMM maps have the same bytes.
    let read = |path: &Path| {
        let mut content = vec![0; bytes as usize];
        let file = std::fs::File::open(path).unwrap();
        file.read_exact_at(&mut content, offset).unwrap();
        md5(&content)
    };
    let composed = host.dir().join("one").join(format!("{slot}.img"));
    assert_eq!(
        read(&composed),
        sums[0],
        "the component as the repository has it"
    );
    let path = PathBuf::from(device["path"].as_str().unwrap());
    assert_eq!(read(&path), sums[0], "the component as the VMM maps it");

    // Mapping -> page frame, and the same frames in every VM that has the component.
    let page = (path, offset / 4096 * 4096);
    assert!(
        of_web.get(&page).is_some_and(|frame| *frame != 0),
        "{page:?}"
    );
    let other = host.write("other.toml", &idle("other", "[\"nginx\"]", ""));
    let other = host.launch(&other, "other", &[]);
    host.sh("other", "cat /usr/sbin/nginx > /dev/null");
    // Both looked at now: the kernel may have reclaimed what was idle and read it again since.
    host.sh("web", "cat /usr/sbin/nginx > /dev/null");
    let of_web = frames(vm["pid"].as_u64().unwrap(), &mounts).unwrap();
    let of_other = frames(other["pid"].as_u64().unwrap(), &mounts).unwrap();
    let both = of_web
        .iter()
        .filter_map(|(page, frame)| Some((frame, of_other.get(page)?)));
    let both: Vec<_> = both.collect();
    assert!(both.len() > 300, "{} pages are in both", both.len());
    assert!(
        both.iter().all(|(one, two)| one == two),
        "one copy in memory"
    );
    assert_eq!(of_web.get(&page), of_other.get(&page));

    // Observation -> history.
    host.until("the working set is recorded", |host| {
        let history = host.json(["history", "web"]);
        history[0]["working_set_bytes"].as_u64().unwrap_or(0) > 1 << 20
    });
    assert_eq!(host.json(["history", "web"])[0]["launches"], 1);

    // A restart loses all shared memory, and no mount or VMM stays behind.
    assert_eq!(host.terminate(), Some(0));
    assert_eq!((host.mounts(), host.vmms()), (vec![], vec![]));

    // The next launch: its pages were there first.
    host.start();
    let vm = host.launch(&manifest, "web", &["--prefetch", "forecast-first"]);
    let warm = &vm["launch"];
    assert_eq!(warm["mode"], "predicted");
    assert!(
        warm["prefetched_bytes"].as_u64().unwrap() > 1 << 20,
        "{warm}"
    );
    let fetches = warm["demand_fetches"].as_u64().unwrap();
    assert!(
        fetches * 4 <= cold_fetches,
        "{fetches} demand fetches after {cold_fetches} when cold"
    );
    let now_mapped = host.json(["map", "web"]);
    let now = find(&now_mapped["files"], "path", PROGRAM);
    assert!(now["touched_bytes"].as_u64().unwrap() > 0, "{now}");
    assert_eq!(
        now["offset"].as_u64(),
        Some(offset),
        "the mapping is the same again"
    );
}

fn find<'a>(list: &'a serde_json::Value, key: &str, wanted: &str) -> &'a serde_json::Value {
    let found = list
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one[key] == wanted);
    found.unwrap_or_else(|| panic!("nothing has {key} = {wanted}"))
}
