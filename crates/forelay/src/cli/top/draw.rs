//! A frame of `forelay top`: what was seen, in as many rows and columns as there is room for.
//!
//! Refuses to know the terminal. Colours are the terminal's own, and nothing is told by colour
//! alone. Names and messages come from guests and repositories: they are made fit to be shown.

use forelay_image::printable;
use ratatui::Frame;
use ratatui::crossterm::event::KeyCode;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table};

use super::seen::{Expected, SeenHost};
use crate::api::{ComponentMemory, HostEvent, Vm};
use crate::cli::output::{bytes, optional, seconds};

/// What is shown, by the key that shows it.
const VIEWS: [(char, &str); 5] = [
    ('1', "overview"),
    ('2', "VMs"),
    ('3', "components"),
    ('4', "forecast"),
    ('5', "events"),
];
/// Least width of a first column, which takes what is left.
const LEAST_NAME: u16 = 14;
/// Characters of a bar.
const BAR: u64 = 12;

/// What somebody looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// Which of the views.
    view: usize,
    /// Rows that are above the first shown.
    above: usize,
}

impl Sight {
    /// A key was pressed.
    pub fn press(&mut self, key: KeyCode) {
        let view = match key {
            KeyCode::Tab | KeyCode::Right => Some((self.view + 1) % VIEWS.len()),
            KeyCode::BackTab | KeyCode::Left => Some((self.view + VIEWS.len() - 1) % VIEWS.len()),
            KeyCode::Char(pressed) => VIEWS.iter().position(|(key, _)| *key == pressed),
            _ => None,
        };
        if let Some(view) = view {
            *self = Self { view, above: 0 };
        }
        self.above = match key {
            KeyCode::Down | KeyCode::Char('j') => self.above + 1,
            KeyCode::Up | KeyCode::Char('k') => self.above.saturating_sub(1),
            KeyCode::PageDown | KeyCode::Char(' ') => self.above + 10,
            KeyCode::PageUp => self.above.saturating_sub(10),
            KeyCode::Home => 0,
            KeyCode::End => usize::MAX / 2,
            _ => self.above,
        };
    }
}

/// A column: heading, width, whether it ends at its right edge, and what it says.
type TopColumn<'a, T> = (&'a str, u16, bool, &'a dyn Fn(&T) -> String);

/// Draws what was seen.
pub fn frame(frame: &mut Frame, seen: &SeenHost, sight: &mut Sight) {
    let notes = notes(seen);
    let [head, memory, told, rest] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(2),
        Constraint::Length(notes.len() as u16),
        Constraint::Min(0),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(vec![title(seen), tabs(sight)]), head);
    frame.render_widget(Paragraph::new(memory_lines(seen, memory.width)), memory);
    frame.render_widget(Paragraph::new(notes), told);
    let above = &mut sight.above;
    match sight.view {
        1 => vms(frame, rest, seen, above),
        2 => components(frame, rest, seen, above),
        3 => forecast(frame, rest, seen, above),
        4 => events(frame, rest, seen, above),
        _ => overview(frame, rest, seen),
    }
}

fn overview(frame: &mut Frame, area: Rect, seen: &SeenHost) {
    // What there is little of leaves its room to the others.
    let wanted = |rows: usize| rows.max(1) as u16 + 3;
    let most = area.height / 4;
    let expected = wanted(seen.expected.len()).min(most);
    let components = wanted(seen.components().len()).min(most * 3 / 2);
    let told = wanted(seen.events.len()).min(most);
    let others = components + expected + told;
    let vms = wanted(seen.vms.len()).min(area.height.saturating_sub(others).max(4));
    let [first, second, third, last] = Layout::vertical([
        Constraint::Length(vms),
        Constraint::Length(components),
        Constraint::Length(expected),
        Constraint::Min(0),
    ])
    .areas(area);
    self::vms(frame, first, seen, &mut 0);
    self::components(frame, second, seen, &mut 0);
    forecast(frame, third, seen, &mut 0);
    events(frame, last, seen, &mut 0);
}

fn title(seen: &SeenHost) -> Line<'static> {
    let live = seen.vms.iter().filter(|vm| vm.state.is_live()).count();
    let mut words = vec![format!("{live} VM{}", if live == 1 { "" } else { "s" })];
    if let Some(health) = &seen.health {
        words.push(format!("up {}", seconds(health.uptime_s)));
        words.push(printable(&health.accelerator));
    }
    if let Some(memory) = &seen.memory {
        words.push(format!("memory {}", printable(&memory.pressure)));
    }
    Line::from(vec![
        Span::styled("Forelay  ", Style::new().add_modifier(Modifier::BOLD)),
        Span::raw(words.join(" · ")),
    ])
}

