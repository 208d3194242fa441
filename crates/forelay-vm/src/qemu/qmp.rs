//! A small QMP client: commands with replies, and the events that tell how a VM ends.
//!
//! QMP is QEMU's JSON monitor (docs/interop/qmp-spec in QEMU's tree): a greeting, then
//! `qmp_capabilities`, then commands that carry an `id`, and events in between. QEMU serves
//! one client; a successor gets a new greeting on its own connection.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use forelay_guest_protocol::messages::Line;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc, oneshot};

use crate::lifecycle::Cause;
use crate::lines::{self, LineConnection};

/// Longest accepted message.
const MAX_LINE_BYTES: usize = 1 << 20;
/// How long a command may take.
const COMMAND: Duration = Duration::from_secs(60);

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// No connection.
    #[error("connect to {path}")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The monitor closed.
    #[error("QEMU's monitor is closed")]
    Closed,
    /// No reply in time.
    #[error("QEMU did not answer {command} in time")]
    TimedOut {
        /// The command.
        command: String,
    },
    /// QEMU refused.
    #[error("QEMU refused {command}: {text}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's words.
        text: String,
    },
}

/// An event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Name: `DEVICE_DELETED`.
    pub name: String,
    /// Its data.
    pub data: Value,
}

#[derive(Deserialize)]
struct Message {
    id: Option<u64>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    data: Option<Value>,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

type Answer = oneshot::Sender<Result<Value, String>>;

/// A connection to a monitor.
#[derive(Debug)]
pub struct Qmp {
    commands: mpsc::Sender<(Value, Answer)>,
    events: broadcast::Sender<Event>,
    last_words: Arc<Mutex<Option<Cause>>>,
}

impl Qmp {
    /// Connects and negotiates.
    pub async fn connect(path: &Path) -> Result<Self, QmpError> {
        let connection = lines::connect(path, MAX_LINE_BYTES)
            .await
            .map_err(|source| QmpError::Connect {
                path: path.display().to_string(),
                source,
            })?;
        Self::start(connection).await
    }

    async fn start(connection: LineConnection) -> Result<Self, QmpError> {
        let (commands, queue) = mpsc::channel(16);
        let (events, _) = broadcast::channel(64);
        let last_words = Arc::default();
        let serving = serve(connection, queue, events.clone(), Arc::clone(&last_words));
        tokio::spawn(serving);
        let qmp = Self {
            commands,
            events,
            last_words,
        };
        qmp.command("qmp_capabilities", Value::Null).await?;
        Ok(qmp)
    }

