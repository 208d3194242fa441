//! Tests of the solver: rules, explanations, and agreement with brute force.

use proptest::prelude::*;

use super::*;
use crate::Digest;
use crate::component::{Capability, ContainerImage, ImageRef};

fn make(name: &str, version: &str, role: Role) -> Component {
    Component::new(
        name,
        version,
        role,
        "amd64",
        ImageRef {
            digest: Digest::of(format!("{name} {version}").as_bytes()),
            bytes: 8192,
            metadata_bytes: 4096,
            inodes: 1,
            chunk_index: Digest::of(b"index"),
        },
    )
}

fn package(name: &str, version: &str) -> Component {
    make(name, version, Role::Package)
}

fn wanted(text: &str) -> NameRange {
    version::parse_wanted(text).unwrap()
}

fn requires(mut component: Component, any: &[&str]) -> Component {
    component
        .requires
        .push(any.iter().map(|text| wanted(text)).collect());
    component
}

fn conflicts(mut component: Component, with: &str) -> Component {
    component.conflicts.push(wanted(with));
    component
}

fn provides(mut component: Component, name: &str, version: Option<&str>) -> Component {
    component.provides.push(Capability {
        name: name.into(),
        version: version.map(Into::into),
    });
    component
}

fn world(more: Vec<Component>) -> Vec<Component> {
    let mut all = vec![
        make("debian", "12", Role::Base),
        make("linux", "6.1.1-1", Role::Kernel),
        make("linux", "6.12.1-1", Role::Kernel),
    ];
    all.extend(more);
    all
}

fn manifest(components: &[&str]) -> Manifest {
    let list: Vec<String> = components.iter().map(|text| format!("{text:?}")).collect();
    Manifest::parse(&format!(
        "base = 'debian'\ncomponents = [{}]",
        list.join(",")
    ))
    .unwrap()
}

fn titles(lock: &Lock) -> Vec<String> {
    lock.components
        .iter()
        .map(|one| format!("{} {}", one.name, one.version))
        .collect()
}

fn failure(components: &[&str], world: &[Component]) -> String {
    solve(&manifest(components), world).unwrap_err().to_string()
}

#[test]
fn an_images_layers_stand_behind_it_in_its_order_and_each_is_needed() {
    let layers = ["z", "a", "m"].map(|name| make(name, "1", Role::Layer));
    let mut image = make("oci-web", "1", Role::Base);
    image.container = Some(ContainerImage {
        layers: layers.iter().map(Component::id).collect(),
        ..ContainerImage::default()
    });
    let mut all = world(vec![image, package("nginx", "1")]);
    all.extend(layers.clone());
    let manifest = Manifest::parse("base = 'oci-web'\ncomponents = ['nginx']").unwrap();
    let lock = solve(&manifest, &all).unwrap();
    let names: Vec<_> = lock
        .components
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    assert_eq!(names, ["oci-web", "z", "a", "m", "nginx"]);
    assert_eq!(Lock::parse(&lock.to_toml()).unwrap(), lock);
    all.retain(|one| one.name != "a");
    let error = solve(&manifest, &all).unwrap_err().to_string();
    let expected = format!("oci-web 1 has the layer {}", layers[1].id());
    assert!(error.contains(&expected), "{error}");
}

#[test]
fn newest_versions_win_and_dependencies_come_first() {
    let world = world(vec![
        requires(package("app", "1"), &["libz@>= 1.10"]),
        requires(package("app", "2"), &["libz@>= 1.10"]),
        package("libz", "1.9"),
        package("libz", "1.10"),
        package("zlib-user", "1"),
    ]);
    let lock = solve(&manifest(&["zlib-user", "app"]), &world).unwrap();
    assert_eq!(
        titles(&lock),
        ["debian 12", "libz 1.10", "app 2", "zlib-user 1"]
    );
    assert_eq!(lock.kernel.version, "6.12.1-1");
    let mut reversed = world.clone();
    reversed.reverse();
    assert_eq!(
        solve(&manifest(&["zlib-user", "app"]), &reversed).unwrap(),
        lock
    );
    assert_eq!(Lock::parse(&lock.to_toml()).unwrap(), lock);
}

