//! The agent: answers the guest channel, runs the entrypoint, reports what happens.
//!
//! Threads: reaper, channel reader, channel writer, readiness probe, one for each request
//! and each program of `exec` (bounded). Writers block while no host is connected; events
//! that do not fit the queue are dropped, since a host that connects asks for the
//! [`Status`]. The reader never waits for a writer.
//!
//! Invariant: nothing the host sends panics the agent or makes it allocate without bound.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use forelay_guest_protocol::config::{Entrypoint, Run, VM_CONFIG_PATH, VmConfig};
use forelay_guest_protocol::frames::{self, Frame, Stream};
use forelay_guest_protocol::messages::{
    BootSteps, ErrorKind, Exec, ExitStatus, GuestCommand, GuestMessage, GuestRequest, Line,
    LineBuffer, MAX_REQUEST_BYTES, Mounted, PROTOCOL_VERSION, Reply, Status, Traffic,
};
use forelay_guest_protocol::snapshot::{Freeze, Frozen, Release, Resume, Resumed, Tier};

use crate::boot::{console, context};
use crate::exec::{self, Execs, Port};
use crate::graft::Grafts;
use crate::identity::RootFiles;
use crate::process::{self, Reaper};
use crate::{devices, freezer, hold, identity, ready, sys};

/// Messages that may wait for the writer.
const QUEUE_MESSAGES: usize = 256;
/// Requests that may be worked on at once.
const MAX_RUNNING: usize = 32;
/// How long the console may take for the entrypoint's last output.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// How long an entrypoint may take to end at the signal that its image names.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// Environment variable that carries [`Mounted`] to an agent beside an init.
const MOUNTED_VARIABLE: &str = "FORELAY_MOUNTED";

/// In a clone, when it began; its standard input is the guest channel.
const BEGINNING_VARIABLE: &str = "FORELAY_BEGINNING_US";
/// How long a VM that is ready is left to itself before it is held: programs go on setting
/// themselves up after they answer first.
const SETTLE: Duration = Duration::from_secs(1);

enum Outgoing {
    Message(GuestMessage),
    Flush(SyncSender<()>),
}

struct Agent {
    config: VmConfig,
    is_init: bool,
    reaper: Arc<Reaper>,
    status: Mutex<Status>,
    grafts: Mutex<Grafts>,
    execs: Arc<Execs>,
    port: OnceLock<Arc<Port>>,
    entrypoint: OnceLock<i32>,
    outgoing: SyncSender<Outgoing>,
    /// What a held VM is told, with the request's id.
    resumes: SyncSender<(u64, Resume)>,
    running: AtomicUsize,
    /// Held by what holds this VM, or lets it go on.
    holding: Mutex<()>,
    /// It is held since it was told to freeze, so that no thread waits for what it is told.
    is_frozen: AtomicBool,
}

/// How the agent starts.
pub struct Start {
    /// The VM's configuration.
    pub config: VmConfig,
    /// How the root came up.
    pub mounted: Mounted,
    /// It is PID 1.
    pub is_init: bool,
    /// The guest channel, if it was opened before.
    pub port: Option<File>,
    /// Where the VM is held for a snapshot: before its entrypoint is started, or when it is ready.
    pub hold: Option<Tier>,
}

