//! Tests of the manifest's syntax, defaults and errors.

use super::*;

const WEB: &str = r#"
name = "web"
base = "debian@>= 12"
components = ["nginx@>=1.22", "redis"]
entrypoint = ["/usr/sbin/nginx", "-g", "daemon off;"]
ready = { tcp = 80 }

[vm]
memory_mib = 256
forward = ["8080:80", "5353:53/udp", ":443"]
scratch = "2G"

[env]
LANG = "C"

[files."/etc/motd"]
content = "hello\n"
mode = "0600"
"#;

#[test]
fn a_full_manifest_parses_and_round_trips() {
    let manifest = Manifest::parse(WEB).unwrap();
    assert_eq!(manifest.base.range, ">= 12");
    assert_eq!(manifest.components[0].range, ">= 1.22");
    assert_eq!(manifest.ready, Some(Ready::Tcp(80)));
    assert_eq!(manifest.vm.scratch, Scratch::Disk { bytes: 2 << 30 });
    assert_eq!(
        manifest.vm.forward[1],
        Forward {
            host: 5353,
            guest: 53,
            udp: true
        }
    );
    assert_eq!(manifest.vm.cpus, 1);
    assert_eq!(manifest.files["/etc/motd"].mode, 0o600);
    assert_eq!(manifest.profile_name(), "web");
    let again = Manifest::parse(&manifest.to_toml()).unwrap();
    assert_eq!(again, manifest);
    assert_eq!(again.digest(), manifest.digest());
    let commented = format!("# a comment\n{WEB}");
    assert_eq!(
        Manifest::parse(&commented).unwrap().digest(),
        manifest.digest()
    );
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let manifest = Manifest::parse("base = 'debian'").unwrap();
    assert_eq!(manifest.vm, VmSettings::default());
    assert_eq!((manifest.vm.memory_mib, manifest.vm.cpus), (512, 1));
    assert_eq!(manifest.profile_name(), "debian");
    assert!(manifest.init.is_none() && manifest.kernel.is_none());
    for (text, path) in [
        ("true", "/sbin/init"),
        ("'systemd'", "/lib/systemd/systemd"),
        ("'/x'", "/x"),
    ] {
        let manifest = Manifest::parse(&format!("base = 'debian'\ninit = {text}")).unwrap();
        assert_eq!(manifest.init.as_deref(), Some(path));
    }
}

#[test]
fn how_an_image_runs_can_be_overridden() {
    let text = "base = 'oci-web@= 1'\ncommand = ['sh', '-c', 'x']\nuser = '7:8'\nworkdir = '/srv'";
    let manifest = Manifest::parse(text).unwrap();
    assert_eq!(manifest.command, ["sh", "-c", "x"]);
    assert_eq!(manifest.user.as_deref(), Some("7:8"));
    assert_eq!(Manifest::parse(&manifest.to_toml()).unwrap(), manifest);
    for bad in [
        "workdir = 'srv'",
        "workdir = '/a/../b'",
        "init = true\ncommand = ['x']",
    ] {
        assert!(
            Manifest::parse(&format!("base = 'x'\n{bad}")).is_err(),
            "{bad}"
        );
    }
}

#[test]
fn errors_name_the_place_and_the_fix() {
    let cases = [
        (
            "base = 'debian'\ncomponets = []",
            2,
            1,
            "unknown field `componets`",
            Some("`components`"),
        ),
        (
            "components = []",
            1,
            1,
            "missing field `base`",
            Some("debian@>= 12"),
        ),
        ("base = 'debian@>='", 1, 8, "not a version constraint", None),
        (
            "base = 'debian'\ncomponents = ['ok', 'bad name']",
            2,
            14,
            "not a component name",
            None,
        ),
        (
            "base = 'debian'\n[vm]\nmemory_mb = 5",
            3,
            1,
            "unknown field `memory_mb`",
            Some("`memory_mib`"),
        ),
        (
            "base = 'debian'\n[vm]\nforward = ['80']",
            3,
            11,
            "not a port forward",
            None,
        ),
        (
            "base = 'debian'\n[vm]\nscratch = '2 apples'",
            3,
            11,
            "`scratch` is",
            None,
        ),
        (
            "base = 'debian'\n[vm]\ncpus = 0",
            3,
            8,
            "give 1 to 1024",
            None,
        ),
        (
            "base = 'debian'\nentrypoint = ['x']\ninit = true",
            3,
            1,
            "exclude each other",
            Some("keep `entrypoint`"),
        ),
        (
            "base = 'debian'\n[files.'etc/x']\ncontent = ''",
            2,
            0,
            "not a file's absolute path",
            None,
        ),
        (
            "base = 'debian'\nready = { http = 80 }",
            2,
            11,
            "unknown variant `http`",
            None,
        ),
        ("base = 'debian", 1, 15, "", None),
    ];
    for (text, line, column, message, help) in cases {
        let error = Manifest::parse(text).unwrap_err();
        assert!(error.message.contains(message), "{text}: {error}");
        assert_eq!(error.line, line, "{text}: {error}");
        assert_eq!(error.help.is_some(), help.is_some(), "{text}: {error}");
        if let (Some(found), Some(help)) = (&error.help, help) {
            assert!(found.contains(help), "{text}: {error}");
        }
        if column > 0 {
            assert_eq!(error.column, column, "{text}: {error}");
        }
    }
}

