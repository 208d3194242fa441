//! A program in a VMM's place that attacks the host: each attack works where it is not
//! confined, none where it is.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use forelay_memory::command_hints::Hints;
use forelay_memory::confine::{self, Confinement};

use crate::support::{MIB, TestImage, TestMount, skipped};

/// Of the range that is reserved for VMMs.
const USER: u32 = 2_100_000_123;

/// Runs each attack in a child of its own and prints the names of those that succeeded.
const RUNNER: &str = r#"
use strict; use Socket; use Fcntl;
my %at = @ARGV;
sub reads { open(my $f, '<', $_[0]) or return 0; my $n = sysread($f, my $b, 1); return $n }
sub makes { sysopen(my $f, $_[0], O_WRONLY | O_CREAT | O_EXCL) or return 0; close $f; unlink $_[0]; 1 }
sub connects { my ($domain, $address) = @_;
    socket(my $s, $domain, SOCK_STREAM, 0) or return 0; connect($s, $address) }
sub lowered { $) = '65534 65534'; $> = 65534; qx($_[0]) }
my %attacks = (
    own => sub { reads($at{own}) },
    neighbour_mount => sub { reads($at{other}) },
    neighbour_mount_writable => sub { sysopen(my $f, $at{other_writable}, O_RDWR) },
    own_mount_for_writing => sub { sysopen(my $f, $at{own_writable}, O_RDWR) },
    host_secret => sub { reads($at{secret}) },
    host_public_file => sub { reads($at{public}) },
    record => sub { reads($at{record}) },
    record_replaced => sub { rename($at{record}, "$at{record}.x") and rename("$at{record}.x", $at{record}) },
    shadow => sub { reads('/etc/shadow') },
    passwd => sub { reads('/etc/passwd') },
    new_file_in_own_directory => sub { makes("$at{directory}/planted") },
    new_file_in_tmp => sub { makes("/tmp/planted-$at{pid}") },
    new_file_in_usr => sub { makes("/usr/planted-$at{pid}") },
    new_file_in_root => sub { makes("/planted-$at{pid}") },
    socket => sub { connects(PF_UNIX, pack_sockaddr_un($at{socket})) },
    abstract_socket => sub { connects(PF_UNIX, pack_sockaddr_un("\0$at{abstract}")) },
    memory_of_neighbour => sub {
        open(my $f, '<', "/proc/$at{pid}/mem") or return 0;
        sysseek($f, hex($at{address}), 0); sysread($f, my $b, 1) },
    files_of_neighbour => sub { reads("/proc/$at{pid}/root/etc/passwd") },
    trace => sub { syscall(101, 16, $at{pid} + 0, 0, 0) == 0 and waitpid($at{pid}, 0) | 1
        and syscall(101, 17, $at{pid} + 0, 0, 0) == 0 },
    signal => sub { kill(0, $at{pid}) },
    user_root => sub { syscall(105, 0) == 0 },
    setuid_program => sub { lowered("$at{setuid} -u") == 0 and $? == 0 },
    mount => sub { my ($kind, $place) = ('tmpfs', $at{directory});
        syscall(165, $kind, $place, $kind, 0, 0) == 0 and syscall(166, $place, 2) == 0 },
    device_node => sub { my $node = "$at{directory}/node";
        syscall(133, $node, 020600, 0x103) == 0 and unlink($node) },
    fuse_device => sub { sysopen(my $f, '/dev/fuse', O_RDWR) },
    chroot => sub { chroot('/') },
    host_name => sub { require POSIX; (POSIX::uname())[1] eq $at{host} },
);
for my $name (sort keys %attacks) {
    my $child = fork();
    if (!$child) { exit($attacks{$name}->() ? 0 : 1) }
    waitpid($child, 0);
    print "$name\n" if $? == 0;
}
"#;

