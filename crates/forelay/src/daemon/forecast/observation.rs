//! Observation of running VMs: what each has touched, what of that no model has learned yet, and
//! the background tasks that wait for the windows after which it is learned.
//!
//! ```text
//! launch --- window ---> the launch's touches are learned
//!   attach --- window ---> touches of the attached component are learned, and with them, counted
//!                          to the launch, those of the VM's other images meanwhile
//! ```
//! Owns the division of touches between launch and attachments; refuses to know how touches are
//! found and where they are learned.
//!
//! Invariants: a touch is learned once, or, if it falls into no window, not at all; an orderly
//! shutdown flushes the buffers first ([`LearningTasks::finish`]).

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use forelay_image::{Digest, Touch};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// A component that a VM was given while it ran.
#[derive(Clone, Copy, Debug)]
struct Attached {
    since_launch_ms: u32,
    learned: bool,
}

/// Touches of one VM.
#[derive(Debug, Default)]
pub struct TouchBuffer {
    /// All of them, in first-touch order.
    touches: Vec<Touch>,
    /// Those that no model has learned yet and that a window is open for.
    unlearned: Vec<usize>,
    launch_learned: bool,
    attached: BTreeMap<Digest, Attached>,
}

/// The touches that belong to an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachTouches {
    /// Touches of the attached component, with the time since the attach.
    pub own: Vec<Touch>,
    /// Touches of the VM's other images since then, with the time since each image was there.
    pub others: Vec<Touch>,
}

impl TouchBuffer {
    /// For a VM whose launch an earlier daemon has learned.
    pub fn of_reattached() -> Self {
        Self {
            launch_learned: true,
            ..Self::default()
        }
    }

    /// Adds touches, with the time since the launch.
    pub fn note(&mut self, touches: impl Iterator<Item = Touch>) {
        let before = self.touches.len();
        self.touches.extend(touches);
        if self.is_waited_for() {
            self.unlearned.extend(before..self.touches.len());
        }
    }

    /// All touches since the VM is watched, in first-touch order.
    pub fn touches(&self) -> &[Touch] {
        &self.touches
    }

    /// Whether any window is still open.
    fn is_waited_for(&self) -> bool {
        !self.launch_learned || self.attached.values().any(|one| !one.learned)
    }

    /// The VM was just given an image.
    pub fn attached(&mut self, image: Digest, since_launch_ms: u32) {
        let attached = Attached {
            since_launch_ms,
            learned: false,
        };
        self.attached.insert(image, attached);
    }

    /// The launch's touches of `images`, in first-touch order.
    pub fn take_launch(&mut self, images: &[Digest]) -> Vec<Touch> {
        self.launch_learned = true;
        let taken = self.take(|touch| images.contains(&touch.image));
        self.forget();
        taken
    }

    /// The touches of the attachment of `image`, in first-touch order; `None` if they were taken
    /// before.
    pub fn take_attached(&mut self, image: &Digest) -> Option<AttachTouches> {
        let attached = self.attached.get_mut(image).filter(|one| !one.learned)?;
        attached.learned = true;
        let from_ms = attached.since_launch_ms;
        let known = self.attached.clone();
        let launch_learned = self.launch_learned;
        let own = self.take(|touch| touch.image == *image);
        let others = self.take(|touch| {
            let ready = match known.get(&touch.image) {
                Some(other) => other.learned,
                None => launch_learned,
            };
            ready && touch.first_touch_ms >= from_ms
        });
        self.forget();
        let since = |touch: Touch| {
            let there = known.get(&touch.image);
            let from_ms = there.map_or(0, |one| one.since_launch_ms);
            Touch {
                first_touch_ms: touch.first_touch_ms.saturating_sub(from_ms),
                ..touch
            }
        };
        Some(AttachTouches {
            own: own.into_iter().map(since).collect(),
            others: others.into_iter().map(since).collect(),
        })
    }

    /// Drops touches that belong to no open window.
    fn forget(&mut self) {
        if !self.is_waited_for() {
            self.unlearned = Vec::new();
        }
    }

    fn take(&mut self, wanted: impl Fn(&Touch) -> bool) -> Vec<Touch> {
        let touches = &self.touches;
        let taken = self.unlearned.extract_if(.., |one| wanted(&touches[*one]));
        taken.map(|one| touches[one]).collect()
    }
}

/// Background tasks, each of which learns when its window has passed or at shutdown.
#[derive(Debug, Default)]
pub struct LearningTasks {
    tasks: Mutex<JoinSet<()>>,
    shutting_down: watch::Sender<bool>,
}

