//! Repositories on running servers: each conforms, and what goes wrong on the way is met.

use std::error::Error as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use forelay_image::Extent;
use forelay_store::repository::Put;
use forelay_store::{
    FetchConfig, Limited, Mirrored, Repository, RepositoryError, RepositoryUrl, Store, StoreConfig,
};

use crate::conformance::{MOST, conforms};
use crate::proxy::{Fault, Proxy};
use crate::servers::Server;
use crate::support::{content, sample};

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_conforms() {
    let Some(server) = Server::s3() else {
        return println!("SKIPPED a_bucket_conforms: needs moto (`cargo xtask test` installs it)");
    };
    let url = server.s3_url(server.address);
    conforms(&|| open(&url)).await;
    faults_are_met(&server, Server::s3_url, "GET").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_conforms() {
    let Some(server) = Server::registry() else {
        return println!("SKIPPED a_registry_conforms: needs docker-registry");
    };
    let url = server.oci_url(server.address);
    conforms(&|| open(&url)).await;
    faults_are_met(&server, Server::oci_url, "blobs/sha").await;
    what_hangs_ends(&server).await;
    mirrors_stand_in(&server).await;
    components_are_copied(&server).await;
    what_was_listed_last_stands_in(&server).await;
}

fn open(url: &str) -> Arc<dyn Repository> {
    url.parse::<RepositoryUrl>().unwrap().open()
}

const KEY: &str = "faults/object";

/// `bytes_of` is in the first line of requests for parts of packs.
async fn faults_are_met(
    server: &Server,
    url: fn(&Server, SocketAddr) -> String,
    bytes_of: &'static str,
) {
    let proxy = Proxy::to(server.address).await;
    let repository = open(&url(server, proxy.address));
    let bytes = content(5, 300_000);
    let put = || repository.put_if_absent(KEY, bytes.clone().into());
    let busy = Fault::Answer("503 Busy\r\n");
    let wait = Fault::Answer("429 Slow down\r\nretry-after: 1\r\n");

    // What passes is tried again; a publication, too.
    proxy.meet("PUT", [busy.clone(), wait.clone(), Fault::Lost]);
    // The object whose answer was lost is there when it is put again.
    assert!([Put::Created, Put::Present].contains(&put().await.unwrap()));
    assert!(proxy.count("PUT") >= 3, "tried again");
    assert_eq!(
        open(&url(server, server.address))
            .get(KEY, MOST)
            .await
            .unwrap(),
        bytes
    );

    let extent = Extent::new(1000, 200_000);
    let expected = &bytes[1000..201_000];
    // Its size is known from here on, so that each of the next is one request for bytes.
    assert_eq!(repository.get_range(KEY, extent).await.unwrap(), expected);
    for faults in [
        vec![busy.clone(), busy.clone(), busy],
        vec![Fault::CutAfter(0), Fault::CutAfter(100_000)],
        vec![wait],
        vec![Fault::Answer("500 Oops\r\n"), Fault::CutAfter(1)],
    ] {
        let tries = faults.len() + 1;
        proxy.meet("GET", faults.clone());
        let part = repository.get_range(KEY, extent).await;
        assert_eq!(part.unwrap(), expected, "{faults:?}");
        assert_eq!(proxy.count("GET"), tries, "{faults:?}");
    }

    // What will not pass by itself is said at once, in one line that says what to do.
    for (head, text) in [
        ("403 Forbidden\r\n", "refuses (403)"),
        ("400 Bad\r\n", "answers 400"),
    ] {
        proxy.meet("GET", vec![Fault::Answer(head); 9]);
        let error = repository.get_range(KEY, extent).await.unwrap_err();
        assert!(!error.is_transient(), "{error}");
        let line = forelay_host::error_chain(&error);
        assert!(line.contains(text) && !line.contains('\n'), "{line}");
        assert_eq!(proxy.count("GET"), 1, "asked once: {line}");
        if text.contains("refuses") {
            assert!(line.contains("AWS_ACCESS_KEY_ID") || line.contains("docker login"));
        }
    }
    proxy.meet("GET", vec![Fault::Answer("404 Not here\r\n"); 9]);
    assert!(
        repository
            .get_range(KEY, extent)
            .await
            .unwrap_err()
            .is_not_found()
    );

    // What never passes is given up.
    proxy.meet("GET", vec![Fault::Answer("502 Bad gateway\r\n"); 99]);
    let error = repository.get(KEY, MOST).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    proxy.meet("", []);
    assert_eq!(repository.get(KEY, MOST).await.unwrap(), bytes);

    // A wrong byte never comes out, nor does anybody have to ask twice.
    let hosts = tempfile::tempdir().unwrap();
    let app = sample(hosts.path(), "app", &[(51, 4096), (52, 200_000)]);
    let publisher = store(open(&url(server, server.address)), &hosts).await;
    app.publish_to(&publisher).await;
    let host = store(repository, &hosts).await;
    let _held = host.hold_component(app.component.id()).await.unwrap();
    proxy.meet(bytes_of, [Fault::Flip(1000)]);
    assert!(app.read_from(&host).await == app.bytes);
    assert!(
        host.scheduler().counters().retries >= 1,
        "the first bytes were wrong"
    );
}

async fn store(repository: Arc<dyn Repository>, dir: &tempfile::TempDir) -> Store {
    let cache_dir = tempfile::tempdir_in(dir).unwrap().keep();
    let store = store_in(repository, &cache_dir).await;
    store.initialise().await.unwrap();
    store
}

async fn store_in(repository: Arc<dyn Repository>, cache_dir: &Path) -> Store {
    let config = StoreConfig {
        repository,
        cache_dir: cache_dir.to_owned(),
        cache_cap_bytes: 1 << 30,
        fetch: FetchConfig {
            first_backoff: Duration::from_millis(1),
            ..FetchConfig::default()
        },
    };
    Store::open(config).await.unwrap()
}

/// While a repository cannot be asked, what it listed last counts for who wants that.
async fn what_was_listed_last_stands_in(server: &Server) {
    let dir = tempfile::tempdir().unwrap();
    let proxy = Proxy::to(server.address).await;
    let repository = || open(&server.oci_url(proxy.address));
    let app = sample(dir.path(), "kept", &[(71, 4096), (72, 100_000)]);
    let cache = dir.path().join("cache");
    let before = store_in(repository(), &cache).await;
    app.publish_to(&before).await;
    let listed = before.components().await.unwrap();
    assert!(listed.iter().any(|one| one.id() == app.component.id()));
    let _held = before.hold_component(app.component.id()).await.unwrap();
    assert!(app.read_from(&before).await == app.bytes);
    drop(before);

    let away = || proxy.meet("HTTP", vec![Fault::Answer("502 Bad gateway\r\n"); 999]);
    away();
    let after = store_in(repository(), &cache).await;
    assert!(after.components().await.is_err(), "nobody wanted it");
    after.accept_last_listing();
    assert_eq!(after.components().await.unwrap(), listed);
    let _held = after.hold_component(app.component.id()).await.unwrap();
    assert!(app.read_from(&after).await == app.bytes);

    // What it lists now counts again as soon as it answers.
    proxy.meet("", []);
    let others = store(open(&server.oci_url(server.address)), &dir).await;
    others.remove_component(app.component.id()).await.unwrap();
    let now = after.components().await.unwrap();
    assert_eq!(now.len() + 1, listed.len());
    // Nor is another repository's list taken for it.
    away();
    let other = open(
        &server
            .oci_url(proxy.address)
            .replace("team/vms", "team/other"),
    );
    let other = store_in(other, &cache).await;
    other.accept_last_listing();
    assert!(other.components().await.is_err());
}

/// A server that has begun to answer and sends nothing more.
async fn what_hangs_ends(server: &Server) {
    let proxy = Proxy::to(server.address).await;
    let limit = Duration::from_millis(300);
    let hung = Limited::new(open(&server.oci_url(proxy.address)), limit);
    proxy.meet("GET", vec![Fault::Stall; 99]);
    let error = hung.get(KEY, MOST).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    let said = error.source().unwrap().to_string();
    assert!(said.contains("did not answer"), "{said}");
}

async fn mirrors_stand_in(server: &Server) {
    let (one, two) = (
        Proxy::to(server.address).await,
        Proxy::to(server.address).await,
    );
    let at = |proxy: &Proxy| open(&server.oci_url(proxy.address));
    let both = Mirrored::new(at(&one), vec![at(&two)]);
    let bytes = at(&one).get(KEY, MOST).await.unwrap();
    assert_eq!(both.set_aside(), []);
    // The first does not answer: the second does, and goes on being asked first.
    one.meet("GET", vec![Fault::Answer("500 Oops\r\n"); 99]);
    assert_eq!(both.get(KEY, MOST).await.unwrap(), bytes);
    let aside = both.set_aside();
    assert_eq!(aside.len(), 1);
    assert!(aside[0].location.contains(&one.address.to_string()));
    assert!(
        aside[0].problem.contains("answers 500"),
        "{}",
        aside[0].problem
    );
    let asked = one.count("GET");
    assert_eq!(both.get(KEY, MOST).await.unwrap(), bytes);
    assert_eq!(one.count("GET"), asked, "set aside");
    assert!(both.list("components/").await.is_ok());
    // Now the second fails, too: the first is asked all the same, and is there again.
    one.meet("", []);
    two.meet("GET", vec![Fault::Answer("403 Go away\r\n"); 99]);
    assert_eq!(both.get(KEY, MOST).await.unwrap(), bytes);
    let aside = both.set_aside();
    assert!(
        aside[0].location.contains(&two.address.to_string()),
        "{aside:?}"
    );
    // Wrong bytes set aside the one that is asked first.
    both.doubt(KEY, "flipped");
    assert_eq!(both.set_aside().len(), 2);
    assert!(both.get("no/such", MOST).await.unwrap_err().is_not_found());
    let put = both.put_if_absent("no/such", vec![1].into()).await;
    assert!(matches!(put, Err(RepositoryError::Permanent { .. })));
}

/// From a registry to a directory and back, cut short in between.
async fn components_are_copied(server: &Server) {
    let dir = tempfile::tempdir().unwrap();
    let proxy = Proxy::to(server.address).await;
    let registry = store(open(&server.oci_url(proxy.address)), &dir).await;
    let path = dir.path().join("copy");
    std::fs::create_dir(&path).unwrap();
    let here = store(open(&format!("dir:{}", path.display())), &dir).await;
    let first = sample(
        dir.path(),
        "first",
        &[(61, 4096), (62, 900_000), (63, 500_000)],
    );
    let second = sample(
        dir.path(),
        "second",
        &[(64, 4096), (62, 900_000), (65, 700_000)],
    );
    for one in [&first, &second] {
        one.publish_to(&registry).await;
    }
    let id = |one: &crate::support::Sample| one.component.id();
    let copy = |one| here.copy_from(&registry, id(one), &|_| {});
    let copied = copy(&first).await.unwrap();
    assert!(copied.created && copied.progress.stored_bytes > 500_000);

    // The second shares a pack with the first, which is not moved again. It is cut short before
    // its own pack is there: nothing of it is visible.
    proxy.meet("blobs/sha", vec![Fault::Answer("500 Oops\r\n"); 99]);
    assert!(copy(&second).await.is_err());
    assert_eq!(here.components().await.unwrap().len(), 1);
    proxy.meet("", []);
    let copied = copy(&second).await.unwrap();
    assert_eq!(copied.progress.reused_bytes, 900_000);
    assert_eq!(copied.progress.done_bytes, second.bytes.len() as u64);
    for one in [&first, &second] {
        let _held = here.hold_component(id(one)).await.unwrap();
        assert!(one.read_from(&here).await == one.bytes);
    }
    assert_eq!(here.verify(&|_| {}).await.unwrap().findings, []);

    // What is all there moves nothing, in either direction.
    proxy.meet("", []);
    let again = registry
        .copy_from(&here, id(&second), &|_| {})
        .await
        .unwrap();
    assert!(!again.created);
    assert_eq!(again.progress.stored_bytes, 0);
    assert_eq!(proxy.count("POST"), 0, "no upload");

    // A pack that arrives with other bytes than its name says is not kept.
    let other = store(open(&server.oci_url(server.address)), &dir).await;
    let third = sample(dir.path(), "third", &[(66, 4096), (67, 300_000)]);
    third.publish_to(&other).await;
    let map = other.open_image(third.image()).await.unwrap();
    let pack = forelay_store::layout::pack(map.locations.packs[0]);
    let repository = open(&server.oci_url(server.address));
    let mut flipped = repository.get(&pack, MOST).await.unwrap().to_vec();
    flipped[9000] ^= 1;
    repository.delete(&pack).await.unwrap();
    repository
        .put_if_absent(&pack, flipped.into())
        .await
        .unwrap();
    let refused = copy(&third).await.unwrap_err().to_string();
    assert!(refused.contains("corrupted"), "{refused}");
    assert_eq!(here.components().await.unwrap().len(), 2);
}