#[test]
fn relocking_keeps_versions_unless_the_manifest_forbids_them() {
    let old = world(vec![package("app", "1")]);
    let lock = solve(&manifest(&["app"]), &old).unwrap();
    let mut new = old.clone();
    new.push(package("app", "2"));
    new.push(make("linux", "7", Role::Kernel));
    let again = relock(&manifest(&["app"]), &new, &lock).unwrap();
    assert_eq!(
        (titles(&again), again.kernel.clone()),
        (titles(&lock), lock.kernel.clone())
    );
    assert_eq!(
        titles(&solve(&manifest(&["app"]), &new).unwrap()),
        ["debian 12", "app 2"]
    );
    assert_eq!(
        titles(&relock(&manifest(&["app@>> 1"]), &new, &lock).unwrap()),
        ["debian 12", "app 2"]
    );
}

#[test]
fn virtual_names_alternatives_and_conflicts() {
    let world = world(vec![
        requires(package("mta-user", "1"), &["mta"]),
        provides(conflicts(package("exim", "4"), "mta"), "mta", None),
        provides(conflicts(package("postfix", "3"), "mta"), "mta", Some("2")),
        requires(package("picky", "1"), &["mta@>= 2"]),
        requires(package("either", "1"), &["nothing-has-this", "exim"]),
    ]);
    assert_eq!(
        titles(&solve(&manifest(&["mta-user"]), &world).unwrap())[1],
        "exim 4"
    );
    // An unversioned provide does not meet a range.
    assert_eq!(
        titles(&solve(&manifest(&["mta-user", "picky"]), &world).unwrap())[1],
        "postfix 3"
    );
    assert_eq!(
        titles(&solve(&manifest(&["either"]), &world).unwrap())[1],
        "exim 4"
    );
    let text = failure(&["either", "picky"], &world);
    assert!(
        text.contains("either and picky cannot be had together"),
        "{text}"
    );
    assert!(text.contains("exim 4 excludes postfix 3"), "{text}");
}

#[test]
fn backtracks_to_an_older_version() {
    let world = world(vec![
        requires(package("app", "2"), &["lib@>= 2"]),
        requires(package("app", "1"), &["lib"]),
        package("lib", "1"),
        package("lib", "2"),
        requires(package("other", "1"), &["lib@<< 2"]),
    ]);
    let lock = solve(&manifest(&["app", "other"]), &world).unwrap();
    assert_eq!(titles(&lock), ["debian 12", "lib 1", "app 1", "other 1"]);
}

#[test]
fn failures_say_what_to_do() {
    let world = world(vec![
        package("nginx", "1.22.1-9"),
        requires(package("app", "1"), &["libfoo@>= 2"]),
        package("libfoo", "1"),
        requires(package("deep", "1"), &["app"]),
    ]);
    let text = failure(&["ngnix"], &world);
    assert!(
        text.contains("did you mean nginx?") && text.contains("build --deb ngnix"),
        "{text}"
    );
    let text = failure(&["nginx@>= 1.25"], &world);
    assert!(text.contains("has only nginx 1.22.1-9"), "{text}");
    let text = failure(&["deep"], &world);
    assert!(
        text.contains("the manifest wants deep 1, which needs app 1, which wants libfoo@>= 2"),
        "{text}"
    );
    assert!(text.contains("has only libfoo 1"), "{text}");
    let no_kernel: Vec<_> = world
        .iter()
        .filter(|one| one.role != Role::Kernel)
        .cloned()
        .collect();
    let text = failure(&["nginx"], &no_kernel);
    assert!(
        text.contains("no kernel at all") && text.contains("build --kernel"),
        "{text}"
    );
    let text = solve(&Manifest::parse("base = 'nginx'").unwrap(), &world)
        .unwrap_err()
        .to_string();
    assert!(text.contains("base components are: debian 12"), "{text}");
}