fn tabs(sight: &Sight) -> Line<'static> {
    let mut spans = Vec::new();
    for (at, (key, name)) in VIEWS.iter().enumerate() {
        let style = match at == sight.view {
            true => Style::new().add_modifier(Modifier::REVERSED),
            false => soft(),
        };
        spans.push(Span::styled(format!(" {key} {name} "), style));
    }
    spans.push(Span::styled("  q quit", soft()));
    Line::from(spans)
}

fn soft() -> Style {
    Style::new().add_modifier(Modifier::DIM)
}

fn memory_lines(seen: &SeenHost, width: u16) -> Vec<Line<'static>> {
    let Some(memory) = &seen.memory else {
        return Vec::new();
    };
    let saved = memory.mapped_sum_bytes.saturating_sub(memory.charged_bytes);
    let words = format!(
        "components {} of {}, {} pinned · sharing saves {} · host has {}",
        bytes(memory.resident_bytes),
        bytes(memory.budget_bytes),
        bytes(memory.pinned_bytes),
        bytes(saved),
        bytes(memory.available_bytes)
    );
    let line = Line::from(vec![
        Span::styled(
            bar(memory.resident_bytes, memory.budget_bytes),
            Style::new().fg(Color::Green),
        ),
        Span::raw(format!(
            "  {}",
            cut(&words, usize::from(width).saturating_sub(14))
        )),
    ]);
    vec![Line::default(), line]
}

/// What there is to worry about, a line each.
fn notes(seen: &SeenHost) -> Vec<Line<'static>> {
    let mut notes = Vec::new();
    if let Some(problem) = &seen.problem {
        notes.push(format!("! {problem}; asking again"));
    }
    let degraded = seen.health.iter().flat_map(|health| &health.degraded);
    notes.extend(degraded.map(|one| format!("! without {}: {}", one.what, one.problem)));
    let waiting = seen.vms.iter().filter_map(|vm| {
        let wait = vm.waiting.as_ref()?;
        Some(format!("! {} {wait}", vm.name))
    });
    notes.extend(waiting);
    if seen.withheld {
        let words = "memory and events are for those who act for all owners; these are yours";
        notes.push(words.to_owned());
    }
    let style = Style::new().fg(Color::Yellow);
    let lines = notes.into_iter().take(6);
    lines
        .map(|note| Line::styled(printable(&note), style))
        .collect()
}

fn vms(frame: &mut Frame, area: Rect, seen: &SeenHost, above: &mut usize) {
    let account = |vm: &Vm, of: fn(&crate::api::VmMemory) -> u64| {
        let mut accounts = seen.memory.iter().flat_map(|memory| &memory.vms);
        let account = accounts.find(|account| account.vm == vm.name);
        optional(account.map(of), bytes)
    };
    let share = |vm: &Vm| account(vm, |account| account.charged_bytes);
    let touched = |vm: &Vm| account(vm, |account| account.mapped_bytes);
    let columns: [TopColumn<Vm>; 9] = [
        ("VM", 0, false, &|vm| vm.name.clone()),
        ("STATE", 11, false, &state),
        ("READY", 9, true, &|vm| optional(vm.launch.ready_s, seconds)),
        ("WAITS", 6, true, &|vm| vm.waits.demand_fetches.to_string()),
        ("SHARE", 10, true, &share),
        ("STALL", 9, true, &|vm| seconds(vm.waits.stall_s)),
        ("TOUCHED", 10, true, &touched),
        ("PORTS", 14, false, &ports),
        ("PROFILE", 14, false, &|vm| vm.profile.clone()),
    ];
    let none = "no VM runs: `forelay run web.toml --detach` starts one";
    list(
        frame,
        area,
        ("VMs", none),
        &seen.vms.iter().collect::<Vec<_>>(),
        &columns,
        above,
    );
}

fn state(vm: &Vm) -> String {
    let waits = if vm.waiting.is_some() {
        "waiting"
    } else {
        vm.state.name()
    };
    waits.to_owned()
}

fn ports(vm: &Vm) -> String {
    let ports = vm
        .forwards
        .iter()
        .map(|one| format!("{}:{}", one.host, one.guest));
    ports.collect::<Vec<_>>().join(" ")
}

