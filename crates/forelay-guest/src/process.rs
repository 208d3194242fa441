//! Processes of the guest: starting them with an account and an environment, reaping all.
//!
//! As PID 1 the agent inherits orphans, so one reaper thread collects every child and hands
//! the status to whoever started it.
//!
//! Invariants: nothing but [`Reaper`] waits for children, except that the standard library
//! waits for one whose exec failed: while a child is being started, only registered ones are
//! reaped. The lock is not held meanwhile: an exec takes as long as its program's file.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use forelay_guest_protocol::messages::ExitStatus;

use crate::{freezer, sys};

/// Search path when the VM's environment has none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Told how a child ended.
type Ended = Box<dyn FnOnce(ExitStatus) + Send>;

/// Collects ended children.
#[derive(Default)]
pub struct Reaper {
    children: Mutex<Children>,
}

#[derive(Default)]
struct Children {
    waiting: HashMap<i32, Ended>,
    /// How many are being started, and not registered yet.
    starting: usize,
}

impl Children {
    /// Reaps a child if it has ended; who is to be told, and what.
    fn reap(&mut self, pid: i32) -> Option<(Ended, ExitStatus)> {
        let status = sys::reap(pid)?;
        let ended = self.waiting.remove(&pid)?;
        Some((ended, exit_status(status)))
    }
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
                    let soon = for_thread.reap();
                    // The main thread of tests takes signals from it.
                    sys::wait_sigchld(soon || cfg!(test));
                }
            })?;
        Ok(reaper)
    }

    fn children(&self) -> MutexGuard<'_, Children> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reaps who has ended; true if others may be left, as a child is being started.
    fn reap(&self) -> bool {
        let mut children = self.children();
        let pids: Vec<i32> = children.waiting.keys().copied().collect();
        let mut told: Vec<_> = pids.iter().filter_map(|pid| children.reap(*pid)).collect();
        // Orphans, and what has ended since.
        while children.starting == 0
            && let Some(pid) = sys::peek_ended_child()
        {
            told.extend(children.reap(pid));
        }
        let soon = children.starting > 0;
        drop(children);
        for (ended, status) in told {
            ended(status);
        }
        soon
    }

    /// Starts a child; `ended` is told its status, on the reaper's thread or on this one.
    pub fn spawn(
        &self,
        command: &mut Command,
        ended: impl FnOnce(ExitStatus) + Send + 'static,
    ) -> io::Result<Child> {
        self.children().starting += 1;
        let child = command.spawn();
        let mut children = self.children();
        children.starting -= 1;
        let child = child?;
        let pid = child.id() as i32;
        children.waiting.insert(pid, Box::new(ended));
        // The signal of an end until now has gone by.
        let told = children.reap(pid);
        drop(children);
        if let Some((ended, status)) = told {
            ended(status);
        }
        Ok(child)
    }

    /// Signals a child's process group, unless the child was reaped and its number may be
    /// another's.
    pub fn signal_group(&self, pid: i32, signal: i32) {
        self.signal(pid, -pid, signal);
    }

    /// Signals a child alone, under the same condition; false if it was reaped.
    pub fn signal_child(&self, pid: i32, signal: i32) -> bool {
        self.signal(pid, pid, signal)
    }

    fn signal(&self, child: i32, whom: i32, signal: i32) -> bool {
        let children = self.children();
        let lives = children.waiting.contains_key(&child);
        if lives {
            let _ = sys::kill(whom, signal);
        }
        lives
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
    let cwd = if cwd.is_empty() { "/" } else { cwd };
    if !fs::metadata(cwd).is_ok_and(|found| found.is_dir()) {
        // Else it would look as if the program did not exist.
        return Err(io::Error::other(format!("no directory {cwd:?} to run in")));
    }
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", DEFAULT_PATH)
        .env("TERM", "linux");
    command.env("HOME", &account.home).envs(env);
    command.current_dir(cwd);
    let credentials = (!user.is_empty()).then_some((account.uid, account.gid, account.groups));
    sys::prepare_child(
        &mut command,
        sys::ChildSetup {
            credentials,
            controlling_terminal,
            processes: freezer::processes(),
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
            // As container engines have it.
            (None, None) => 0,
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

/// Runs a command, its output to nowhere; true if it ends well within `limit`.
pub fn succeeds(
    reaper: &Reaper,
    env: &BTreeMap<String, String>,
    argv: &[String],
    limit: Duration,
) -> bool {
    let run = || -> io::Result<ExitStatus> {
        let mut command = command(argv, env, "", "", false)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        run_within(reaper, &mut command, limit)
    };
    run().is_ok_and(|status| status.success())
}

/// Runs a command to its end; kills its process group when `limit` has passed.
pub fn run_within(
    reaper: &Reaper,
    command: &mut Command,
    limit: Duration,
) -> io::Result<ExitStatus> {
    let (sender, ended) = mpsc::channel();
    let child = reaper.spawn(command, move |status| {
        let _ = sender.send(status);
    })?;
    ended.recv_timeout(limit).map_err(|_| {
        reaper.signal_group(child.id() as i32, libc::SIGKILL);
        io::Error::other(format!("it did not end within {limit:?}"))
    })
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
        let alone = Account::find_in("5000", "", "").unwrap();
        assert_eq!((alone.uid, alone.gid), (5000, 0));
        assert!(find("nobody-here").is_err());
        assert!(find("web:none").is_err());
    }

    #[test]
    fn a_start_that_hangs_holds_nothing_else_up() {
        let reaper = Reaper::start().unwrap();
        let start = |script: &str| {
            let (sender, ended) = mpsc::channel();
            let argv = ["sh", "-c", script].map(str::to_owned);
            let mut command = command(&argv, &BTreeMap::new(), "", "", false).unwrap();
            let child = reaper.spawn(&mut command, move |status| sender.send(status).unwrap());
            (child.unwrap().id() as i32, ended)
        };
        let (sleeps, killed) = start("exec sleep 1000");
        let (hangs, mut go_on) = std::io::pipe().unwrap();
        let (sender, late) = mpsc::channel();
        std::thread::scope(|scope| {
            let slow = scope.spawn(|| {
                let mut command = Command::new("sh");
                sys::hang_before_exec(&mut command, hangs);
                command.args(["-c", "exit 5"]);
                let ended = move |status| sender.send(status).unwrap();
                reaper.spawn(&mut command, ended).map(drop)
            });
            while reaper.children().starting == 0 {
                std::thread::yield_now();
            }
            assert_eq!(start("exit 3").1.recv(), Ok(ExitStatus::Code(3)));
            reaper.signal_group(sleeps, libc::SIGKILL);
            assert_eq!(killed.recv(), Ok(ExitStatus::Signal(libc::SIGKILL)));
            io::Write::write_all(&mut go_on, b"x").unwrap();
            slow.join().unwrap().unwrap();
        });
        assert_eq!(late.recv(), Ok(ExitStatus::Code(5)));
        // One that cannot be started is nobody's, and starting it harms nobody.
        let mut none = Command::new("/no/such/program");
        assert!(reaper.spawn(&mut none, |_| panic!("ended")).is_err());
        assert_eq!(start("exit 4").1.recv(), Ok(ExitStatus::Code(4)));
    }

    #[test]
    fn a_probe_succeeds_only_if_its_command_does_in_time() {
        let reaper = Reaper::start().unwrap();
        let succeeds = |script: &str, limit| {
            let argv = ["sh", "-c", script].map(str::to_owned);
            succeeds(&reaper, &BTreeMap::new(), &argv, limit)
        };
        let long = Duration::from_secs(60);
        assert!(succeeds("exit 0", long));
        assert!(!succeeds("exit 3", long));
        assert!(!succeeds("sleep 60", Duration::from_millis(50)));
        assert!(!succeeds("kill -9 $$", long));
    }
}
