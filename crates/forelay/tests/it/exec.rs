//! Programs in a VM: their bytes as they are in both directions, their ends, their limits;
//! and what the VM's root can do. One VM for all of it.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};

use crate::fixture::{Host, Settings, bench, idle, lives, md5, signal};
use crate::screen::{self, Screen};

#[test]
fn privileged_a_program_has_its_streams_as_they_are() {
    let Some(bench) = bench("privileged_a_program_has_its_streams_as_they_are") else {
        return;
    };
    let host = Host::started(&bench, &Settings::default());
    let components = "[\"kmod\", \"linux-cloud-modules\"]";
    let manifest = host.write("exec.toml", &idle("exec", components, ""));
    host.launch(&manifest, "exec", &[]);
    bytes_come_as_they_are(&host);
    input_goes_as_it_is(&host);
    ends_are_told_as_shells_do(&host);
    json_is_text_or_an_error(&host);
    several_run_at_once(&host);
    a_reader_that_waits_holds_the_program_back(&host);
    a_program_ends_with_its_client(&host);
    a_terminal_is_the_programs(&host);
    other_clients_are_told_what_is_wrong(&host);
    the_root_does_what_others_do(&host);
}

fn exec(host: &Host, options: &[&str], script: &str) -> std::process::Command {
    let mut words = vec!["exec"];
    words.extend(options);
    words.extend(["exec", "--", "sh", "-c", script]);
    host.command(words)
}

fn spawn(mut command: std::process::Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command.stderr(Stdio::piped()).spawn().unwrap()
}

/// As in the guest: `check.py`-like patterns of bytes, zeros and newlines among them.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

fn bytes_come_as_they_are(host: &Host) {
    let output = exec(host, &[], "seq 1 400000; head -c 3145728 /dev/zero").output();
    let output = output.unwrap();
    let mut expected: Vec<u8> = (1..=400_000)
        .flat_map(|n| format!("{n}\n").into_bytes())
        .collect();
    expected.extend(vec![0; 3 << 20]);
    assert!(output.stdout == expected, "{} bytes", output.stdout.len());
    assert_eq!(output.status.code(), Some(0));
    let output = exec(host, &[], "cat /bin/ls; md5sum < /bin/ls >&2").output();
    let output = output.unwrap();
    let sum = String::from_utf8(output.stderr).unwrap();
    assert_eq!(sum, format!("{}  -\n", md5(&output.stdout)));
}

fn input_goes_as_it_is(host: &Host) {
    let bytes = pattern(1 << 20);
    let mut child = spawn(exec(host, &["-i"], "cat"));
    let mut stdin = child.stdin.take().unwrap();
    let sent = bytes.clone();
    let sender = std::thread::spawn(move || stdin.write_all(&sent));
    let output = child.wait_with_output().unwrap();
    sender.join().unwrap().unwrap();
    assert!(output.stdout == bytes, "{} bytes", output.stdout.len());
    assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b""[..]));
    // Nothing is passed on unasked, and a program that reads finds the end.
    assert_eq!(host.sh("exec", "cat; echo done"), "done\n");
    // A program that takes none of its input ends as it likes.
    let mut child = spawn(exec(host, &["-i"], "exit 4"));
    let _ = child.stdin.take().unwrap().write_all(&bytes);
    assert_eq!(child.wait().unwrap().code(), Some(4));
}

