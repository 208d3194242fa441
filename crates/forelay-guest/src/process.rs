//! Processes of the guest: starting them, reaping all, collecting output within bounds.
//!
//! As PID 1 the agent inherits orphans, so one reaper thread collects every child and hands
//! the status to whoever started it.
//!
//! Invariant: nothing but [`Reaper`] waits for children. `spawn` holds the lock from fork to
//! registration, and the reaper takes it before it reaps, so no status is lost.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use forelay_guest_protocol::messages::{Exec, ExecResult, ExitStatus, MAX_OUTPUT_BYTES};
use forelay_guest_protocol::payload::Payload;

use crate::sys;

/// Search path when the VM's environment has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long output of a command that has ended is waited for (a background child of it may
/// hold the pipe for ever).
const OUTPUT_GRACE: Duration = Duration::from_millis(300);

/// Collects ended children.
#[derive(Default)]
pub struct Reaper {
    waiting: Mutex<HashMap<i32, Sender<ExitStatus>>>,
}

impl Reaper {
    /// Starts the reaper thread; call before any child or other thread is started.
    pub fn start() -> io::Result<Arc<Self>> {
        sys::block_sigchld();
        let reaper = Arc::new(Self::default());
        let for_thread = Arc::clone(&reaper);
        std::thread::Builder::new()
            .name("reaper".into())
            .spawn(move || {
                loop {
                    while let Some(pid) = sys::peek_ended_child() {
                        for_thread.reap(pid);
                    }
                    sys::wait_sigchld();
                }
            })?;
        Ok(reaper)
    }

    fn reap(&self, pid: i32) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // None: a failed spawn was waited for by the standard library.
        let Some(status) = sys::reap(pid) else { return };
        if let Some(sender) = waiting.remove(&pid) {
            let _ = sender.send(exit_status(status));
        }
    }

    /// Starts a child; its status comes through the receiver.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(Child, Receiver<ExitStatus>)> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn()?;
        let (sender, receiver) = mpsc::channel();
        waiting.insert(child.id() as i32, sender);
        Ok((child, receiver))
    }
}

fn exit_status(raw: i32) -> ExitStatus {
    if libc::WIFSIGNALED(raw) {
        ExitStatus::Signal(libc::WTERMSIG(raw))
    } else {
        ExitStatus::Code(libc::WEXITSTATUS(raw))
    }
}

/// A command with the VM's environment, in its own session.
pub fn command(
    argv: &[String],
    env: &BTreeMap<String, String>,
    cwd: &str,
    user: &str,
    controlling_terminal: bool,
) -> io::Result<Command> {
    let (program, arguments) = argv
        .split_first()
        .ok_or_else(|| io::Error::other("no program is named"))?;
    let account = Account::find(user)?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", DEFAULT_PATH)
        .env("TERM", "linux");
    command.env("HOME", &account.home).envs(env);
    command.current_dir(if cwd.is_empty() { "/" } else { cwd });
    let credentials = (!user.is_empty()).then_some((account.uid, account.gid, account.groups));
    sys::prepare_child(
        &mut command,
        sys::ChildSetup {
            credentials,
            controlling_terminal,
        },
    );
    Ok(command)
}

struct Account {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    home: String,
}

impl Account {
    /// Looks up `user[:group]` in the guest's own files.
    fn find(user: &str) -> io::Result<Self> {
        if user.is_empty() {
            return Ok(Self {
                uid: 0,
                gid: 0,
                groups: Vec::new(),
                home: "/root".into(),
            });
        }
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let group = fs::read_to_string("/etc/group").unwrap_or_default();
        Self::find_in(user, &passwd, &group)
    }

    fn find_in(user: &str, passwd: &str, group: &str) -> io::Result<Self> {
        let (name, group_name) = match user.split_once(':') {
            Some((name, group_name)) => (name, Some(group_name)),
            None => (user, None),
        };
        let entry = passwd
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .find(|entry| entry.len() >= 6 && (entry[0] == name || entry[2] == name));
        let uid = match &entry {
            Some(entry) => entry[2].parse().ok(),
            None => name.parse().ok(),
        }
        .ok_or_else(|| io::Error::other(format!("no user {name:?} in /etc/passwd")))?;
        let groups = || {
            group
                .lines()
                .map(|line| line.split(':').collect::<Vec<_>>())
        };
        let gid = match (group_name, &entry) {
            (Some(wanted), _) => groups()
                .find(|fields| fields.len() >= 3 && fields[0] == wanted)
                .and_then(|fields| fields[2].parse().ok())
                .or_else(|| wanted.parse().ok())
                .ok_or_else(|| io::Error::other(format!("no group {wanted:?} in /etc/group")))?,
            (None, Some(entry)) => entry[3].parse().unwrap_or(uid),
            (None, None) => uid,
        };
        let login = entry.as_ref().map_or(name, |entry| entry[0]);
        let mut supplementary: Vec<u32> = groups()
            .filter(|fields| {
                fields.len() >= 4 && fields[3].split(',').any(|member| member == login)
            })
            .filter_map(|fields| fields[2].parse().ok())
            .collect();
        supplementary.push(gid);
        let home = entry.map_or_else(|| "/".to_owned(), |entry| entry[5].to_owned());
        Ok(Self {
            uid,
            gid,
            groups: supplementary,
            home,
        })
    }
}

