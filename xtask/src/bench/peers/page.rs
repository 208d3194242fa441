//! When a page is served.
//!
//! QEMU's user network takes a connection before the guest listens and then waits for the
//! guest through retries of seconds, so each attempt is a short one.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const ATTEMPT: Duration = Duration::from_millis(100);
const LIMIT: Duration = Duration::from_secs(120);

/// Waits for the page of `examples/web.toml`; returns the seconds since `asked`. `failed` says
/// why it will not come.
pub fn wait(port: u16, asked: Instant, mut failed: impl FnMut() -> Option<String>) -> Result<f64> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    loop {
        if attempt(address).is_some_and(|page| page.contains("hello from a composed VM")) {
            return Ok(asked.elapsed().as_secs_f64());
        }
        if let Some(reason) = failed() {
            bail!("the VM ended before its page was served: {reason}");
        }
        if asked.elapsed() > LIMIT {
            bail!("no page on port {port} in {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn attempt(address: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&address, ATTEMPT).ok()?;
    stream.set_read_timeout(Some(ATTEMPT)).ok()?;
    stream
        .write_all(b"GET / HTTP/1.0\r\nHost: guest\r\n\r\n")
        .ok()?;
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut piece) {
        answer.extend_from_slice(&piece[..count]);
    }
    String::from_utf8(answer).ok()
}