    /// Runs a command.
    pub async fn command(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut message = json!({ "execute": name });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let (sender, answer) = oneshot::channel();
        let exchange = async {
            self.commands
                .send((message, sender))
                .await
                .map_err(|_| QmpError::Closed)?;
            answer.await.map_err(|_| QmpError::Closed)
        };
        let command = name.to_owned();
        match tokio::time::timeout(COMMAND, exchange).await {
            Ok(answer) => answer?.map_err(|text| QmpError::Refused { command, text }),
            Err(_) => Err(QmpError::TimedOut { command }),
        }
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Why QEMU shut down, if it said so before it closed the monitor, which is waited for.
    pub async fn last_words(&self) -> Option<Cause> {
        self.commands.closed().await;
        *self
            .last_words
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

async fn serve(
    mut connection: LineConnection,
    mut queue: mpsc::Receiver<(Value, Answer)>,
    events: broadcast::Sender<Event>,
    last_words: Arc<Mutex<Option<Cause>>>,
) {
    let mut waiting: HashMap<u64, Answer> = HashMap::new();
    let mut next_id = 1u64;
    loop {
        tokio::select! {
            line = connection.incoming.recv() => {
                let Some(line) = line else { return };
                let Line::Complete(line) = line else { continue };
                let Ok(message) = serde_json::from_slice::<Message>(&line) else { continue };
                if let Some(name) = message.event {
                    let data = message.data.unwrap_or_default();
                    if let Some(cause) = shutdown_cause(&name, &data) {
                        *last_words.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause);
                    }
                    let _ = events.send(Event { name, data });
                } else if let Some(answer) = message.id.and_then(|id| waiting.remove(&id)) {
                    let _ = answer.send(match message.error {
                        Some(refusal) => Err(refusal.desc),
                        None => Ok(message.value.unwrap_or_default()),
                    });
                }
            }
            command = queue.recv() => {
                let Some((mut message, answer)) = command else { return };
                message["id"] = json!(next_id);
                waiting.retain(|_, answer| !answer.is_closed());
                waiting.insert(next_id, answer);
                next_id += 1;
                let line = format!("{message}\n").into_bytes();
                if connection.outgoing.send(line).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn shutdown_cause(event: &str, data: &Value) -> Option<Cause> {
    if event != "SHUTDOWN" {
        return None;
    }
    Some(match data["reason"].as_str().unwrap_or_default() {
        "guest-shutdown" => Cause::GuestPoweroff,
        "guest-reset" | "guest-panic" | "subsystem-reset" => Cause::GuestReset,
        "host-qmp-quit" | "host-signal" | "host-ui" | "host-qmp-system-reset" => Cause::HostQuit,
        _ if data["guest"].as_bool() == Some(true) => Cause::GuestPoweroff,
        _ => Cause::VmmDied,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixStream;

    /// A monitor that answers each line with what `answer` makes of it.
    async fn monitor(stream: UnixStream, answer: fn(&Value) -> String) {
        let (reader, mut writer) = stream.into_split();
        writer.write_all(b"{\"QMP\": {}}\n").await.unwrap();
        let mut lines = BufReader::new(reader).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let message: Value = serde_json::from_str(&line).unwrap();
            if message["execute"] == "quit" {
                return;
            }
            if writer.write_all(answer(&message).as_bytes()).await.is_err() {
                return;
            }
        }
    }

    #[tokio::test]
    async fn replies_match_ids_and_events_pass_through_garbage() {
        let (host, qemu) = UnixStream::pair().unwrap();
        tokio::spawn(monitor(qemu, |message| {
            let id = message["id"].as_u64().unwrap();
            match message["execute"].as_str().unwrap() {
                "bad" => format!("{{\"id\": {id}, \"error\": {{\"desc\": \"no\"}}}}\n"),
                _ => format!(
                    "garbage\n\"text\"\n{{\"id\": 999, \"return\": 1}}\n\
                     {{\"event\": \"SHUTDOWN\", \"data\": {{\"guest\": true, \"reason\": \
                     \"guest-reset\"}}}}\n{{\"id\": {id}, \"return\": {{\"ok\": {id}}}}}\n"
                ),
            }
        }));
        let qmp = Qmp::start(lines::over(host, MAX_LINE_BYTES)).await.unwrap();
        let mut events = qmp.events();
        let reply = qmp.command("good", json!({"x": 1})).await.unwrap();
        assert_eq!(reply, json!({"ok": 2}));
        assert_eq!(events.recv().await.unwrap().name, "SHUTDOWN");
        let refused = qmp.command("bad", Value::Null).await;
        assert!(matches!(refused, Err(QmpError::Refused { text, .. }) if text == "no"));
        // All of it counts that was said before the end.
        let gone = qmp.command("quit", Value::Null).await;
        assert!(matches!(gone, Err(QmpError::Closed)), "{gone:?}");
        assert_eq!(qmp.last_words().await, Some(Cause::GuestReset));
    }

    #[tokio::test]
    async fn a_monitor_that_closes_ends_commands() {
        let (host, qemu) = UnixStream::pair().unwrap();
        drop(qemu);
        let started = Qmp::start(lines::over(host, MAX_LINE_BYTES)).await;
        assert!(matches!(started, Err(QmpError::Closed)));
    }
}
