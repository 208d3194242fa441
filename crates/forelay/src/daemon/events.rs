//! What happens on this host, told to those who watch.
//!
//! Owns the last events and their numbers; any folder may tell one, none may ask. Refuses to
//! know who watches. Invariants: numbers grow by one, in the order in which watchers hear of the
//! events; telling costs the same however many watch and however slow they are; one who is too
//! slow is told how many events were lost to it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::broadcast;

use crate::api::{EventKind, HostEvent};

/// Events that are kept for those who come later, and by how many a watcher may be behind.
const KEPT: usize = 256;
/// Longest message.
const MESSAGE_BYTES: usize = 500;

/// An event, and how it is told.
#[derive(Debug)]
pub struct Told {
    pub event: HostEvent,
    /// The event as JSON.
    pub json: String,
}

/// What is to be told.
#[derive(Debug)]
pub struct Happening(HostEvent);

impl Happening {
    /// Something of `kind`.
    pub fn new(kind: EventKind, message: impl Into<String>) -> Self {
        Self(HostEvent {
            id: 0,
            at_ms: 0,
            kind,
            vm: None,
            profile: None,
            message: one_line(message.into()),
            bytes: None,
            seconds: None,
        })
    }

    /// It is about this VM.
    pub fn of_vm(mut self, vm: &str) -> Self {
        self.0.vm = Some(vm.to_owned());
        self
    }

    /// It is about a VM of this profile.
    pub fn of_profile(mut self, profile: &str) -> Self {
        self.0.profile = Some(profile.to_owned());
        self
    }

    /// It is about so many bytes.
    pub fn bytes(mut self, bytes: u64) -> Self {
        self.0.bytes = Some(bytes);
        self
    }

    /// It took so long.
    pub fn seconds(mut self, seconds: f64) -> Self {
        self.0.seconds = Some(seconds);
        self
    }
}

/// The first line, cut at its bound.
fn one_line(mut text: String) -> String {
    let end = text.find('\n').unwrap_or(text.len());
    text.truncate(text.floor_char_boundary(end.min(MESSAGE_BYTES)));
    text
}

/// Where events are told and heard. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Events(Arc<Bus>);

#[derive(Debug)]
struct Bus {
    kept: Mutex<LastEvents>,
    sender: broadcast::Sender<Arc<Told>>,
}

#[derive(Debug, Default)]
struct LastEvents {
    last_id: u64,
    events: VecDeque<Arc<Told>>,
}

impl Default for Events {
    fn default() -> Self {
        Self(Arc::new(Bus {
            kept: Mutex::default(),
            sender: broadcast::Sender::new(KEPT),
        }))
    }
}

impl Events {
    /// Tells what happened. Waits for nobody.
    pub fn tell(&self, happening: Happening) {
        let mut event = happening.0;
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        event.at_ms = since.map_or(0, |since| since.as_millis() as i64);
        let mut kept = self.0.kept.lock();
        kept.last_id += 1;
        event.id = kept.last_id;
        let json = serde_json::to_string(&event).unwrap_or_default();
        let told = Arc::new(Told { event, json });
        if kept.events.len() == KEPT {
            kept.events.pop_front();
        }
        kept.events.push_back(Arc::clone(&told));
        // Nobody may watch. Told while the lock is held, so that the order is that of the ids.
        let _ = self.0.sender.send(told);
    }

    /// The last events, oldest first.
    pub fn recent(&self) -> Vec<Arc<Told>> {
        self.0.kept.lock().events.iter().cloned().collect()
    }

    /// All that is told from now on, and before it what is kept of what was told after `after`.
    pub fn watch(&self, after: Option<u64>) -> (Vec<Arc<Told>>, broadcast::Receiver<Arc<Told>>) {
        let kept = self.0.kept.lock();
        let receiver = self.0.sender.subscribe();
        let missed = |after: u64| {
            // A number of an earlier worker: all of this one is news.
            let after = if after > kept.last_id { 0 } else { after };
            let later = kept.events.iter().filter(|one| one.event.id > after);
            later.cloned().collect()
        };
        (after.map_or_else(Vec::new, missed), receiver)
    }

    /// How many watch.
    pub fn watchers(&self) -> usize {
        self.0.sender.receiver_count()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::broadcast::error::TryRecvError;

    use super::*;

    fn tell(events: &Events, number: usize) {
        events.tell(Happening::new(EventKind::Ready, format!("{number}\nmore")));
    }

    #[test]
    fn a_watcher_hears_all_in_order_and_one_that_sleeps_is_told_what_it_lost() {
        let events = Events::default();
        tell(&events, 1);
        let (missed, mut awake) = events.watch(Some(0));
        assert_eq!(missed[0].event.message, "1");
        let (none, mut asleep) = events.watch(None);
        assert!(none.is_empty() && events.watchers() == 2);
        for number in 2..=KEPT + 11 {
            tell(&events, number);
            assert_eq!(awake.try_recv().unwrap().event.id, number as u64);
        }
        assert_eq!(asleep.try_recv().unwrap_err(), TryRecvError::Lagged(10));
        let recent = events.recent();
        assert_eq!(recent.len(), KEPT);
        let last = recent.last().unwrap();
        let read: HostEvent = serde_json::from_str(&last.json).unwrap();
        assert_eq!(read, last.event);
        // Of a worker before this one, and of this one.
        assert_eq!(events.watch(Some(u64::MAX)).0.len(), KEPT);
        assert_eq!(events.watch(Some(last.event.id - 3)).0.len(), 3);
    }

    #[test]
    fn messages_are_short_lines() {
        assert_eq!(one_line("ü".repeat(400)).len(), MESSAGE_BYTES);
        assert_eq!(
            one_line("x".repeat(MESSAGE_BYTES - 1) + "üü").len(),
            MESSAGE_BYTES - 1
        );
    }
}
