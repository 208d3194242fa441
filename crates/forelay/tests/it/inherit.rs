//! A component that was built again with a change inherits what was learned of it before.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use forelay_image::erofs::read::Image;
use forelay_image::erofs::write::write_image;
use forelay_store::{DirectoryRepository, FetchConfig, Store, StoreConfig};
use serde_json::Value;

use crate::fixture::{Host, RepositoryOf, Settings, bench, web};

/// Files of the component; of every second one all is read at a launch.
const FILES: usize = 120;

/// The component's tree: files of some pages each; `patch` changes one and adds another before
/// all others, so that no page lies where it lay.
fn tree(dir: &Path, patch: bool) {
    let data = dir.join("opt/patched");
    std::fs::create_dir_all(&data).unwrap();
    let file = |name: &str, seed: usize, pages: usize| {
        let line = |number: usize| format!("{seed:08} {number:054}\n");
        let content: String = (0..pages * 64).map(line).collect();
        std::fs::write(data.join(name), content).unwrap();
    };
    for number in 0..FILES {
        let kind = if number % 2 == 0 { "read" } else { "left" };
        let seed = if patch && number == 4 { 4_000 } else { number };
        file(&format!("{kind}-{number:03}"), seed, 5 + number % 7);
    }
    if patch {
        file("a-new-one", 5_000, 33);
    }
}

/// What a launch's forecast says of the component, and why.
fn reasons(forecast: &Value, component: &str) -> String {
    let entries = forecast.as_array().unwrap().iter();
    let mut entries = entries.filter(|one| one["component"] == component && one["vm"].is_null());
    let entry = entries.next();
    entry
        .unwrap_or_else(|| panic!("no {component} in {forecast}"))
        .to_string()
}

/// Launches a minute or more apart, the last one now: the next one is forecast.
fn import_history(host: &Host, profile: &str) {
    let now_ms = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis();
    let origin_ms = (now_ms - 12 * 600_000).to_string();
    let rows = (0..12).map(|number| format!("{},{profile},tests\n", number * 600));
    let history = format!("time_s,profile,owner\n{}", rows.collect::<String>());
    let history = host.write("history.csv", &history);
    let history = history.to_str().unwrap();
    host.ok(["history", "import", "--origin-ms", &origin_ms, history]);
}

/// Launches a profile cold, rebuilds a component while all memory and the disk cache are
/// lost, and launches the profile again. `least_cold` is what a cold launch must wait for at
/// the least, for the comparison to say something.
fn launch_cold_and_rebuilt(
    host: &mut Host,
    manifest: &Path,
    component: &str,
    least_cold: u64,
    rebuild: impl FnOnce(&Host) -> String,
) {
    let profile = manifest.file_stem().unwrap().to_str().unwrap();
    import_history(host, profile);
    host.start();
    let cold = host.launch(manifest, "cold", &[]);
    let fetches = |vm: &Value| vm["launch"]["demand_fetches"].as_u64().unwrap();
    assert!(fetches(&cold) >= least_cold, "{cold}");
    host.until("the launch is learned", |host| {
        let history = host.json(["history", profile]);
        history[0]["working_set_bytes"].as_u64().unwrap_or(0) > 1 << 20
    });
    assert_eq!(host.terminate(), Some(0));
    std::fs::remove_dir_all(host.dir().join("state/cache")).unwrap();

    let version = rebuild(host);
    host.start();
    let forecast = host.json(["forecast", profile]);
    let why = reasons(&forecast, &format!("{component} {version}"));
    let inherited = format!("inherited from {component} ");
    assert!(why.contains(&inherited), "{why}");
    let rebuilt = host.launch(manifest, "rebuilt", &["--prefetch", "forecast-first"]);
    let components = rebuilt["components"].to_string();
    assert!(components.contains(&format!("{version:?}")), "{components}");
    let (rebuilt, cold) = (fetches(&rebuilt), fetches(&cold));
    println!("{component} rebuilt: {rebuilt} demand fetches, {cold} when cold");
    assert!(
        rebuilt * 10 <= cold,
        "{rebuilt} of {cold} demand fetches are left"
    );
}

#[test]
fn privileged_a_rebuilt_component_is_loaded_as_its_predecessor_was_used() {
    let test = "privileged_a_rebuilt_component_is_loaded_as_its_predecessor_was_used";
    let Some(bench) = bench(test) else { return };
    let mut host = Host::new(&bench, &throttled());
    let build = |host: &Host, version: &str, patch: bool| {
        let dir = host.dir().join(version);
        tree(&dir, patch);
        let dir = dir.to_str().unwrap();
        let words = ["component", "build", "--dir", dir, "--name", "patched"];
        host.ok(words.iter().chain(&["--component-version", version]));
    };
    build(&host, "1.0", false);
    let manifest = host.write(
        "patched.toml",
        "name = \"patched\"\nowner = \"tests\"\nbase = \"debian\"\ncomponents = [\"patched\"]\n\
         entrypoint = [\"sh\", \"-c\", \"cat /opt/patched/read-* > /dev/null; \
         touch /run/all-read; exec sleep infinity\"]\n\
         ready = { path = \"/run/all-read\" }\n\n[vm]\nmemory_mib = 160\n",
    );
    launch_cold_and_rebuilt(&mut host, &manifest, "patched", 20, |host| {
        build(host, "1.1", true);
        "1.1".to_owned()
    });
}

#[test]
fn privileged_a_rebuilt_nginx_has_a_tenth_of_the_demand_fetches_of_a_cold_one() {
    let test = "privileged_a_rebuilt_nginx_has_a_tenth_of_the_demand_fetches_of_a_cold_one";
    let Some(bench) = bench(test) else { return };
    let mut host = Host::new(&bench, &throttled());
    let (manifest, _) = web();
    let manifest = host.write("web.toml", &manifest);
    launch_cold_and_rebuilt(&mut host, &manifest, "nginx", 20, rebuild_nginx);
}

fn throttled() -> Settings {
    Settings {
        repository: RepositoryOf::Test,
        latency_ms: 5,
        ..Settings::default()
    }
}

/// Debian's nginx built again with one file changed: its configuration, some pages longer,
/// so that files lie where others lay. Returns the new version.
fn rebuild_nginx(host: &Host) -> String {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let config = StoreConfig {
            repository: Arc::new(DirectoryRepository::open(host.repository())),
            cache_dir: host.dir().join("rebuild-cache"),
            cache_cap_bytes: 1 << 30,
            fetch: FetchConfig::default(),
        };
        let store = Store::open(config).await.unwrap();
        let all = store.components().await.unwrap();
        let nginx = all.iter().rfind(|one| one.name == "nginx").unwrap();
        store.add_image(nginx.image).unwrap();
        let path = host.dir().join("nginx.img");
        store.materialise(nginx.image.digest, &path).await.unwrap();
        let image = File::open(&path).unwrap();
        let mut tree = Image::open(&image).unwrap().to_tree(1 << 30).unwrap();
        let config = "etc/nginx/nginx.conf";
        let text = tree.text_of(config).unwrap().unwrap();
        let changed = "# changed\n".repeat(2_000) + &text;
        tree.replace_content(config, changed.into_bytes());
        let path = host.dir().join("rebuilt.img");
        let written = write_image(&tree, &mut File::create(&path).unwrap()).unwrap();
        assert_ne!(written.image.digest, nginx.image.digest);
        let mut rebuilt = nginx.as_ref().clone().with_image(written.image);
        rebuilt.version += "+rebuilt1";
        let published = store.publish(&rebuilt, &path, &written.chunks, &|_| {});
        published.await.unwrap();
        rebuilt.version
    })
}