/// Runs the agent for ever.
pub fn run<T>(start: Start) -> io::Result<T> {
    let Start {
        config,
        mounted,
        is_init,
        port,
        hold,
    } = start;
    if hold == Some(Tier::Ready) {
        freezer::separate()?;
    }
    let reaper = Reaper::start()?;
    let (outgoing, queue) = mpsc::sync_channel(QUEUE_MESSAGES);
    let (resumes, resumed) = mpsc::sync_channel(1);
    let status = Status {
        protocol: PROTOCOL_VERSION,
        mounted: mounted.clone(),
        ..Status::default()
    };
    let agent = Arc::new(Agent {
        config,
        is_init,
        reaper,
        status: Mutex::new(status),
        grafts: Mutex::default(),
        execs: Arc::default(),
        port: OnceLock::new(),
        entrypoint: OnceLock::new(),
        outgoing,
        resumes,
        running: AtomicUsize::new(0),
        holding: Mutex::default(),
        is_frozen: AtomicBool::new(false),
    });
    agent.note_step(|steps| &mut steps.agent_us);
    let ends = agent.watch_entrypoint()?;
    let held = (hold == Some(Tier::Composed)).then(|| agent.prepare_hold(Tier::Composed));
    if held.is_none() {
        agent.send(GuestMessage::Mounted(mounted));
    }
    let for_channel = Arc::clone(&agent);
    thread("channel", move || channel(&for_channel, port, queue))?;
    if let Some(files) = held {
        agent.wait_resumed(&files, &resumed);
    }
    let started = agent.start_entrypoint(ends);
    agent.note_step(|steps| &mut steps.entrypoint_us);
    agent.start_console()?;
    match started.and_then(|()| agent.wait_ready()) {
        Ok(()) => {
            agent.tell_ready();
            if hold == Some(Tier::Ready) {
                agent.stop_image();
                let files = agent.prepare_hold(Tier::Ready);
                agent.wait_resumed(&files, &resumed);
                agent.ready_again(&files, None);
            }
        }
        Err(text) => {
            agent.send(GuestMessage::Failed { text });
            agent.power_off();
        }
    }
    loop {
        std::thread::park();
    }
}

/// Starts the agent as a child before the image's own init takes over.
pub fn spawn_beside_init(mounted: &Mounted, port: Option<File>) -> io::Result<()> {
    use std::os::unix::process::CommandExt;
    let text = serde_json::to_string(mounted)?;
    let mut command = std::process::Command::new("/proc/self/exe");
    command
        .arg0("@forelay-guest")
        .arg("agent")
        .env_clear()
        .env(MOUNTED_VARIABLE, text);
    let stdin = match port {
        Some(port) => {
            command.env(BEGINNING_VARIABLE, sys::beginning_us().to_string());
            Stdio::from(port)
        }
        None => Stdio::null(),
    };
    sys::prepare_child(&mut command, sys::ChildSetup::default());
    command
        .stdin(stdin)
        .spawn()
        .map_err(context("start the agent"))?;
    Ok(())
}

/// Runs the agent that [`spawn_beside_init`] started.
pub fn run_from_environment() -> io::Result<Infallible> {
    let mounted = std::env::var(MOUNTED_VARIABLE).unwrap_or_default();
    let mounted = serde_json::from_str(&mounted).unwrap_or_default();
    let config = serde_json::from_slice(&std::fs::read(VM_CONFIG_PATH)?)?;
    let beginning_us = std::env::var(BEGINNING_VARIABLE).ok();
    let port = match beginning_us.and_then(|text| text.parse().ok()) {
        Some(beginning_us) => {
            sys::set_beginning_us(beginning_us);
            Some(File::from(io::stdin().as_fd().try_clone_to_owned()?))
        }
        None => None,
    };
    run(Start {
        config,
        mounted,
        is_init: false,
        port,
        hold: None,
    })
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map(drop)
}

fn open_port() -> io::Result<File> {
    let port = devices::wait_for(Duration::from_secs(20), devices::channel_port)
        .ok_or_else(|| io::Error::other("no port: the host cannot talk to this VM"))?;
    let opened = File::options().read(true).write(true).open(&port);
    opened.map_err(context(port.display()))
}

