//! A whole held mount in one executable: holder, pinner, a daemon that serves computable
//! images, and a process that maps them as a VMM would. Shows how the parts fit together;
//! the takeover tests run it.
//!
//! ```text
//! held_mount holder MOUNTPOINT IMAGES MIB    start everything; SIGTERM ends it, SIGHUP restarts
//! held_mount solo MOUNTPOINT IMAGES MIB      no holder: does as standard input says, for image 0:
//!                                            `push|pin OFFSET LEN`, `resident`
//! held_mount map MOUNTPOINT IMAGES MIB SEED  touch pages and check bytes until standard input
//!                                            ends; a line `checked N` now and then
//! ```
//! Files beside MOUNTPOINT make things go wrong: while `MOUNTPOINT.hang` is there, a daemon
//! asks its mount before it serves it; while `MOUNTPOINT.linger` is there, one that makes room
//! for the next one does not end; with `MOUNTPOINT.refuse` no restart is allowed, and
//! `MOUNTPOINT.checked` shows that one was asked for. The holder's clock is as many days ahead
//! as `MOUNTPOINT.days` says, and no machine is so busy that its limits are reached otherwise.
//! With `HELD_MOUNT_CRASH_MS` a daemon dies that long after it was ready.

#[allow(dead_code)]
#[path = "../tests/it/support.rs"]
mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use forelay_image::extent::Extent;
use forelay_memory::holder::{self, Holder, HolderConfig, HolderLimits, Shutdown};
use forelay_memory::{Config, Fault, FaultHandler, Session, SharedMemory, pinner};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use support::{Images, PAGE, TestImage};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> Outcome {
    let args: Vec<String> = std::env::args().collect();
    let arg = |n: usize| args.get(n).cloned().ok_or("see the file's head for usage");
    let number = |n: usize| Ok::<u64, Box<dyn std::error::Error>>(arg(n)?.parse()?);
    match arg(1)?.as_str() {
        "holder" => hold(&args),
        "pinner" => Ok(pinner::run(holder::pinner_socket()?.ok_or("no holder")?)?),
        "daemon" => serve(arg(2)?.into(), &images(number(3)?, number(4)?)),
        "map" => map(arg(2)?.into(), &images(number(3)?, number(4)?), number(5)?),
        "check" => {
            let refused = beside(&arg(2)?, "refuse").exists();
            std::fs::write(beside(&arg(2)?, "checked"), "")?;
            if refused {
                return Err("refused, as the test wants".into());
            }
            Ok(())
        }
        "solo" => obey(arg(2)?.into(), &images(number(3)?, number(4)?)),
        other => Err(format!("no role {other}").into()),
    }
}

fn images(count: u64, mib: u64) -> Vec<TestImage> {
    (0..count)
        .map(|n| TestImage::new(n, (mib << 20) - n * 1000))
        .collect()
}

fn beside(mountpoint: &str, what: &str) -> PathBuf {
    PathBuf::from(format!("{mountpoint}.{what}"))
}

fn hold(args: &[String]) -> Outcome {
    let role = |role: &str| {
        let rest = args[2..].iter().map(Into::into);
        std::iter::once(role.into()).chain(rest).collect()
    };
    let limit = Duration::from_secs(600);
    let limits = HolderLimits {
        ready: limit,
        silence: limit,
        restart: limit,
        stop: limit * 3,
    };
    let holder = Holder::new(HolderConfig {
        program: std::env::current_exe()?,
        worker: role("daemon"),
        pinner: role("pinner"),
        check: Some(role("check")),
        last_resort: Box::new(|| println!("last resort")),
        limits,
        clock,
    })?;
    std::process::exit(holder.run(Vec::new())?)
}

/// The holder's clock.
fn clock() -> Instant {
    let mountpoint = std::env::args().nth(2).unwrap_or_default();
    let days = std::fs::read_to_string(beside(&mountpoint, "days"));
    let days = days.ok().and_then(|days| days.parse().ok()).unwrap_or(0);
    Instant::now() + Duration::from_secs(86_400) * days
}

/// Answers after a moment, on another thread: so that a kill finds READs in flight.
struct Slow(std::sync::mpsc::Sender<Fault>);

impl FaultHandler for Slow {
    fn fault(&self, fault: Fault) {
        // The receiver lives as long as the process.
        let _ = self.0.send(fault);
    }
}