impl LearningTasks {
    /// Runs a task that learns, at the latest when [`LearningTasks::shutdown`] returns.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Returns when the daemon is about to end.
    pub async fn shutdown(&self) {
        // The sender is ours: it is there as long as we are.
        let _ = self
            .shutting_down
            .subscribe()
            .wait_for(|begun| *begun)
            .await;
    }

    /// Flushes pending observations; false on timeout.
    pub async fn finish(&self, bound: Duration) -> bool {
        self.shutting_down.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        let all = async { while tasks.join_next().await.is_some() {} };
        tokio::time::timeout(bound, all).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use forelay_image::Extent;

    use super::*;

    fn image(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn touch(name: &str, page: u64, ms: u32) -> Touch {
        Touch {
            image: image(name),
            extent: Extent::new(page * 4096, 4096),
            first_touch_ms: ms,
        }
    }

    #[test]
    fn each_touch_belongs_to_one_window() {
        let mut buffer = TouchBuffer::default();
        buffer.note([touch("base", 1, 10)].into_iter());
        // Attached before the launch's window has passed: the launch has the base's pages.
        buffer.attached(image("tool"), 100);
        buffer.note([touch("tool", 1, 120), touch("base", 2, 130)].into_iter());
        assert_eq!(
            buffer.take_launch(&[image("base")]),
            [touch("base", 1, 10), touch("base", 2, 130)]
        );
        buffer.note([touch("base", 3, 140), touch("tool", 2, 150)].into_iter());
        buffer.attached(image("other"), 200);
        buffer.note([touch("base", 4, 210), touch("other", 1, 220)].into_iter());
        let tool = AttachTouches {
            own: vec![touch("tool", 1, 20), touch("tool", 2, 50)],
            others: vec![touch("base", 3, 140), touch("base", 4, 210)],
        };
        assert_eq!(buffer.take_attached(&image("tool")), Some(tool));
        assert_eq!(buffer.take_attached(&image("tool")), None, "once");
        buffer.note([touch("tool", 3, 230)].into_iter());
        let other = AttachTouches {
            own: vec![touch("other", 1, 20)],
            others: vec![touch("tool", 3, 130)],
        };
        assert_eq!(buffer.take_attached(&image("other")), Some(other));
        // Nobody waits: nothing is kept.
        buffer.note([touch("base", 5, 300)].into_iter());
        assert!(buffer.unlearned.is_empty());
        assert_eq!(buffer.touches().len(), 9, "all of them stay known");
        buffer.attached(image("late"), 400);
        let late = buffer.take_attached(&image("late")).unwrap();
        assert!(late.own.is_empty() && late.others.is_empty());
    }

    #[test]
    fn what_lies_between_the_windows_is_not_learned() {
        let mut buffer = TouchBuffer::of_reattached();
        buffer.note([touch("base", 1, 10)].into_iter());
        buffer.attached(image("tool"), 100);
        buffer.note([touch("base", 2, 90), touch("base", 3, 100)].into_iter());
        let touches = buffer.take_attached(&image("tool")).unwrap();
        assert_eq!(touches.others, [touch("base", 3, 100)]);
    }

    #[test]
    fn until_the_launch_is_learned_its_images_are_the_launchs() {
        let mut buffer = TouchBuffer::default();
        buffer.attached(image("tool"), 100);
        buffer.note([touch("base", 1, 110), touch("tool", 1, 120)].into_iter());
        let touches = buffer.take_attached(&image("tool")).unwrap();
        assert_eq!((touches.own.len(), touches.others.len()), (1, 0));
        assert_eq!(
            buffer.take_launch(&[image("base")]),
            [touch("base", 1, 110)]
        );
    }

    #[tokio::test]
    async fn what_waits_is_learned_at_the_end_and_what_hangs_is_left() {
        let tasks = Arc::new(LearningTasks::default());
        let learned = Arc::new(Mutex::new(0));
        for _ in 0..3 {
            let (waiting, count) = (Arc::clone(&tasks), Arc::clone(&learned));
            tasks.spawn(async move {
                waiting.shutdown().await;
                tokio::task::yield_now().await;
                *count.lock() += 1;
            });
        }
        tokio::task::yield_now().await;
        assert_eq!(*learned.lock(), 0);
        assert!(tasks.finish(Duration::from_secs(60)).await);
        assert_eq!(*learned.lock(), 3);
        tasks.spawn(std::future::pending());
        assert!(!tasks.finish(Duration::from_millis(10)).await);
    }
}