/// Runs a command to its end and collects its output.
pub fn run(
    reaper: &Reaper,
    env: &BTreeMap<String, String>,
    request: &Exec,
) -> io::Result<ExecResult> {
    let mut all = env.clone();
    all.extend(request.env.clone());
    let mut command = command(&request.argv, &all, &request.cwd, &request.user, false)?;
    let stdin = if request.stdin.0.is_empty() {
        Stdio::null()
    } else {
        Stdio::piped()
    };
    command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let (mut child, status) = reaper.spawn(&mut command)?;
    let group = -(child.id() as i32);
    if let Some(mut pipe) = child.stdin.take() {
        let bytes = request.stdin.0.clone();
        std::thread::spawn(move || pipe.write_all(&bytes));
    }
    let stdout = Output::collect(child.stdout.take());
    let stderr = Output::collect(child.stderr.take());
    let status = match request.timeout_ms {
        0 => status.recv().ok(),
        limit => match status.recv_timeout(Duration::from_millis(limit)) {
            Ok(status) => Some(status),
            Err(RecvTimeoutError::Timeout) => {
                let _ = sys::kill(group, libc::SIGKILL);
                let _ = status.recv();
                Some(ExitStatus::TimedOut)
            }
            Err(RecvTimeoutError::Disconnected) => None,
        },
    };
    let status = status.ok_or_else(|| io::Error::other("the command's status was lost"))?;
    let deadline = Instant::now() + OUTPUT_GRACE;
    let (stdout, stdout_cut) = stdout.finish(deadline);
    let (stderr, stderr_cut) = stderr.finish(deadline);
    Ok(ExecResult {
        status,
        stdout,
        stderr,
        truncated: stdout_cut || stderr_cut,
    })
}

/// Output of a command, collected by a thread up to a limit.
struct Output {
    bytes: Arc<Mutex<(Vec<u8>, bool)>>,
    done: Receiver<()>,
}

impl Output {
    fn collect(pipe: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new((Vec::new(), false)));
        let (sender, done) = mpsc::channel();
        let for_thread = Arc::clone(&bytes);
        std::thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            let Some(mut pipe) = pipe else { return };
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                let mut kept = for_thread.lock().unwrap_or_else(PoisonError::into_inner);
                let room = MAX_OUTPUT_BYTES - kept.0.len();
                kept.0.extend_from_slice(&buffer[..count.min(room)]);
                kept.1 |= count > room;
            }
            drop(sender);
        });
        Self { bytes, done }
    }

    fn finish(self, deadline: Instant) -> (Payload, bool) {
        let _ = self
            .done
            .recv_timeout(deadline.saturating_duration_since(Instant::now()));
        let mut kept = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        (Payload(std::mem::take(&mut kept.0)), kept.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nweb:x:33:34:w:/var/www:/bin/sh\nbad\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nssl:x:104:redis,web\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let find = |user| Account::find_in(user, PASSWD, GROUP);
        let web = find("web").unwrap();
        assert_eq!(
            (web.uid, web.gid, web.groups, &*web.home),
            (33, 34, vec![104, 34], "/var/www")
        );
        let by_number = find("33").unwrap();
        assert_eq!((by_number.uid, by_number.gid), (33, 34));
        let other = find("web:ssl").unwrap();
        assert_eq!((other.uid, other.gid), (33, 104));
        let free = find("5000:6000").unwrap();
        assert_eq!((free.uid, free.gid, &*free.home), (5000, 6000, "/"));
        assert!(find("nobody-here").is_err());
        assert!(find("web:none").is_err());
    }

    #[test]
    fn commands_report_status_output_and_timeouts() {
        let reaper = Reaper::start().unwrap();
        let sh = |script: &str, timeout_ms| Exec {
            argv: vec!["sh".into(), "-c".into(), script.into()],
            env: [("X".to_owned(), "1".to_owned())].into(),
            stdin: Payload(b"in".to_vec()),
            timeout_ms,
            ..Exec::default()
        };
        let env = BTreeMap::new();
        let done = run(&reaper, &env, &sh("cat; echo $X >&2; exit 3", 0)).unwrap();
        assert_eq!(done.status, ExitStatus::Code(3));
        assert_eq!(
            (done.stdout.0, done.stderr.0),
            (b"in".to_vec(), b"1\n".to_vec())
        );
        let late = run(&reaper, &env, &sh("sleep 60", 50)).unwrap();
        assert_eq!(late.status, ExitStatus::TimedOut);
        let killed = run(&reaper, &env, &sh("kill -9 $$", 0)).unwrap();
        assert_eq!(killed.status, ExitStatus::Signal(9));
        let background = run(&reaper, &env, &sh("sleep 5 & echo ok", 0)).unwrap();
        assert_eq!(background.stdout.0, b"ok\n");
        let missing = Exec {
            argv: vec!["/no/such/program".into()],
            ..Exec::default()
        };
        assert_eq!(
            run(&reaper, &env, &missing).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        let large = format!("head -c {} /dev/zero", MAX_OUTPUT_BYTES + 1);
        let cut = run(&reaper, &env, &sh(&large, 0)).unwrap();
        assert!(cut.truncated);
        assert_eq!(cut.stdout.0.len(), MAX_OUTPUT_BYTES);
    }
}
