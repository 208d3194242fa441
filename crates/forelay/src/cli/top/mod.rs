//! `forelay top`: what runs on this host, at a terminal.
//!
//! Owns the terminal while it is watched: it is given back as it was, also after an error, a
//! panic or SIGTERM. What is seen is asked for on a task of its own ([`seen`]), so that a daemon
//! that is slow, or away, holds up no key; [`draw`] makes a frame of it.

mod draw;
mod seen;

use std::io::IsTerminal as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::{DefaultTerminal, Terminal};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::output;
use crate::client::Client;
use draw::Sight;
use seen::SeenHost;

/// How often the daemon is asked.
const EVERY: Duration = Duration::from_secs(2);
/// Every so many times also for forecasts, which take it longer.
const FORECAST_EVERY: u32 = 5;
/// Size of a frame that is printed, unless `COLUMNS` and `LINES` say another.
const PRINTED: (u16, u16) = (100, 40);
/// Largest size of one.
const LARGEST: u16 = 500;

/// `forelay top`.
pub async fn run(client: &Client, once: bool) -> Result<()> {
    if once {
        return print(client).await;
    }
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        bail!("this is no terminal: `forelay top --once` prints what there is to see");
    }
    // Before the screen is taken: an error now is read where it belongs.
    let seen = SeenHost::now(client).await?;
    let mut terminal = ratatui::try_init().context("cannot take the terminal")?;
    let watched = follow(&mut terminal, client, seen).await;
    let restored = ratatui::try_restore();
    watched?;
    restored.context("cannot give the terminal back: `reset` does")
}

/// Prints one frame.
async fn print(client: &Client) -> Result<()> {
    let size = |name: &str, usual| {
        let given = std::env::var(name).ok().and_then(|text| text.parse().ok());
        given
            .filter(|size| (20..=LARGEST).contains(size))
            .unwrap_or(usual)
    };
    let (width, height) = (size("COLUMNS", PRINTED.0), size("LINES", PRINTED.1));
    let seen = SeenHost::now(client).await?;
    let mut terminal = Terminal::new(TestBackend::new(width, height))?;
    terminal.draw(|frame| draw::frame(frame, &seen, &mut Sight::default()))?;
    let cells = terminal.backend().buffer().content();
    let lines = cells.chunks(usize::from(width)).map(|row| {
        let line: String = row.iter().map(ratatui::buffer::Cell::symbol).collect();
        line.trim_end().to_owned()
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    output::line(text.trim_end());
    Ok(())
}

async fn follow(terminal: &mut DefaultTerminal, client: &Client, seen: SeenHost) -> Result<()> {
    let mut ends = [
        signal(SignalKind::terminate())?,
        signal(SignalKind::hangup())?,
        signal(SignalKind::interrupt())?,
    ];
    let [terminate, hangup, interrupt] = &mut ends;
    let (told, mut sees) = watch::channel(seen);
    let asking = tokio::spawn(ask(client.clone(), told));
    let mut keys = keys();
    let mut sight = Sight::default();
    loop {
        let seen = sees.borrow_and_update().clone();
        terminal.draw(|frame| draw::frame(frame, &seen, &mut sight))?;
        tokio::select! {
            event = keys.recv() => match event {
                Some(Event::Key(key)) if is_end(key) => break,
                Some(Event::Key(key)) if key.kind != KeyEventKind::Release => sight.press(key.code),
                // A new size: the next frame has it.
                Some(_) => {}
                // The terminal is gone.
                None => break,
            },
            changed = sees.changed() => if changed.is_err() { break },
            _ = terminate.recv() => break,
            _ = hangup.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    asking.abort();
    Ok(())
}

/// Asks the daemon at intervals for as long as somebody listens.
async fn ask(client: Client, told: watch::Sender<SeenHost>) {
    let mut interval = tokio::time::interval(EVERY);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // What there is now was asked for already.
    interval.tick().await;
    for round in 1u32.. {
        interval.tick().await;
        let mut seen = told.borrow().clone();
        seen.look(&client, round.is_multiple_of(FORECAST_EVERY))
            .await;
        if told.send(seen).is_err() {
            return;
        }
    }
}

/// What the terminal says, read on a thread of its own, which ends with the program.
fn keys() -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    });
    receiver
}

fn is_end(key: KeyEvent) -> bool {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Char('q' | 'Q') | KeyCode::Esc => true,
        KeyCode::Char('c' | 'd') => control,
        _ => false,
    }
}