fn components(frame: &mut Frame, area: Rect, seen: &SeenHost, above: &mut usize) {
    let columns: [TopColumn<ComponentMemory>; 7] = [
        ("COMPONENT", 0, false, &|one| match one.snapshot {
            true => format!("{} (snapshot)", one.component),
            false => one.component.clone(),
        }),
        ("IN MEMORY", BAR as u16, false, &|one| {
            bar(one.resident_bytes, one.image_bytes)
        }),
        ("RESIDENT", 10, true, &|one| bytes(one.resident_bytes)),
        ("VMS", 4, true, &|one| one.mapped_by.to_string()),
        ("SIZE", 10, true, &|one| bytes(one.image_bytes)),
        ("SHARED", 10, true, &|one| bytes(one.shared_bytes)),
        ("PINNED", 10, true, &|one| bytes(one.pinned_bytes)),
    ];
    let none = "nothing is in shared memory";
    list(
        frame,
        area,
        ("components", none),
        &seen.components(),
        &columns,
        above,
    );
}

fn forecast(frame: &mut Frame, area: Rect, seen: &SeenHost, above: &mut usize) {
    let columns: [TopColumn<Expected>; 6] = [
        ("EXPECTED", 0, false, &|one| match &one.vm {
            Some(vm) => format!("more for {vm}"),
            None => format!("launch of {}", one.profile),
        }),
        ("CHANCE", 7, true, &|one| {
            format!("{:.0} %", one.probability * 100.0)
        }),
        ("IN", 13, true, &|one| optional(one.in_s, seconds)),
        ("LOADED", 10, true, &|one| bytes(one.resident_bytes)),
        ("OF", 10, true, &|one| bytes(one.bytes)),
        ("WHY", 40, false, &|one| one.why.clone()),
    ];
    let none = "nothing in particular";
    let rows: Vec<&Expected> = seen.expected.iter().collect();
    list(frame, area, ("expected next", none), &rows, &columns, above);
}

fn events(frame: &mut Frame, area: Rect, seen: &SeenHost, above: &mut usize) {
    let columns: [TopColumn<HostEvent>; 3] = [
        ("WHAT HAPPENED", 0, false, &|one| match &one.vm {
            Some(vm) => format!("{vm}: {}", one.message),
            None => one.message.clone(),
        }),
        ("KIND", 15, false, &|one| one.kind.name().to_owned()),
        ("UTC", 8, true, &|one| crate::units::time_of_day(one.at_ms)),
    ];
    let rows: Vec<&HostEvent> = seen.events.iter().collect();
    list(
        frame,
        area,
        ("events", "nothing yet"),
        &rows,
        &columns,
        above,
    );
}

/// A list with a heading of its columns, those for which there is room; the first takes what is
/// left.
fn list<T>(
    frame: &mut Frame,
    area: Rect,
    (name, none): (&str, &str),
    rows: &[&T],
    columns: &[TopColumn<T>],
    above: &mut usize,
) {
    if area.height < 3 {
        return;
    }
    let area = Rect {
        y: area.y + 1,
        height: area.height - 1,
        ..area
    };
    if rows.is_empty() {
        let line = Line::styled(format!("{name}: {none}"), soft());
        frame.render_widget(Paragraph::new(line), area);
        return;
    }
    let shown = fitting(columns, area.width);
    let room = usize::from(area.height) - 1;
    *above = (*above).min(rows.len().saturating_sub(room));
    let cell = |text: String, right: bool| {
        let line = Line::raw(text);
        Cell::from(if right { line.right_aligned() } else { line })
    };
    let lines = rows.iter().skip(*above).take(room).map(|row| {
        let cells = shown
            .iter()
            .map(|(.., right, say)| cell(printable(&say(row)), *right));
        Row::new(cells.collect::<Vec<_>>())
    });
    let head = shown
        .iter()
        .enumerate()
        .map(|(at, (heading, _, right, _))| {
            let hidden = rows.len() - room.min(rows.len());
            let more = match at == 0 && hidden > 0 {
                true => format!("{heading} ({}, {hidden} not shown)", rows.len()),
                false => (*heading).to_owned(),
            };
            cell(more, *right)
        });
    let head = Row::new(head.collect::<Vec<_>>()).style(soft());
    let widths = shown.iter().map(|(_, width, ..)| match width {
        0 => Constraint::Min(LEAST_NAME),
        width => Constraint::Length(*width),
    });
    let table = Table::new(lines, widths.collect::<Vec<_>>());
    frame.render_widget(table.header(head).column_spacing(2), area);
}