fn serve(mountpoint: PathBuf, images: &[TestImage]) -> Outcome {
    let client = holder::Client::from_env()?.ok_or("start the holder instead")?;
    let domain = match client.domains()?.pop() {
        Some(held) => held,
        None => client.create_domain("test", &mountpoint)?,
    };
    if beside(&mountpoint.display().to_string(), "hang").exists() {
        // Nobody answers: the one who could is waiting here.
        println!("hanging {}", std::process::id());
        std::fs::read_dir(&mountpoint)?;
    }
    let (sender, faults) = std::sync::mpsc::channel::<Fault>();
    let answers = Images::new(images);
    std::thread::spawn(move || {
        for fault in faults {
            std::thread::sleep(Duration::from_micros(200));
            answers.fault(fault);
        }
    });
    let mut config = Config::new(domain.mountpoint, Session::Takeover(domain.fuse));
    config.domain = domain.name;
    config.pinner = Some(Arc::new(client.pinner()?));
    let memory = SharedMemory::start(config, Arc::new(Slow(sender)))?;
    for image in images {
        memory.add_file(image.key(), image.spec())?;
    }
    let stop = Arc::new(AtomicI32::new(0));
    note_signals(Arc::clone(&stop))?;
    client.ready()?;
    let client = Arc::new(client);
    let beating = Arc::clone(&client);
    std::thread::spawn(move || {
        while beating.alive().is_ok() {
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    println!("serving {}", std::process::id());
    if let Ok(crash_ms) = std::env::var("HELD_MOUNT_CRASH_MS") {
        let served = Duration::from_millis(crash_ms.parse()?);
        std::thread::spawn(move || {
            std::thread::sleep(served);
            println!("crashing {}", std::process::id());
            std::process::abort();
        });
    }
    let signal = churn(&memory, images, &stop)?;
    let reason = match signal {
        signal_hook::consts::SIGHUP => Shutdown::Restart,
        _ => Shutdown::Stop,
    };
    client.shutdown(reason)?;
    if reason == Shutdown::Stop {
        println!("stopped {}", std::process::id());
        return Ok(());
    }
    let linger = beside(&memory.mountpoint().display().to_string(), "linger");
    if linger.exists() {
        println!("lingering {}", std::process::id());
        while linger.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// Serves a mount of its own and does as it is told.
fn obey(mountpoint: PathBuf, images: &[TestImage]) -> Outcome {
    let mut config = Config::new(mountpoint, Session::New);
    config.pinner = Some(Arc::new(pinner::PinnerClient::in_process()?));
    let memory = SharedMemory::start(config, Images::new(images))?;
    for image in images {
        memory.add_file(image.key(), image.spec())?;
    }
    let key = images[0].key();
    println!("ready");
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let extent = || {
            let number = |n: usize| words.get(n).and_then(|word| word.parse().ok());
            Some(Extent::new(number(1)?, number(2)?))
        };
        match (words[0], extent()) {
            ("push", Some(extent)) => {
                let data = images[0].content(extent.offset, extent.len as usize);
                memory.push(&key, extent.offset, &data)?;
                println!("pushed");
            }
            ("pin", Some(extent)) => println!("pinned {}", memory.pin(&key, &[extent])?),
            ("resident", _) => {
                let extents = memory.resident(&key)?;
                let words = extents
                    .iter()
                    .map(|found| format!("{} {}", found.offset, found.len));
                println!("{}", words.collect::<Vec<_>>().join(" "));
            }
            _ => return Err(format!("not a command: {line:?}").into()),
        }
    }
    Ok(())
}

/// Pushes, pins and evicts at random, as a cache under pressure would, until a signal
/// comes; returns it.
fn churn(
    memory: &SharedMemory,
    images: &[TestImage],
    stop: &AtomicI32,
) -> Result<i32, Box<dyn std::error::Error>> {
    let mut rng = ChaCha8Rng::seed_from_u64(u64::from(std::process::id()));
    loop {
        match stop.load(Ordering::Relaxed) {
            0 => {}
            signal => return Ok(signal),
        }
        let image = images[rng.random_range(0..images.len())];
        let pages = image.bytes / PAGE;
        let start = rng.random_range(0..pages) * PAGE;
        let len = (rng.random_range(1..=64) * PAGE).min(image.bytes - start);
        let extent = Extent::new(start, len);
        match rng.random_range(0..8) {
            0..4 => {
                memory.push(&image.key(), start, &image.content(start, len as usize))?;
            }
            4 => {
                memory.pin(&image.key(), &[extent])?;
            }
            _ => {
                memory.evict(&image.key(), &[extent])?;
            }
        }
        std::thread::sleep(Duration::from_micros(300));
    }
}

/// SIGTERM and SIGHUP become a flag by way of a thread that waits for them.
fn note_signals(stop: Arc<AtomicI32>) -> Outcome {
    use signal_hook::consts::{SIGHUP, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGHUP])?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            stop.store(signal, Ordering::Relaxed);
        }
    });
    Ok(())
}

/// Touches random pages of mappings and compares; wrong bytes end it with an error, and
/// an unanswerable fault with SIGBUS.
fn map(mountpoint: PathBuf, images: &[TestImage], seed: u64) -> Outcome {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut mappings = Vec::new();
    for image in images {
        let name = format!("{}.img", image.key().hex());
        let file = std::fs::File::open(mountpoint.join(name))?;
        let mapping = forelay_memory::mapping::FileMapping::new(file, image.spec().device_bytes)?;
        mappings.push((*image, mapping));
    }
    let input_ended = Arc::new(AtomicI32::new(0));
    let ended = Arc::clone(&input_ended);
    std::thread::spawn(move || {
        // Nothing is said to it: its end is what is waited for.
        std::io::stdin().lines().for_each(drop);
        ended.store(1, Ordering::Relaxed);
    });
    let mut pages = 0u64;
    while input_ended.load(Ordering::Relaxed) == 0 {
        let (image, mapping) = &mappings[rng.random_range(0..mappings.len())];
        let offset = rng.random_range(0..mapping.len() / PAGE) * PAGE;
        if !image.page_is_right(mapping, offset) {
            return Err(format!("wrong bytes in image {} at {offset}", image.seed).into());
        }
        pages += 1;
        if pages.is_multiple_of(100) {
            println!("checked {pages}");
        }
    }
    Ok(())
}
