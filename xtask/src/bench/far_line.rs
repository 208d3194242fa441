//! A line to a far server of any kind: a TCP proxy with the demo's latency and bandwidth, and a
//! count of what went over it.
//!
//! Each request waits out the latency; bytes of answers pass, a slice at a time, through one
//! line that all connections share. Ends with the process that runs it.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::demo::{BANDWIDTH_BYTES_PER_S, LATENCY_MS};

const SLICE_BYTES: usize = 64 << 10;
/// First words of requests.
const METHODS: [&[u8]; 5] = [b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE "];

/// A line to a server.
pub struct FarLine {
    /// Where clients connect to.
    pub address: SocketAddr,
    state: Arc<LineState>,
}

struct LineState {
    server: SocketAddr,
    requests: AtomicU64,
    bytes: AtomicU64,
    /// When the line is free for the next slice.
    free_at: Mutex<Instant>,
}

impl FarLine {
    /// A line to `server`.
    pub fn to(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = Arc::new(LineState {
            server,
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            free_at: Mutex::new(Instant::now()),
        });
        let serving = Arc::clone(&state);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = Arc::clone(&serving);
                // A client or server that ends a connection ends these two threads.
                std::thread::spawn(move || state.carry(client));
            }
        });
        Ok(Self { address, state })
    }

    /// Requests, and bytes of answers, since the last look.
    pub fn taken(&self) -> (u64, u64) {
        let state = &self.state;
        (
            state.requests.swap(0, Ordering::Relaxed),
            state.bytes.swap(0, Ordering::Relaxed),
        )
    }
}

impl LineState {
    fn carry(self: Arc<Self>, mut client: TcpStream) -> std::io::Result<()> {
        let latency = Duration::from_millis(LATENCY_MS);
        let mut server = TcpStream::connect(self.server)?;
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
        }
        // A connection costs a round trip of its own.
        std::thread::sleep(latency);
        let (answers, mut to_client) = (server.try_clone()?, client.try_clone()?);
        let state = Arc::clone(&self);
        std::thread::spawn(move || state.answers(answers, &mut to_client));
        let mut buffer = vec![0; SLICE_BYTES];
        loop {
            let read = client.read(&mut buffer)?;
            if read == 0 {
                return server.shutdown(Shutdown::Write);
            }
            if METHODS.iter().any(|method| buffer.starts_with(method)) {
                self.requests.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(latency);
            }
            server.write_all(&buffer[..read])?;
        }
    }

    fn answers(&self, mut server: TcpStream, client: &mut TcpStream) -> std::io::Result<()> {
        let mut buffer = vec![0; SLICE_BYTES];
        loop {
            let read = server.read(&mut buffer)?;
            if read == 0 {
                return client.shutdown(Shutdown::Write);
            }
            self.bytes.fetch_add(read as u64, Ordering::Relaxed);
            let takes = Duration::from_secs_f64(read as f64 / BANDWIDTH_BYTES_PER_S as f64);
            let due = {
                let mut free_at = self.free_at.lock().unwrap_or_else(|lock| lock.into_inner());
                *free_at = (*free_at).max(Instant::now()) + takes;
                *free_at
            };
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            client.write_all(&buffer[..read])?;
        }
    }
}