/// The columns for which there is room, in their order.
fn fitting<'a, 'b, T>(columns: &'b [TopColumn<'a, T>], width: u16) -> Vec<&'b TopColumn<'a, T>> {
    let mut left = width.saturating_sub(LEAST_NAME);
    let mut shown = Vec::new();
    for column in columns {
        let wants = match column.1 {
            0 => 0,
            width => width + 2,
        };
        if wants > left {
            break;
        }
        left -= wants;
        shown.push(column);
    }
    shown
}

fn bar(part: u64, whole: u64) -> String {
    let filled = (part * BAR).div_ceil(whole.max(1)).min(BAR) as usize;
    format!(
        "{}{}",
        "█".repeat(filled),
        "░".repeat(BAR as usize - filled)
    )
}

fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!(
            "{}…",
            &text[..text.floor_char_boundary(at.saturating_sub(1))]
        ),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::api::{EventKind, MemoryReport};

    fn shown(seen: &SeenHost, sight: &mut Sight, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|one| frame(one, seen, sight)).unwrap();
        let cells = terminal.backend().buffer().content();
        let rows = cells.chunks(usize::from(width));
        rows.map(|row| row.iter().map(ratatui::buffer::Cell::symbol).collect())
            .collect()
    }

    fn seen() -> SeenHost {
        let event = |id: u64| HostEvent {
            id,
            at_ms: 1_700_000_000_000,
            kind: EventKind::Evicting,
            vm: None,
            profile: None,
            message: format!("happening {id} \u{1b}[2Jand more"),
            bytes: None,
            seconds: None,
        };
        SeenHost {
            events: (0..100).map(event).collect(),
            memory: Some(MemoryReport {
                budget_bytes: 100 << 20,
                resident_bytes: 50 << 20,
                pressure: "plenty".to_owned(),
                ..MemoryReport::default()
            }),
            ..SeenHost::default()
        }
    }

    #[test]
    fn any_size_is_drawn_and_nothing_reaches_the_terminal_as_a_command() {
        let seen = seen();
        for view in 0..VIEWS.len() {
            for (width, height) in [(1, 1), (9, 3), (20, 7), (80, 24), (300, 90)] {
                let mut sight = Sight { view, above: 0 };
                let lines = shown(&seen, &mut sight, width, height);
                assert!(
                    lines.iter().all(|line| !line.contains('\u{1b}')),
                    "{lines:?}"
                );
            }
        }
        let lines = shown(&seen, &mut Sight::default(), 100, 30);
        assert!(
            lines[0].starts_with("Forelay  0 VMs · memory plenty"),
            "{lines:?}"
        );
        assert!(lines[3].starts_with("██████░░░░░░  components 50.0 MiB of 100.0 MiB"));
        assert!(
            lines
                .iter()
                .any(|line| line.contains("forelay run web.toml"))
        );
        assert!(
            lines
                .iter()
                .any(|line| line.contains("happening 0 \\u{1b}[2J"))
        );
    }

    #[test]
    fn keys_choose_what_is_seen_and_lists_end_where_they_end() {
        let seen = seen();
        let mut sight = Sight::default();
        sight.press(KeyCode::Char('5'));
        let lines = shown(&seen, &mut sight, 80, 24);
        assert!(lines[5].starts_with("WHAT HAPPENED (100, "), "{lines:?}");
        sight.press(KeyCode::End);
        let lines = shown(&seen, &mut sight, 80, 24);
        assert!(lines[23].contains("happening 99 "), "{lines:?}");
        sight.press(KeyCode::Up);
        assert!(shown(&seen, &mut sight, 80, 24)[23].contains("happening 98 "));
        sight.press(KeyCode::Tab);
        assert_eq!(sight, Sight::default());
    }

    #[test]
    fn what_is_unknown_is_asked_for_no_longer_and_told() {
        let seen = SeenHost {
            withheld: true,
            problem: Some("no daemon answers".to_owned()),
            ..SeenHost::default()
        };
        let lines = shown(&seen, &mut Sight::default(), 80, 24).join("\n");
        assert!(
            lines.contains("! no daemon answers; asking again"),
            "{lines}"
        );
        assert!(lines.contains("those who act for all owners"), "{lines}");
    }
}