#[test]
fn second_bases_and_malformed_ranges_are_refused() {
    let mut all = world(vec![make("alpine", "3", Role::Base)]);
    let text = failure(&["alpine"], &all);
    assert!(
        text.contains("debian and alpine cannot be had together"),
        "{text}"
    );
    let mut bad = package("bad", "1");
    bad.conflicts.push(NameRange {
        name: "x".into(),
        range: "?? 1".into(),
    });
    all.push(bad);
    assert!(failure(&[], &all).contains("component bad 1 has a relation that cannot be read"));
}

fn for_machine(mut component: Component, architecture: &str) -> Component {
    component.architecture = architecture.into();
    component
}

#[test]
fn what_is_for_other_machines_is_refused() {
    let of = |world: &[Component], wanted: &[&str]| {
        let lock = solve(&manifest(wanted), world);
        lock.map(|lock| titles(&lock))
            .map_err(|error| error.to_string())
    };
    let arm = for_machine(package("tool", "2"), "arm64");
    let mut all = world(vec![arm.clone(), for_machine(package("data", "1"), "all")]);
    assert_eq!(of(&all, &["data"]).unwrap(), ["debian 12", "data 1"]);
    let text = of(&all, &["tool"]).unwrap_err();
    assert!(
        text.contains("debian 12 is for amd64, tool 2 for arm64"),
        "{text}"
    );
    // An older one that fits is taken; so is one that is needed.
    all.push(package("tool", "1"));
    all.push(requires(package("user", "1"), &["tool"]));
    let expected = ["debian 12", "tool 1", "user 1"];
    assert_eq!(of(&all, &["user"]).unwrap(), expected);
    // A base for other machines needs its own kernel.
    let base = for_machine(make("debian", "13", Role::Base), "arm64");
    all.push(base);
    assert_eq!(of(&all, &["user"]).unwrap(), expected);
    all.push(for_machine(make("linux", "5", Role::Kernel), "arm64"));
    assert_eq!(of(&all, &[]).unwrap(), ["debian 13"]);
    all.retain(|one| one.role != Role::Kernel || one.architecture == "amd64");
    all.retain(|one| one.role != Role::Base || one.architecture == "arm64");
    let text = of(&all, &[]).unwrap_err();
    assert!(
        text.contains("debian 13 is for arm64, linux 6.12.1-1 for amd64"),
        "{text}"
    );
    // Attaching locks once more.
    let before = solve(&manifest(&[]), &world(vec![])).unwrap();
    let world = world(vec![arm]);
    assert!(relock(&manifest(&["tool"]), &world, &before).is_err());
}

#[test]
fn a_component_that_is_named_is_taken_although_the_base_has_the_name() {
    let base = provides(make("debian", "12", Role::Base), "awk", None);
    let base = provides(base, "editor", Some("2"));
    let mut all = vec![base, make("linux", "6", Role::Kernel)];
    // What only the base has, it has.
    assert_eq!(
        titles(&solve(&manifest(&["awk"]), &all).unwrap()),
        ["debian 12"]
    );
    all.extend([package("awk", "1"), package("editor", "1")]);
    let locked = |wanted: &str| titles(&solve(&manifest(&[wanted]), &all).unwrap());
    assert_eq!(locked("awk"), ["debian 12", "awk 1"]);
    assert_eq!(locked("editor"), ["debian 12", "editor 1"]);
    assert_eq!(locked("editor@>= 2"), ["debian 12"]);
    // A requirement is met by the base, as before.
    all.push(requires(package("user", "1"), &["awk"]));
    assert_eq!(
        titles(&solve(&manifest(&["user"]), &all).unwrap()),
        ["debian 12", "user 1"]
    );
}

#[test]
fn a_conflict_names_only_what_takes_part() {
    let base = |name: &str| {
        let base = provides(make(name, "12", Role::Base), "tzdata", Some("2024"));
        provides(base, "debian", Some("12"))
    };
    let world = vec![
        base("debian"),
        base("debian-systemd"),
        base("debian-full"),
        make("linux", "6", Role::Kernel),
        requires(conflicts(package("zones", "1"), "tzdata"), &["libzones"]),
        package("libzones", "1"),
        conflicts(package("other", "1"), "bystander"),
        package("bystander", "1"),
    ];
    let text = failure(&["zones", "other"], &world);
    assert!(
        text.contains("zones 1 excludes debian 12;")
            || text.contains("zones 1 excludes debian 12."),
        "{text}"
    );
    for uninvolved in [
        "systemd",
        "full",
        "libzones",
        "other 1",
        "bystander",
        "linux",
    ] {
        assert!(!text.contains(uninvolved), "{uninvolved}: {text}");
    }
}

