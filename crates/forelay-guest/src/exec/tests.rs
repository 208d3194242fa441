//! Programs with the real shell, and what is said of them on a port that is a pipe.

use super::*;
use forelay_guest_protocol::messages::{Line, LineBuffer, MAX_MESSAGE_BYTES};

/// An agent's part of running programs, and what it says on its port.
struct Bench {
    execs: Arc<Execs>,
    reaper: Arc<Reaper>,
    port: Arc<Port>,
    said: File,
    lines: LineBuffer,
    pending: VecDeque<Vec<u8>>,
}

/// What was said of a program.
#[derive(Debug, PartialEq)]
enum Said {
    Out(Stream, Vec<u8>),
    Message(GuestMessage),
}

impl Bench {
    fn new() -> Self {
        let (said, port) = io::pipe().unwrap();
        Self {
            execs: Arc::default(),
            reaper: Reaper::start().unwrap(),
            port: Arc::new(Port::new(File::from(OwnedFd::from(port)))),
            said: File::from(OwnedFd::from(said)),
            lines: LineBuffer::new(MAX_MESSAGE_BYTES),
            pending: VecDeque::new(),
        }
    }

    fn start(&self, id: u64, script: &str, stdin: bool, timeout_ms: u64) {
        let exec = Exec {
            argv: ["sh", "-c", script].map(str::to_owned).into(),
            stdin,
            timeout_ms,
            ..Exec::default()
        };
        self.start_exec(id, exec);
    }

    fn start_exec(&self, id: u64, exec: Exec) {
        let env = [("X".to_owned(), "1".to_owned())].into();
        let started = self.execs.start(id, exec, &env, &self.reaper, &self.port);
        started.unwrap();
    }

    fn next(&mut self) -> Said {
        let mut buffer = [0; 4096];
        let line = loop {
            if let Some(line) = self.pending.pop_front() {
                break line;
            }
            let count = self.said.read(&mut buffer).unwrap();
            let lines = self.lines.push(&buffer[..count]).into_iter();
            self.pending.extend(lines.map(|line| match line {
                Line::Complete(line) => line,
                Line::TooLong => panic!("too long"),
            }));
        };
        match frames::decode(&line) {
            Some(frame) => Said::Out(frame.stream, frame.bytes),
            None => Said::Message(serde_json::from_slice(&line).unwrap()),
        }
    }

    /// Output until a program's end, and its status; gives back the credit it takes.
    fn finish(&mut self, id: u64) -> (Vec<u8>, Vec<u8>, ExitStatus) {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.next() {
                Said::Out(Stream::Stdout, bytes) => {
                    self.execs.credit(id, bytes.len() as u32, 0);
                    stdout.extend(bytes);
                }
                Said::Out(_, bytes) => stderr.extend(bytes),
                Said::Message(GuestMessage::Ended { id: of, status }) if of == id => {
                    return (stdout, stderr, status);
                }
                Said::Message(_) => {}
            }
        }
    }
}

#[test]
fn all_bytes_come_before_the_status() {
    let mut bench = Bench::new();
    bench.start(1, "cat; echo $X >&2; exit 3", true, 0);
    let bytes: Vec<u8> = (0..=255).cycle().take(200_000).collect();
    for part in bytes.chunks(MAX_DATA_BYTES) {
        bench.execs.stdin(1, part);
    }
    bench.execs.stdin(1, b"");
    let (stdout, stderr, status) = bench.finish(1);
    assert!(stdout == bytes);
    assert_eq!((&*stderr, status), (&b"1\n"[..], ExitStatus::Code(3)));
    bench.start(2, "head -c 3000000 /dev/zero; kill -9 $$", false, 0);
    let (stdout, _, status) = bench.finish(2);
    assert_eq!((stdout.len(), status), (3_000_000, ExitStatus::Signal(9)));
}

#[test]
fn a_flood_stops_where_the_credit_does() {
    let mut bench = Bench::new();
    bench.start(1, "yes", false, 0);
    assert_eq!(
        bench.next(),
        Said::Message(GuestMessage::Reply {
            id: 1,
            result: Reply::Started
        })
    );
    let mut held = 0;
    for more in [0, 5, 100_000] {
        bench.execs.credit(1, more, 0);
        held += if more == 0 { WINDOW_BYTES } else { more } as usize;
        while held > 0 {
            let Said::Out(Stream::Stdout, bytes) = bench.next() else {
                panic!("no output");
            };
            // Underflows, and fails, with one byte too many.
            held -= bytes.len();
        }
    }
    bench.execs.end_all();
    assert_eq!(bench.finish(1).2, ExitStatus::Signal(libc::SIGTERM));
    // Input that nobody takes is no more than a window, either.
    bench.start(2, "exec sleep 1000", true, 0);
    for _ in 0..=WINDOW_BYTES as usize / MAX_DATA_BYTES {
        bench.execs.stdin(2, &[0; MAX_DATA_BYTES]);
    }
    assert_eq!(bench.finish(2).2, ExitStatus::Signal(libc::SIGTERM));
}