/// Names of the attacks that succeed.
fn successes(arguments: &BTreeMap<&str, String>, confinement: Option<&Confinement>) -> Vec<String> {
    let mut command = Command::new("/usr/bin/perl");
    command.arg("-e").arg(RUNNER);
    for (name, value) in arguments {
        command.args([name, value.as_str()]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let child = match confinement {
        Some(confinement) => {
            Hints::default().apply(&mut command);
            confinement.spawn(&mut command).unwrap()
        }
        None => command.spawn().unwrap(),
    };
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{:?}", output.status);
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// Where something is mapped in a process.
fn address_in(pid: u32) -> String {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    maps.split('-').next().unwrap().to_owned()
}

fn open_to_all(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn privileged_no_attack_of_a_confined_vmm_succeeds() {
    if skipped("privileged_no_attack_of_a_confined_vmm_succeeds") {
        return;
    }
    let image = TestImage::new(71, MIB);
    let own = TestMount::for_group(&[image], USER);
    let other = TestMount::for_group(&[image], USER + 1);
    let host = tempfile::tempdir().unwrap();
    open_to_all(host.path(), 0o755);
    let directory = host.path().join("vm");
    std::fs::create_dir(&directory).unwrap();
    std::os::unix::fs::chown(&directory, None, Some(USER)).unwrap();
    open_to_all(&directory, 0o710);
    let file = |path: &Path, mode: u32| {
        std::fs::File::create(path)
            .unwrap()
            .write_all(b"secret")
            .unwrap();
        open_to_all(path, mode);
        path.display().to_string()
    };
    let setuid = host.path().join("id");
    std::fs::copy("/usr/bin/id", &setuid).unwrap();
    open_to_all(&setuid, 0o4755);
    let socket = directory.join("api.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let name = format!("forelay-test-{}", std::process::id());
    let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
    let _abstract = std::os::unix::net::UnixListener::bind_addr(&abstract_address).unwrap();
    let mut neighbour = Command::new("sleep").arg("600").spawn().unwrap();
    let path = |mount: &TestMount, writable: bool| {
        let key = image.key();
        let path = match writable {
            true => mount.memory.private_path(&key).unwrap(),
            false => mount.memory.path(&key),
        };
        path.display().to_string()
    };
    let arguments = BTreeMap::from([
        ("own", path(&own, false)),
        ("own_writable", path(&own, true)),
        ("other", path(&other, false)),
        ("other_writable", path(&other, true)),
        ("secret", file(&host.path().join("history.db"), 0o600)),
        ("public", file(&host.path().join("public"), 0o644)),
        ("record", file(&directory.join("instance.json"), 0o600)),
        ("directory", directory.display().to_string()),
        ("socket", socket.display().to_string()),
        ("abstract", name),
        ("pid", neighbour.id().to_string()),
        ("address", address_in(neighbour.id())),
        ("setuid", setuid.display().to_string()),
        (
            "host",
            rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
        ),
    ]);
    let unconfined = successes(&arguments, None);
    let confinement = Confinement {
        user: USER,
        read: vec![own.memory.mountpoint().to_owned()],
        // Given, though no VMM would be: the set-uid bit alone must not help.
        write: vec![directory.clone(), setuid],
        ..Confinement::default()
    };
    let confined = successes(&arguments, Some(&confinement));
    neighbour.kill().unwrap();
    neighbour.wait().unwrap();
    let all = RUNNER.matches(" => sub {").count();
    assert_eq!(unconfined.len(), all, "works unconfined: {unconfined:?}");
    assert_eq!(confined, ["own"], "what it was given, and nothing else");
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 2);
}

#[test]
fn privileged_a_confined_vmm_sees_what_it_is_shown_later() {
    if skipped("privileged_a_confined_vmm_sees_what_it_is_shown_later") {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    let (early, late) = (host.path().join("early"), host.path().join("late"));
    for directory in [&early, &late] {
        std::fs::create_dir(directory).unwrap();
        open_to_all(directory, 0o755);
        std::fs::write(directory.join("file"), "seen").unwrap();
        open_to_all(&directory.join("file"), 0o644);
    }
    let script = "echo up; read go; cat \"$0\" 2>&1";
    let file = late.join("file");
    let confinement = Confinement {
        user: USER,
        write: vec![early],
        ..Confinement::default()
    };
    let said = |is_shown: bool| {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).arg(&file);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = confinement.spawn(&mut command).unwrap();
        let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        assert_eq!(line, "up\n");
        if is_shown {
            confine::show(child.id(), &late).unwrap();
        }
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let mut said = String::new();
        std::io::Read::read_to_string(&mut output, &mut said).unwrap();
        child.wait().unwrap();
        said
    };
    assert!(said(false).contains("No such file"));
    assert_eq!(said(true), "seen");
}