fn channel(agent: &Arc<Agent>, port: Option<File>, queue: Receiver<Outgoing>) {
    let opened = port.map_or_else(open_port, Ok);
    let (reader, writer) = match opened.and_then(|file| Ok((file.try_clone()?, file))) {
        Ok(both) => both,
        Err(error) => return console(&format!("guest channel: {error}")),
    };
    let port = Arc::clone(agent.port.get_or_init(|| Arc::new(Port::new(writer))));
    if let Err(error) = thread("channel-writer", move || write_queue(&port, &queue)) {
        return console(&format!("guest channel: {error}"));
    }
    read_requests(agent, reader);
}

fn write_queue(port: &Port, queue: &Receiver<Outgoing>) {
    while let Ok(item) = queue.recv() {
        match item {
            Outgoing::Message(message) => port.send(&message),
            Outgoing::Flush(done) => drop(done.try_send(())),
        }
    }
}

fn read_requests(agent: &Arc<Agent>, mut port: File) {
    let mut lines = LineBuffer::new(MAX_REQUEST_BYTES);
    let mut buffer = vec![0; 32 << 10];
    loop {
        match port.read(&mut buffer) {
            // The host is not connected.
            Ok(0) => std::thread::sleep(Duration::from_millis(50)),
            Ok(count) => {
                for line in lines.push(&buffer[..count]) {
                    agent.handle_line(line);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return console(&format!("guest channel: {error}")),
        }
    }
}

fn refuse(kind: ErrorKind, text: impl Into<String>) -> Reply {
    Reply::Error {
        kind,
        text: text.into(),
    }
}

impl Agent {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a step of the boot is done now.
    fn note_step(&self, step: fn(&mut BootSteps) -> &mut u64) {
        *step(&mut self.status().mounted.steps) = sys::uptime_us();
    }

    fn grafts(&self) -> MutexGuard<'_, Grafts> {
        self.grafts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues an event; dropped if the queue is full.
    fn send(&self, message: GuestMessage) {
        let _ = self.outgoing.try_send(Outgoing::Message(message));
    }

    /// Queues a reply; waits for room.
    fn reply(&self, id: u64, result: Reply) {
        let message = GuestMessage::Reply { id, result };
        let _ = self.outgoing.send(Outgoing::Message(message));
    }

    /// Handles a line without waiting: the host may be waiting for it to be read.
    fn handle_line(self: &Arc<Self>, line: Line) {
        let request = match line {
            Line::Complete(line) => {
                if let Some(frame) = frames::decode(&line) {
                    return self.handle_frame(&frame);
                }
                serde_json::from_slice::<GuestRequest>(&line)
                    .map_err(|error| format!("not a request: {error}"))
            }
            Line::TooLong => Err(format!("a request is at most {MAX_REQUEST_BYTES} bytes")),
        };
        match request {
            Ok(GuestRequest { id, command }) => match command {
                GuestCommand::Start(_)
                | GuestCommand::Attach(_)
                | GuestCommand::Detach { .. }
                | GuestCommand::Traffic
                    if self.is_held() =>
                {
                    let result = refuse(ErrorKind::Busy, hold::HELD);
                    self.send(GuestMessage::Reply { id, result });
                }
                GuestCommand::Start(exec) => self.start_program(id, exec),
                GuestCommand::Credit { stdout, stderr } => self.execs.credit(id, stdout, stderr),
                GuestCommand::Resize(size) => self.execs.resize(id, size),
                GuestCommand::End => self.execs.end(id),
                GuestCommand::EndAll => self.execs.end_all(),
                GuestCommand::Clock { unix_time_us } => {
                    if let Err(error) = sys::set_clock(unix_time_us) {
                        console(&format!("clock: {error}"));
                    }
                }
                GuestCommand::Resume(resume) if self.is_frozen.load(Ordering::SeqCst) => {
                    self.start_resume(id, resume);
                }
                GuestCommand::Resume(resume) => {
                    // Who waits for it takes the first one.
                    if !self.is_held() || self.resumes.try_send((id, resume)).is_err() {
                        let text = "this VM is not held for a snapshot";
                        let result = refuse(ErrorKind::BadRequest, text);
                        self.send(GuestMessage::Reply { id, result });
                    }
                }
                // In a clone a thread more takes longer than all else that it does.
                GuestCommand::Status if self.is_held() => {
                    let result = Reply::Status(self.status().clone());
                    self.send(GuestMessage::Reply { id, result });
                }
                command => self.start_request(id, command),
            },
            Err(text) => {
                let result = refuse(ErrorKind::BadRequest, text);
                self.send(GuestMessage::Reply { id: 0, result });
            }
        }
    }

    fn handle_frame(&self, frame: &Frame) {
        if frame.stream == Stream::Stdin {
            self.execs.stdin(frame.id, &frame.bytes);
        }
    }

    fn start_program(&self, id: u64, exec: Exec) {
        // The request came over the port.
        let Some(port) = self.port.get() else { return };
        let started = self
            .execs
            .start(id, exec, &self.config.env, &self.reaper, port);
        if let Err((kind, text)) = started {
            let result = refuse(kind, text);
            self.send(GuestMessage::Reply { id, result });
        }
    }

    /// Runs a request that may take long on a thread of its own.
    fn start_request(self: &Arc<Self>, id: u64, command: GuestCommand) {
        if self.running.fetch_add(1, Ordering::SeqCst) >= MAX_RUNNING {
            self.running.fetch_sub(1, Ordering::SeqCst);
            let text = format!("{MAX_RUNNING} requests are already running");
            let result = refuse(ErrorKind::Busy, text);
            return self.send(GuestMessage::Reply { id, result });
        }
        let agent = Arc::clone(self);
        let started = thread("request", move || {
            let reply = agent.perform(id, command);
            agent.running.fetch_sub(1, Ordering::SeqCst);
            agent.reply(id, reply);
        });
        if let Err(error) = started {
            self.running.fetch_sub(1, Ordering::SeqCst);
            let result = refuse(ErrorKind::Failed, format!("start a thread: {error}"));
            self.send(GuestMessage::Reply { id, result });
        }
    }

    fn is_held(&self) -> bool {
        self.status().held.is_some()
    }

    fn tell_ready(&self) {
        let uptime_ms = sys::uptime_us() / 1000;
        let steps = {
            let mut status = self.status();
            status.ready_uptime_ms = Some(uptime_ms);
            status.mounted.steps
        };
        self.send(GuestMessage::Ready { uptime_ms, steps });
    }

    /// Stops what the image runs.
    fn stop_image(&self) {
        std::thread::sleep(SETTLE);
        self.execs.end_all();
        if let Err(error) = freezer::freeze() {
            let text = format!("hold for a snapshot: {error}");
            self.send(GuestMessage::Failed { text });
            self.power_off();
        }
    }

    /// Makes all ready for the host to save this VM, and says so; what its clones will change.
    fn prepare_hold(&self, tier: Tier) -> RootFiles {
        let files = RootFiles::find(tier, &self.config.keeps);
        hold::prepare();
        self.status().held = Some(tier);
        self.send(GuestMessage::Held { tier });
        files
    }

    /// Waits until this is a clone that was told who it is. (On this thread: in a clone that was
    /// just restored, to make another one takes longer than what is to be done.)
    fn wait_resumed(&self, files: &RootFiles, resumed: &Receiver<(u64, Resume)>) {
        // The sender lives in this agent.
        while let Ok((id, resume)) = resumed.recv() {
            match self.resume(id, &resume, files) {
                Ok(()) => return,
                Err(text) => self.reply(id, refuse(ErrorKind::BadRequest, text)),
            }
        }
    }

    fn holding(&self) -> MutexGuard<'_, ()> {
        self.holding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops what the image runs, if this is PID 1: an init of the image's own cannot be.
    fn freeze(&self, freeze: Freeze) -> Reply {
        let _one = self.holding();
        if self.is_held() {
            return refuse(ErrorKind::Busy, hold::HELD);
        }
        if self.is_init
            && let Err(error) = freezer::gather().and_then(|()| freezer::freeze())
        {
            let _ = freezer::thaw();
            return refuse(ErrorKind::Failed, format!("stop all programs: {error}"));
        }
        hold::note_devices();
        sys::sync();
        if freeze.give_back {
            hold::give_back();
        }
        self.status().held = Some(Tier::Ready);
        self.is_frozen.store(true, Ordering::SeqCst);
        Reply::Frozen(Frozen { all: self.is_init })
    }

    /// Lets this VM go on, which is the one that it was. Its programs go on whatever fails.
    fn release(&self, release: &Release) -> Reply {
        let _one = self.holding();
        if !self.is_held() {
            return match sys::set_clock(release.unix_time_us) {
                Ok(()) => Reply::Released,
                Err(error) => refuse(ErrorKind::Failed, format!("clock: {error}")),
            };
        }
        for failure in identity::same(release) {
            console(&failure);
        }
        if self.is_init
            && let Err(error) = freezer::thaw()
        {
            return refuse(ErrorKind::Failed, format!("let programs go on: {error}"));
        }
        self.is_frozen.store(false, Ordering::SeqCst);
        let (mounted, ready_ms) = {
            let mut status = self.status();
            status.held = None;
            (status.mounted.clone(), status.ready_uptime_ms)
        };
        // A host that met it held has not heard of either.
        let steps = mounted.steps;
        self.send(GuestMessage::Mounted(mounted));
        if let Some(uptime_ms) = ready_ms {
            self.send(GuestMessage::Ready { uptime_ms, steps });
        }
        Reply::Released
    }

    /// Makes the clone of a VM that ran a machine of its own.
    fn start_resume(self: &Arc<Self>, id: u64, resume: Resume) {
        let agent = Arc::clone(self);
        let started = thread("resume", move || {
            let files = RootFiles::find(Tier::Ready, &agent.config.keeps);
            let exited = agent.status().exited;
            match agent.resume(id, &resume, &files) {
                Ok(()) => agent.ready_again(&files, exited),
                Err(text) => agent.reply(id, refuse(ErrorKind::BadRequest, text)),
            }
        });
        if let Err(error) = started {
            let result = refuse(ErrorKind::Failed, format!("start a thread: {error}"));
            self.send(GuestMessage::Reply { id, result });
        }
    }

    /// Makes this clone a machine of its own and lets its processes go on.
    fn resume(&self, id: u64, resume: &Resume, files: &RootFiles) -> Result<(), String> {
        resume.validate()?;
        let _one = self.holding();
        if !self.is_held() {
            return Err("this VM is not held for a snapshot".to_owned());
        }
        sys::count_uptime_from_now();
        // Who started them is another VM's host.
        self.execs.end_all();
        let mut failures = Vec::new();
        let failed = |error: io::Error| format!("this clone must not run on: {error}");
        identity::kernel(resume, &mut failures).map_err(failed)?;
        let run =
            |command: &mut Command, limit| match process::run_within(&self.reaper, command, limit)?
            {
                status if status.success() => Ok(()),
                status => Err(identity::ended(status.code())),
            };
        files.set(resume, &run, &mut failures);
        freezer::thaw().map_err(failed)?;
        self.is_frozen.store(false, Ordering::SeqCst);
        let mounted = {
            let mut status = self.status();
            status.held = None;
            status.ready_uptime_ms = None;
            let now_us = sys::uptime_us();
            status.mounted.uptime_ms = now_us / 1000;
            status.mounted.steps = BootSteps {
                kernel_us: now_us,
                ..BootSteps::default()
            };
            status.mounted.clone()
        };
        let unix_time_us = sys::clock_us();
        let resumed = Resumed {
            failures,
            unix_time_us,
        };
        self.reply(id, Reply::Resumed(resumed));
        self.send(GuestMessage::Mounted(mounted));
        Ok(())
    }

    /// After [`Self::resume`]: tells when the VM is ready, or that it will not be. It was when it
    /// was held, and nothing has run since but hooks, which may have started a program again. A VM
    /// whose entrypoint had `exited` while it ran went on without it, and so does its clone.
    fn ready_again(&self, files: &RootFiles, exited: Option<ExitStatus>) {
        let ready = match exited {
            Some(_) => Ok(()),
            None if files.has_hooks() => self.wait_ready(),
            None => self.has_not_failed(),
        };
        match ready {
            Ok(()) => self.tell_ready(),
            Err(text) => {
                self.send(GuestMessage::Failed { text });
                self.power_off();
            }
        }
    }

    fn perform(&self, id: u64, command: GuestCommand) -> Reply {
        match command {
            GuestCommand::Status => Reply::Status(self.status().clone()),
            GuestCommand::Attach(attach) => {
                let result = self.grafts().attach(&attach);
                self.status().attached = self.grafts().uuids();
                result.map_or_else(|(kind, text)| refuse(kind, text), Reply::Attached)
            }
            GuestCommand::Detach { uuid } => {
                let result = self.grafts().detach(&uuid);
                self.status().attached = self.grafts().uuids();
                result.map_or_else(|(kind, text)| refuse(kind, text), |()| Reply::Detached)
            }
            GuestCommand::Traffic => match std::fs::read_to_string("/proc/net/dev") {
                Ok(dev) => Reply::Traffic(Traffic::parse(&dev)),
                Err(error) => refuse(ErrorKind::Failed, format!("/proc/net/dev: {error}")),
            },
            GuestCommand::Freeze(freeze) => self.freeze(freeze),
            GuestCommand::Release(release) => self.release(&release),
            GuestCommand::Poweroff => {
                self.reply(id, Reply::PoweringOff);
                self.power_off()
            }
            GuestCommand::Resume(_)
            | GuestCommand::Clock { .. }
            | GuestCommand::Start(_)
            | GuestCommand::Credit { .. }
            | GuestCommand::Resize(_)
            | GuestCommand::End
            | GuestCommand::EndAll => refuse(ErrorKind::BadRequest, "handled by the reader"),
        }
    }

    /// Starts the entrypoint, if there is one; else says why it does not run.
    fn start_entrypoint(&self, ends: Sender<ExitStatus>) -> Result<(), String> {
        let Run::Entrypoint(entrypoint) = &self.config.run else {
            return Ok(());
        };
        let Err(error) = self.spawn_entrypoint(entrypoint, ends) else {
            return Ok(());
        };
        let text = format!("entrypoint {:?}: {error}", entrypoint.argv);
        console(&text);
        let status = match exec::start_failure(&error) {
            ErrorKind::NotFound => 127,
            _ => 126,
        };
        self.entrypoint_ended(ExitStatus::Code(status));
        Err(text)
    }

    /// Waits until the VM is ready, or says why it will not be. (An entrypoint that ends well
    /// may have left a service.)
    fn wait_ready(&self) -> Result<(), String> {
        let failed = || self.has_not_failed().is_err();
        match ready::wait(&self.config, &self.reaper, failed) {
            true => Ok(()),
            false => self.has_not_failed(),
        }
    }

    fn has_not_failed(&self) -> Result<(), String> {
        let failed = self.status().exited.filter(|status| !status.success());
        failed.map_or(Ok(()), |status| {
            let status = status.code();
            Err(format!(
                "the entrypoint ended with status {status} before the VM was ready"
            ))
        })
    }

    /// Waits for the entrypoint's end, which is to be sent there. (Before it is started, and before
    /// a VM is held: see [`Self::wait_resumed`].)
    fn watch_entrypoint(self: &Arc<Self>) -> io::Result<Sender<ExitStatus>> {
        let (ends, ended) = mpsc::channel();
        let agent = Arc::clone(self);
        thread("entrypoint", move || {
            if let Ok(status) = ended.recv() {
                agent.entrypoint_ended(status);
            }
        })?;
        Ok(ends)
    }

    fn spawn_entrypoint(
        &self,
        entrypoint: &Entrypoint,
        ends: Sender<ExitStatus>,
    ) -> io::Result<()> {
        let Entrypoint {
            argv, cwd, user, ..
        } = entrypoint;
        let mut command = process::command(argv, &self.config.env, cwd, user, false)?;
        let output = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/console")?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = self.reaper.spawn(&mut command, move |status| {
            let _ = ends.send(status);
        })?;
        let _ = self.entrypoint.set(child.id() as i32);
        Ok(())
    }

    fn entrypoint_ended(&self, status: ExitStatus) {
        // Who hears of the end finds the last output in the console's log, unless nothing
        // takes it.
        let (done, drained) = mpsc::channel();
        let draining = thread("drain", move || {
            if let Ok(terminal) = File::options().write(true).open("/dev/console") {
                sys::drain(terminal.as_fd());
            }
            let _ = done.send(());
        });
        if draining.is_ok() {
            let _ = drained.recv_timeout(DRAIN_LIMIT);
        }
        self.status().exited = Some(status);
        self.send(GuestMessage::Exited(status));
        if matches!(&self.config.run, Run::Entrypoint(entry) if entry.poweroff_on_exit) {
            self.power_off();
        }
    }

    /// Keeps the configured program running on the serial console.
    fn start_console(self: &Arc<Self>) -> io::Result<()> {
        if self.config.console.is_empty() {
            return Ok(());
        }
        let agent = Arc::clone(self);
        thread("console", move || {
            loop {
                if let Err(error) = agent.run_console() {
                    return console(&format!("console program: {error}"));
                }
                std::thread::sleep(Duration::from_secs(1));
            }
        })
    }

    fn run_console(&self) -> io::Result<()> {
        let terminal = File::options().read(true).write(true).open("/dev/ttyS0")?;
        let mut command = process::command(&self.config.console, &self.config.env, "", "", true)?;
        command
            .stdin(terminal.try_clone()?)
            .stdout(terminal.try_clone()?)
            .stderr(terminal);
        let (sender, ended) = mpsc::channel();
        self.reaper.spawn(&mut command, move |status| {
            let _ = sender.send(status);
        })?;
        ended.recv().map(drop).map_err(io::Error::other)
    }

    /// Asks the entrypoint to end in the way that its image names, if it names one.
    fn stop_entrypoint(&self) {
        let (Run::Entrypoint(entrypoint), Some(&pid)) = (&self.config.run, self.entrypoint.get())
        else {
            return;
        };
        let asked =
            entrypoint.stop_signal > 0 && self.reaper.signal_child(pid, entrypoint.stop_signal);
        if asked {
            let ended = || (!self.reaper.signal_child(pid, 0)).then_some(());
            devices::wait_for(STOP_LIMIT, ended);
        }
    }

    /// Ends everything and powers off.
    fn power_off(&self) -> ! {
        let (done, flushed) = mpsc::sync_channel(1);
        if self.outgoing.try_send(Outgoing::Flush(done)).is_ok() {
            let _ = flushed.recv_timeout(Duration::from_millis(300));
        }
        if self.is_init {
            self.stop_entrypoint();
            let _ = sys::kill(-1, libc::SIGTERM);
            let all_gone = || sys::no_children().then_some(());
            devices::wait_for(Duration::from_secs(2), all_gone);
            let _ = sys::kill(-1, libc::SIGKILL);
        } else {
            let _ = sys::kill(1, sys::systemd_poweroff_signal());
            std::thread::sleep(Duration::from_secs(60));
        }
        console(&format!("power off: {}", sys::power_off()));
        loop {
            std::thread::park();
        }
    }
}