#[test]
fn a_terminal_has_a_size_signals_and_the_programs_last_words() {
    let mut bench = Bench::new();
    let size = |rows, columns| TerminalSize { rows, columns };
    let script = "tty >&2; stty size; trap 'echo int' INT; trap 'stty size; exit 7' WINCH; \
                  echo on; while :; do sleep 0.01; done";
    let exec = Exec {
        argv: ["sh", "-c", script].map(str::to_owned).into(),
        stdin: true,
        terminal: Some(size(33, 77)),
        ..Exec::default()
    };
    bench.start_exec(1, exec);
    let mut shown = String::new();
    let until = |bench: &mut Bench, shown: &mut String, words: &str| {
        while !shown.contains(words) {
            if let Said::Out(stream, bytes) = bench.next() {
                assert_eq!(stream, Stream::Stdout);
                shown.push_str(&String::from_utf8(bytes).unwrap());
            }
        }
    };
    until(&mut bench, &mut shown, "on\r\n");
    assert!(
        shown.starts_with("/dev/pts/") && shown.contains("33 77\r\n"),
        "{shown}"
    );
    // Ctrl-C is a key, and the terminal makes a signal of it.
    bench.execs.stdin(1, b"\x03");
    until(&mut bench, &mut shown, "int\r\n");
    bench.execs.resize(1, size(20, 100));
    let (rest, _, status) = bench.finish(1);
    assert_eq!(status, ExitStatus::Code(7));
    assert_eq!(String::from_utf8(rest).unwrap(), "20 100\r\n");
    // A shell that talks to somebody ends with its client, and what it runs, too.
    let exec = Exec {
        argv: ["sh", "-i"].map(str::to_owned).into(),
        stdin: true,
        terminal: Some(size(20, 80)),
        ..Exec::default()
    };
    bench.start_exec(2, exec);
    bench.execs.stdin(2, b"echo o''n; sleep 1000\n");
    let mut shown = String::new();
    until(&mut bench, &mut shown, "on\r\n");
    bench.execs.end(2);
    assert_eq!(bench.finish(2).2, ExitStatus::Signal(libc::SIGHUP));
}

#[test]
fn children_that_live_on_write_to_one_thread() {
    let mut bench = Bench::new();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for id in 0..5 {
        // Writes more than a pipe holds.
        let script = format!(
            "cd {}; (until [ -e go ]; do sleep 0.01; done; seq 100000; touch done{id}) &",
            dir.path().display()
        );
        bench.start(id, &script, false, 0);
        assert_eq!(bench.finish(id).2, ExitStatus::Code(0));
    }
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
        names
            .filter(|name| name.as_ref().is_ok_and(|name| name == "exec\n"))
            .count()
    };
    while threads() > 1 {
        std::thread::yield_now();
    }
    std::fs::write(at("go"), "").unwrap();
    while !(0..5).all(|id| at(&format!("done{id}")).exists()) {
        std::thread::yield_now();
    }
    while threads() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn what_cannot_run_or_must_end_is_told_apart() {
    let mut bench = Bench::new();
    bench.start(1, "trap '' TERM; while :; do sleep 0.01; done", false, 50);
    assert_eq!(bench.finish(1).2, ExitStatus::TimedOut);
    // A child that lives on holds nothing up, and may go on writing.
    let dir = tempfile::tempdir().unwrap();
    let late = format!(
        "cd {}; (until [ -e go ]; do sleep 0.01; done; echo late; touch done) & echo ok",
        dir.path().display()
    );
    bench.start(2, &late, false, 0);
    assert_eq!(bench.finish(2).0, b"ok\n");
    std::fs::write(dir.path().join("go"), "").unwrap();
    while !dir.path().join("done").exists() {
        std::thread::yield_now();
    }
    let plain = dir.path().join("plain").to_str().unwrap().to_owned();
    std::fs::write(&plain, "").unwrap();
    let cases = [
        ("/no/such/program", "", ErrorKind::NotFound),
        ("no-such-program", "", ErrorKind::NotFound),
        (&*plain, "", ErrorKind::NotExecutable),
        ("true", "/no/such/directory", ErrorKind::NotExecutable),
        (&*"x".repeat(1 << 17), "", ErrorKind::NotExecutable),
        ("true", &*"\n".repeat(1 << 17), ErrorKind::NotExecutable),
    ];
    for (id, (program, cwd, expected)) in cases.into_iter().enumerate() {
        let exec = Exec {
            argv: vec![program.to_owned()],
            cwd: cwd.to_owned(),
            ..Exec::default()
        };
        let id = 10 + id as u64;
        bench.start_exec(id, exec);
        let said = bench.next();
        let Said::Message(GuestMessage::Reply {
            id: of,
            result: Reply::Error { kind, text },
        }) = said
        else {
            panic!("{said:?}");
        };
        assert_eq!((of, kind), (id, expected), "{text}");
        assert!(text.len() <= 1000);
    }
    let error = io::Error::from_raw_os_error(libc::EAGAIN);
    assert_eq!(
        start_failure(&error),
        ErrorKind::Failed,
        "not the program's"
    );
    assert!(bench.execs.running().is_empty());
}