#[test]
fn paths_are_no_longer_than_the_kernels() {
    let parse = |levels: usize| {
        let path = "/a".repeat(levels);
        Manifest::parse(&format!("base = 'debian'\n[files.'{path}']\ncontent = ''"))
    };
    assert!(parse(2048).is_ok());
    let error = parse(2049).unwrap_err();
    let expected = "has 4098 bytes, of at most 4096";
    assert!(error.message.contains(expected), "{error}");
    assert!(error.message.len() < 200, "{error}");
}

#[test]
fn nearest_finds_typos_and_nothing_far_away() {
    let names = ["nginx", "redis", "postgresql", "node"];
    assert_eq!(nearest("ngnix", names), Some("nginx"));
    assert_eq!(nearest("postgres", names), Some("postgresql"));
    assert_eq!(nearest("apache", names), None);
}

#[test]
fn sizes_parse() {
    assert_eq!(parse_bytes("2G"), Ok(2 << 30));
    assert_eq!(parse_bytes("512 MiB"), Ok(512 << 20));
    assert_eq!(parse_bytes("7"), Ok(7));
    for bad in [
        "",
        "G",
        "-1",
        "1.5G",
        "99999999999999999999",
        "99999999999T",
        "1x",
    ] {
        assert!(parse_bytes(bad).is_err(), "{bad}");
    }
}

#[test]
fn what_a_launch_may_resume_from_is_said_in_the_manifest() {
    let parse = |text: &str| Manifest::parse(&format!("base = \"debian\"\n{text}"));
    let at = |text: &str| parse(text).unwrap().snapshot.at;
    assert_eq!(at(""), Some(Tier::Composed));
    assert_eq!(at("[snapshot]\nat = \"kernel\"\n"), Some(Tier::Kernel));
    assert_eq!(at("[snapshot]\nat = \"off\"\n"), None);
    assert_eq!(at("[snapshot]\nat = \"ready\"\n"), Some(Tier::Ready));
    let error = parse("[snapshot]\nat = \"later\"\n").unwrap_err();
    assert_eq!((error.line, error.column), (3, 6), "{error}");
    assert!(error.message.contains("\"off\", not \"later\""), "{error}");
    let error = parse("[snapshot]\nsecrets = \"mine\"\n").unwrap_err();
    assert_eq!((error.line, error.column), (3, 11), "{error}");
    assert!(parse("[snapshot]\nwhen = 1\n").is_err());

    let secret = "env = { TOKEN = \"x\" }\n[snapshot]\nat = \"ready\"\n";
    let error = parse(secret).unwrap_err();
    assert_eq!((error.line, error.column), (4, 1), "{error}");
    assert!(error.help.unwrap().contains("secrets = \"shared\""));
    let shared = parse(&format!("{secret}secrets = \"shared\"\n")).unwrap();
    assert_eq!(Manifest::parse(&shared.to_toml()).unwrap(), shared);
    assert!(parse(&secret.replace("ready", "composed")).is_ok());
}

#[test]
fn two_manifests_that_differ_in_names_and_host_ports_alone_make_the_same_machine() {
    let machine = |text: &str| Manifest::parse(text).unwrap().machine_digest();
    let one = machine(
        "name = \"a\"\nowner = \"me\"\nhostname = \"h\"\nbase = \"debian\"\nentrypoint = [\"x\"]\n\
         [vm]\nforward = [\"8080:80\"]\n[snapshot]\nat = \"kernel\"\n",
    );
    let other = machine(
        "profile = \"b\"\nbase = \"debian@>= 12\"\nentrypoint = [\"x\"]\n[vm]\nforward = [\":80\"]\n",
    );
    assert_eq!(one, other);
    for further in [
        "env = { A = \"1\" }\n",
        "ssh_keys = [\"ssh-ed25519 AAAA\"]\n",
    ] {
        let text = format!(
            "base = \"debian\"\nentrypoint = [\"x\"]\n{further}[vm]\nforward = [\":80\"]\n"
        );
        assert_ne!(machine(&text), one, "{further}");
    }
}