#[test]
fn cycles_are_ordered_and_terminate() {
    let world = world(vec![
        requires(package("a", "1"), &["b"]),
        requires(package("b", "1"), &["a"]),
    ]);
    assert_eq!(
        titles(&solve(&manifest(&["b"]), &world).unwrap()),
        ["debian 12", "a 1", "b 1"]
    );
}

const NAMES: [&str; 5] = ["a", "b", "c", "d", "v"];

fn arbitrary_range() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => Just(String::new()),
        1 => (0..5usize, 1..4u32).prop_map(|(relation, bound)| {
            format!("{} {bound}", ["<<", "<=", "=", ">=", ">>"][relation])
        }),
    ]
}

fn arbitrary_relation() -> impl Strategy<Value = NameRange> {
    (0..NAMES.len(), arbitrary_range()).prop_map(|(name, range)| NameRange {
        name: NAMES[name].into(),
        range,
    })
}

fn arbitrary_component() -> impl Strategy<Value = Component> {
    let name_and_version = (0..4usize, 1..4u32);
    let requires = prop::collection::vec(prop::collection::vec(arbitrary_relation(), 1..3), 0..3);
    let conflicts = prop::collection::vec(arbitrary_relation(), 0..2);
    let provides = prop::option::weighted(0.3, prop::option::of(1..4u32));
    (name_and_version, requires, conflicts, provides).prop_map(
        |((name, version), requires, conflicts, offered)| {
            let mut component = package(NAMES[name], &version.to_string());
            component.requires = requires;
            component.conflicts = conflicts;
            component.provides.extend(offered.map(|version| Capability {
                name: "v".into(),
                version: version.map(|version| version.to_string()),
            }));
            component
        },
    )
}

/// True if the set meets all rules, written down independently of the solver's glue.
fn is_valid(set: &[&Component], wants: &[NameRange]) -> bool {
    let meets = |component: &Component, wanted: &NameRange| {
        satisfies(component, wanted, &wanted.range.parse().unwrap())
    };
    let has = |wanted: &NameRange| set.iter().any(|component| meets(component, wanted));
    wants.iter().all(has)
        && set.iter().enumerate().all(|(index, one)| {
            one.requires.iter().all(|any| any.iter().any(has))
                && set.iter().enumerate().all(|(other_index, other)| {
                    other_index == index
                        || (one.name != other.name
                            && !one.conflicts.iter().any(|conflict| meets(other, conflict)))
                })
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn agrees_with_brute_force(
        components in prop::collection::vec(arbitrary_component(), 1..9),
        wants in prop::collection::vec(arbitrary_relation(), 1..3),
    ) {
        let mut components = components;
        components.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
        components.dedup_by(|a, b| a.name == b.name && a.version == b.version);
        let possible = (0u32..1 << components.len()).any(|mask| {
            let chosen = components.iter().enumerate().filter(|(index, _)| mask >> index & 1 == 1);
            is_valid(&chosen.map(|(_, component)| component).collect::<Vec<_>>(), &wants)
        });
        let mut manifest = manifest(&[]);
        manifest.components = wants.clone();
        match solve(&manifest, &world(components.clone())) {
            Ok(lock) => {
                let find = |locked: &LockedComponent| components.iter().find(|one| one.id() == locked.id);
                let chosen: Vec<&Component> = lock.components.iter().filter_map(find).collect();
                prop_assert_eq!(chosen.len() + 1, lock.components.len());
                prop_assert!(is_valid(&chosen, &wants), "chose {:?}", titles(&lock));
            }
            Err(error) => {
                prop_assert!(!possible, "there is a solution, but: {}", error);
                prop_assert!(!error.problems.is_empty());
            }
        }
    }
}