fn ends_are_told_as_shells_do(host: &Host) {
    let code = |command: &[&str]| {
        let ran = host.run(["exec", "exec", "--"].iter().chain(command));
        (ran.code.unwrap(), ran.stderr)
    };
    assert_eq!(code(&["sh", "-c", "exit 7"]).0, 7);
    assert_eq!(code(&["sh", "-c", "kill -9 $$"]).0, 137);
    let (missing, text) = code(&["no-such-program"]);
    assert!(
        missing == 127 && text.contains("no-such-program: No such file"),
        "{text}"
    );
    let (plain, text) = code(&["/etc/passwd"]);
    assert!(
        plain == 126 && text.contains("/etc/passwd: Permission denied"),
        "{text}"
    );
    // What it said before it was ended is told, if it came to that on a busy machine.
    let said = [1, 2, 4, 8, 16, 32, 64, 128]
        .into_iter()
        .map(|seconds: u8| {
            let limit = seconds.to_string();
            let late = exec(host, &["--timeout", &limit], "echo begun; sleep 600").output();
            let late = late.unwrap();
            assert_eq!(late.status.code(), Some(124));
            late.stdout
        });
    let mut said = said.filter(|said| !said.is_empty());
    assert_eq!(said.next().unwrap(), b"begun\n");
    let refused = host.refused(["exec", "--timeout=-1", "exec", "--", "true"]);
    assert!(refused.contains("no time limit"), "{refused}");
    let long = "x".repeat(130_000);
    let ran = host.run(["exec", "exec", "--", "true", &long]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
}

fn json_is_text_or_an_error(host: &Host) {
    let json = host.json([
        "exec",
        "--json",
        "exec",
        "--",
        "sh",
        "-c",
        "echo a; echo b >&2; exit 3",
    ]);
    assert_eq!(
        json,
        serde_json::json!({"status": 3, "stdout": "a\n", "stderr": "b\n"})
    );
    let refused = host.refused(["exec", "--json", "exec", "--", "cat", "/bin/ls"]);
    assert!(refused.contains("no text"), "{refused}");
    let refused = host.refused(["exec", "--json", "exec", "--", "yes"]);
    assert!(refused.contains("more than"), "{refused}");
}

fn several_run_at_once(host: &Host) {
    // Each waits for all others.
    let script = |n: usize| {
        format!(
            "mkdir -p /run/all; : > /run/all/{n}; until [ $(ls /run/all | wc -l) = 8 ]; do :; done; seq {n} 20000 | md5sum"
        )
    };
    let children: Vec<_> = (0..8).map(|n| spawn(exec(host, &[], &script(n)))).collect();
    for (n, child) in children.into_iter().enumerate() {
        let text: String = (n..=20_000).map(|n| format!("{n}\n")).collect();
        let output = child.wait_with_output().unwrap();
        let expected = format!("{}  -\n", md5(text.as_bytes()));
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    }
}

/// Resident bytes of a process, without what it shares with others by files.
fn anonymous_bytes(pid: u64) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn a_reader_that_waits_holds_the_program_back(host: &Host) {
    let worker = u64::from(host.worker().unwrap());
    let vmm = host.vm("exec")["pid"].as_u64().unwrap();
    let before = anonymous_bytes(worker);
    // It tells in a file how far it came.
    let script = "i=0; while :; do head -c 65536 /dev/zero; i=$((i+1)); echo $i > /run/came; done";
    let mut child = spawn(exec(host, &[], script));
    let came = || {
        host.sh("exec", "cat /run/came 2> /dev/null || echo 0")
            .trim()
            .to_owned()
    };
    let mut last = came();
    host.until("the program waits", |_| {
        let now = came();
        let waits = now != "0" && now == last;
        last = now;
        waits
    });
    let written: u64 = last.parse().unwrap();
    // Windows, pipes and sockets on the way; not the gigabytes of a program that runs free.
    assert!(
        written < 40,
        "it wrote {written} times 64 KiB into a pipe that nobody reads"
    );
    assert!(anonymous_bytes(worker) < before + (16 << 20));
    assert!(lives(vmm));
    // Others are served meanwhile, and it goes on when it is read.
    let mut part = vec![1; 8 << 20];
    child.stdout.take().unwrap().read_exact(&mut part).unwrap();
    assert!(part.iter().all(|&byte| byte == 0));
    signal("KILL", child.id());
    child.wait().unwrap();
    host.until("the flood ended with its client", |host| {
        let ran = host.sh("exec", "pgrep -f /run/came | grep -v ^$$ || true");
        ran.is_empty()
    });
    assert!(anonymous_bytes(worker) < before + (16 << 20));
}

fn a_program_ends_with_its_client(host: &Host) {
    for (options, script) in [
        (
            &[][..],
            "trap 'echo ended > /run/ended; exit' TERM; echo $$; while :; do sleep 0.01; done",
        ),
        // One that takes none of its input, and will not be asked.
        (
            &["-i"][..],
            "trap '' TERM; echo $$; while :; do sleep 0.01; done",
        ),
    ] {
        let mut child = spawn(exec(host, options, script));
        let mut pid = String::new();
        let mut stdout = child.stdout.take().unwrap();
        while !pid.ends_with('\n') {
            let mut byte = [0];
            stdout.read_exact(&mut byte).unwrap();
            pid.push(byte[0].into());
        }
        // Fills every buffer there is; the rest waits.
        let mut stdin = child.stdin.take().unwrap();
        let filler = std::thread::spawn(move || stdin.write_all(&vec![0; 4 << 20]));
        signal("KILL", child.id());
        child.wait().unwrap();
        let _ = filler.join().unwrap();
        host.until("the program is gone", |host| {
            let ran = host.run(["exec", "exec", "--", "kill", "-0", pid.trim()]);
            ran.code != Some(0)
        });
    }
    assert_eq!(host.sh("exec", "cat /run/ended"), "ended\n");
}

/// `exec -it` in a real terminal: its keys, sizes and signals, and what is left of it.
fn a_terminal_is_the_programs(host: &Host) {
    let told = host.refused(["exec", "-t", "exec", "true"]);
    assert!(told.contains("leave -t out"), "{told}");
    if !screen::is_there("a_terminal_is_the_programs") {
        return;
    }
    let script = "TERM=vt100 \"$@\"; echo \"left with $?\"; stty -a | grep -ow -- '-*icanon'; exec sleep 1000";
    let words = ["exec", "-it", "exec", "--", "sh"];
    let screen = Screen::new(host, "exec-it", script, &words);
    let enter = |line: &str| {
        screen.tmux(["send-keys", "-l", line]);
        screen.press("Enter");
    };
    enter("tty; stty size; echo \"it is $TERM\"");
    screen.shows(host, &["/dev/pts/", "30 100", "it is vt100"]);
    screen.tmux(["resize-window", "-x", "90", "-y", "20"]);
    host.until("the guest has the new size", |_| {
        enter("stty size");
        screen.text().contains("20 90")
    });
    // Ctrl-C is a key of the guest's terminal, and ends what runs in front there alone.
    enter("echo be''gins; sleep 1000");
    screen.shows(host, &["begins"]);
    screen.press("C-c");
    enter("echo \"was $?\"");
    screen.shows(host, &["was 130"]);
    enter("exit 7");
    let left = screen.shows(host, &["left with 7", "icanon"]);
    assert!(!left.contains("-icanon"), "given back as it was: {left}");
    drop(screen);
    // So it is when a signal ends the client.
    let screen = Screen::new(host, "exec-int", script, &words);
    screen.tmux(["send-keys", "-l", "echo be''gins"]);
    screen.press("Enter");
    screen.shows(host, &["begins"]);
    let children = format!("/proc/{0}/task/{0}/children", screen.pid());
    let client = std::fs::read_to_string(children).unwrap();
    signal("INT", client.trim().parse().unwrap());
    let left = screen.shows(host, &["left with 130", "icanon"]);
    assert!(!left.contains("-icanon"), "given back as it was: {left}");
    drop(screen);
    // A terminal that dies ends the program.
    let screen = Screen::new(host, "exec-gone", "exec \"$@\"", &words);
    screen.tmux([
        "send-keys",
        "-l",
        "echo \"pid $$ \" > /run/terminal; echo no''ted",
    ]);
    screen.press("Enter");
    screen.shows(host, &["noted"]);
    drop(screen);
    let pid = host.sh("exec", "cut -d' ' -f2 /run/terminal");
    host.until("the shell is gone", |host| {
        let ran = host.run(["exec", "exec", "--", "kill", "-0", pid.trim()]);
        ran.code != Some(0)
    });
}

fn other_clients_are_told_what_is_wrong(host: &Host) {
    let socket = host.dir().join("run/forelay.sock");
    let exchange = |headers: &str, body: &str| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        let len = body.len();
        write!(
            stream,
            "POST /v1/vms/exec/exec HTTP/1.1\r\nhost: x\r\nconnection: {headers}\r\n\
             content-type: application/json\r\ncontent-length: {len}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    let upgrade = "upgrade\r\nupgrade: forelay-exec/1";
    let streamed = exchange(upgrade, r#"{"command": ["printf", "hi"]}"#);
    assert!(streamed.starts_with("HTTP/1.1 101 "), "{streamed}");
    let end = "\u{1}\0\0\0\0\0\0\u{2}hi\u{3}\0\0\0\0\0\0\u{c}{\"status\":0}";
    assert!(streamed.ends_with(end), "{streamed:?}");
    let plain = exchange("close", r#"{"command": ["cat"], "stdin": true}"#);
    assert!(
        plain.starts_with("HTTP/1.1 400 ") && plain.contains("forelay-exec/1"),
        "{plain}"
    );
    let empty = exchange(upgrade, r#"{"command": []}"#);
    assert!(empty.starts_with("HTTP/1.1 400 "), "{empty}");
}

fn the_root_does_what_others_do(host: &Host) {
    assert_eq!(
        host.sh("exec", "ulimit -Sn; ulimit -Hn"),
        "65536\n1048576\n"
    );
    // A directory of the image, with what is in it.
    let script = "ls /usr/share/perl5 > /run/before && mv /usr/share/perl5 /usr/share/moved && \
                  python3 -c 1 2> /dev/null; perl -e 'rename \"/usr/share/moved\", \"/usr/share/again\" or die $!' && \
                  ls /usr/share/again | diff - /run/before && test ! -e /usr/share/perl5 && echo same";
    assert_eq!(host.sh("exec", script), "same\n");
    let controllers = host.sh("exec", "cat /sys/fs/cgroup/cgroup.controllers");
    assert!(
        controllers.contains("memory") && controllers.contains("pids"),
        "{controllers}"
    );
    let script = "getent hosts exec > /dev/null && flock -n /etc/passwd echo locked; \
                  grep -c ^0*1 /proc/net/if_inet6; (true &); \
                  while grep -q 'State:.Z' /proc/[0-9]*/status 2> /dev/null; do :; done; echo reaped";
    let said = host.ok(["exec", "--timeout", "600", "exec", "--", "sh", "-c", script]);
    assert_eq!(said, "locked\n1\nreaped\n");
    modules_are_there_when_wanted(host);
}

fn modules_are_there_when_wanted(host: &Host) {
    // By name with what it needs, by another name, and by the kernel itself.
    let script = "modprobe br_netfilter && modprobe nft-chain-2-nat && modprobe overlay && \
                  mount -t squashfs none /mnt 2> /dev/null; cat /proc/modules /proc/filesystems";
    let said = host.sh("exec", script);
    for module in [
        "br_netfilter ",
        "bridge ",
        "nft_chain_nat ",
        "nf_nat ",
        "\tsquashfs\n",
    ] {
        assert!(said.contains(module), "{module}: {said}");
    }
    let missing = host.run(["exec", "exec", "--", "modprobe", "no-such-module"]);
    assert_eq!(missing.code, Some(1), "{}", missing.stderr);
}
