//! Launches that end before their VMM is supervised: cancelled, failed, or cut short by the
//! worker's death. Nothing of them runs on.

use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};

use crate::fixture::{Host, RepositoryOf, Settings, bench, idle, signal};

/// Begins `forelay run` of a manifest and waits until the VM is listed.
fn begin(host: &Host, name: &str) -> Child {
    let manifest = host.write(&format!("{name}.toml"), &idle(name, "[]", ""));
    let mut run = host.command(["run", "--detach", manifest.to_str().unwrap()]);
    let run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    host.until("the launch is listed", |host| {
        let listed = host.json(["ps"]);
        let listed = listed.as_array().unwrap();
        listed.iter().any(|vm| vm["name"] == name)
    });
    run.unwrap()
}

#[test]
fn privileged_a_vmm_whose_record_cannot_be_written_is_ended() {
    let test = "privileged_a_vmm_whose_record_cannot_be_written_is_ended";
    let Some(bench) = bench(test) else { return };
    // The record is written once before the VMM starts, and again when it runs.
    let settings = Settings {
        vmm: Some(
            "case \"$*\" in *monitor.sock*) mkdir $DIR/run/vms/plain/instance.json.new;; esac\n\
             exec $QEMU \"$@\"",
        ),
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let manifest = host.write("plain.toml", &idle("plain", "[]", ""));
    let said = host.refused(["run", "--detach", manifest.to_str().unwrap()]);
    assert!(said.contains("directory"), "{said}");
    assert_eq!(host.vmms(), Vec::<u32>::new());
    let vm = host.vm("plain");
    assert_eq!((&vm["state"], &vm["pid"]), (&"failed".into(), &().into()));
}

#[test]
fn privileged_a_vmm_that_nobody_knows_is_ended_whatever_its_program_is_called() {
    let test = "privileged_a_vmm_that_nobody_knows_is_ended_whatever_its_program_is_called";
    let Some(bench) = bench(test) else { return };
    // It never opens its sockets, so that the worker dies before it can know the VMM.
    let settings = Settings {
        vmm: Some(
            "case \"$*\" in *monitor.sock*) while :; do sleep 1; done;; esac\nexec $QEMU \"$@\"",
        ),
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let mut run = begin(&host, "plain");
    host.until("the VMM runs", |host| !host.vmms().is_empty());
    let worker = host.worker().unwrap();
    signal("KILL", worker);
    host.until("another worker answers", |host| {
        host.worker().is_some_and(|next| next != worker) && host.run(["ps"]).code == Some(0)
    });
    host.until("the VM has failed", |host| {
        host.vm("plain")["state"] == "failed"
    });
    host.until("its VMM is gone", |host| host.vmms().is_empty());
    run.wait().unwrap();
}

/// A file system whose server never answers, as that of a dead file server, over all that images
/// are opened by; whoever looks at it waits until this is dropped.
struct Hanging {
    at: PathBuf,
    _server: OwnedFd,
}

impl Hanging {
    fn over(host: &Host) -> Self {
        let at = host.repository().join("chunks");
        let opened = File::options().read(true).write(true).open("/dev/fuse");
        let server = OwnedFd::from(opened.unwrap());
        // For `mount`, which has it under the same number.
        fcntl_setfd(&server, FdFlags::empty()).unwrap();
        let number = server.as_raw_fd();
        let options = format!("fd={number},rootmode=40000,user_id=0,group_id=0");
        let mut mount = Command::new("mount");
        mount.args(["-i", "-t", "fuse", "-o", &options, "none"]);
        let mounted = mount.arg(&at).status().unwrap();
        fcntl_setfd(&server, FdFlags::CLOEXEC).unwrap();
        assert!(mounted.success());
        Self {
            at,
            _server: server,
        }
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

#[test]
fn privileged_a_launch_that_waits_for_the_repository_can_be_stopped_and_terminated() {
    let test = "privileged_a_launch_that_waits_for_the_repository_can_be_stopped_and_terminated";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        repository: RepositoryOf::Test,
        // What waited for it would not come to an end here.
        timeout_s: Some(36_000.0),
        ..Settings::default()
    };
    let mut host = Host::started(&bench, &settings);
    let hanging = Hanging::over(&host);
    let mut first = begin(&host, "first");
    host.ok(["stop", "first"]);
    assert_eq!(host.vm("first")["state"], "stopped");
    first.wait().unwrap();
    // The name is free again, and the next one is ended by the daemon's own end.
    let mut again = begin(&host, "first");
    assert_eq!(host.terminate(), Some(0));
    drop(hanging);
    assert_eq!((host.vmms(), host.mounts()), (vec![], vec![]));
    again.wait().unwrap();
}

#[test]
fn privileged_a_repository_that_hangs_is_told_in_words() {
    let test = "privileged_a_repository_that_hangs_is_told_in_words";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        repository: RepositoryOf::Test,
        timeout_s: Some(1.0),
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let _hanging = Hanging::over(&host);
    let manifest = host.write("plain.toml", &idle("plain", "[]", ""));
    let said = host.refused(["run", "--detach", manifest.to_str().unwrap()]);
    assert!(said.contains("did not answer within 1 s"), "{said}");
    assert!(said.contains("repository.timeout_s"), "{said}");
}
