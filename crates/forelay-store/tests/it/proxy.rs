//! A proxy in front of a running server, that does to what passes what a test asks for.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// What becomes of one request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It passes.
    None,
    /// The proxy answers by itself: a status line and further headers, each with its end.
    Answer(&'static str),
    /// It is carried out, and the connection ends without an answer.
    Lost,
    /// The connection ends after so many bytes of the answer's body.
    CutAfter(usize),
    /// A byte of the answer is changed, this far behind its head.
    Flip(usize),
    /// The answer's head comes, and after it nothing for as long as the test lasts.
    Stall,
}

/// A proxy, for as long as the test's runtime lives.
pub struct Proxy {
    pub address: SocketAddr,
    state: Arc<State>,
}

struct State {
    server: SocketAddr,
    /// For the requests to come, one each, if their first line has the word; after that they
    /// pass.
    faults: Mutex<(&'static str, VecDeque<Fault>)>,
    /// First lines of the requests so far.
    seen: Mutex<Vec<String>>,
}

impl Proxy {
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            server,
            faults: Mutex::default(),
            seen: Mutex::default(),
        });
        let serving = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let state = Arc::clone(&serving);
                // What breaks here is what a test wants to break.
                tokio::spawn(async move { state.pass(client).await.ok() });
            }
        });
        Self { address, state }
    }

    /// From now on requests whose first line has `word` meet these, one after the other.
    pub fn meet(&self, word: &'static str, faults: impl IntoIterator<Item = Fault>) {
        *self.state.faults.lock() = (word, faults.into_iter().collect());
        self.state.seen.lock().clear();
    }

    /// Requests since then whose first line has `word`.
    pub fn count(&self, word: &str) -> usize {
        let seen = self.state.seen.lock();
        seen.iter().filter(|line| line.contains(word)).count()
    }
}

impl State {
    fn next(&self, line: &str) -> Fault {
        self.seen.lock().push(line.to_owned());
        let mut faults = self.faults.lock();
        match line.contains(faults.0) {
            true => faults.1.pop_front().unwrap_or(Fault::None),
            false => Fault::None,
        }
    }

    /// One connection; of each only one request, so that each meets a fault of its own.
    async fn pass(&self, mut client: TcpStream) -> std::io::Result<()> {
        let request = request(&mut client).await?;
        let line = request.split(|byte| *byte == b'\r').next();
        let line = String::from_utf8_lossy(line.unwrap_or_default()).into_owned();
        let fault = self.next(&line);
        if let Fault::Answer(head) = fault {
            let answer = format!("HTTP/1.1 {head}content-length: 0\r\nconnection: close\r\n\r\n");
            return client.write_all(answer.as_bytes()).await;
        }
        let mut server = TcpStream::connect(self.server).await?;
        server.write_all(&request).await?;
        let mut answer = Vec::new();
        // The server was told that the connection ends.
        server.read_to_end(&mut answer).await?;
        let head = answer.windows(4).position(|four| four == b"\r\n\r\n");
        let body = head.map_or(answer.len(), |at| at + 4);
        match fault {
            Fault::Lost => return Ok(()),
            Fault::CutAfter(bytes) => answer.truncate((body + bytes).min(answer.len())),
            Fault::Flip(at) if body + at < answer.len() => answer[body + at] ^= 1,
            Fault::Stall => {
                client.write_all(&answer[..body]).await?;
                std::future::pending::<()>().await;
            }
            _ => {}
        }
        client.write_all(&answer).await
    }
}

/// A whole request, which asks the server to end the connection.
async fn request(client: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = client.read(&mut buffer).await?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        all.extend_from_slice(&buffer[..read]);
        let Some(head) = all.windows(4).position(|four| four == b"\r\n\r\n") else {
            continue;
        };
        let text = String::from_utf8_lossy(&all[..head]).into_owned();
        let length = text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            let is_length = name.eq_ignore_ascii_case("content-length");
            is_length.then(|| value.trim().parse::<usize>().ok())?
        });
        let wanted = head + 4 + length.unwrap_or(0);
        while all.len() < wanted {
            let read = client.read(&mut buffer).await?;
            all.extend_from_slice(&buffer[..read]);
        }
        let line = text.find("\r\n").unwrap_or(head) + 2;
        all.splice(line..line, b"connection: close\r\n".iter().copied());
        return Ok(all);
    }
}
