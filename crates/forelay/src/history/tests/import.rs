//! Traces from CSV, small and large.

use forelay_sim::launch_rows::OnBadRow;

use super::*;

#[tokio::test]
async fn csv_imports_once_and_reports_bad_rows_by_line() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let file = "time_s,profile,owner,duration_s\n\
        4.046,app-1,user-1,69.5\n\
        5,app-1,user-1,\n\
        5,app-1,user-1,\n\
        oops,app-1,user-1,3\n\
        \n\
        6,,user-1,3\n\
        3,\"a,\"\"b\",user-2,0\n\
        7,app-2\n";
    let import = async |text: &str, on_bad_row| {
        let options = ImportOptions {
            origin: Timestamp(DAY_MS),
            on_bad_row,
        };
        import_csv(&history, text.as_bytes(), options).await
    };
    let report = import(file, OnBadRow::Skip).await.unwrap();
    assert_eq!((report.rows, report.bad_rows), (7, 3));
    let lines: Vec<u64> = report.bad.iter().map(|b| b.line).collect();
    assert_eq!(lines, [5, 7, 9]);
    assert_eq!(report.appended.stored, 4 + 2, "four launches, two stops");
    let longer = format!("{file}9,app-9,user-1,\n");
    let report = import(&longer, OnBadRow::Skip).await.unwrap();
    assert_eq!((report.appended.stored, report.appended.duplicates), (1, 6));
    let names: Vec<String> = history
        .profiles()
        .await
        .unwrap()
        .into_iter()
        .map(|p| p.of.profile)
        .collect();
    assert_eq!(names, ["app-1", "app-9", "a,\"b"]);
    let stopped = import(file, OnBadRow::Stop).await.err().unwrap();
    assert!(
        matches!(stopped, HistoryError::BadRow { line: 5, .. }),
        "{stopped}"
    );
    let counts = "Profile,OWNER,Time_S,count\ng,o,1,\nf,o,60,3\n";
    import(counts, OnBadRow::Stop).await.unwrap();
    let latest = history.launches(Some("f"), 1).await.unwrap();
    assert_eq!(
        (latest[0].count, latest[0].at),
        (3, Timestamp(DAY_MS + 60_000))
    );
    assert!(import("a,b,c\n", OnBadRow::Skip).await.is_err());
    assert!(import("", OnBadRow::Skip).await.is_err());
}

#[tokio::test]
async fn what_launches_consist_of_is_imported_too() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let file = "time_s,profile,owner,components,attached\n\
        1,web,o,debian|nginx,redis\n\
        2,web,o,debian|nginx,\n\
        3,ci,o,,\n";
    let options = ImportOptions {
        origin: Timestamp(DAY_MS),
        on_bad_row: OnBadRow::Stop,
    };
    for stored in [4, 0] {
        let report = import_csv(&history, file.as_bytes(), options).await;
        assert_eq!(report.unwrap().appended.stored, stored);
    }
    let notes = replay(&history).await;
    let sets: Vec<&[String]> = notes.vms.iter().map(|(_, names)| &names[..]).collect();
    assert_eq!(sets[0], ["debian", "nginx", "redis"]);
    assert_eq!(sets[1], ["debian", "nginx"]);
    assert!(sets.get(2).is_none_or(|none| none.is_empty()), "{sets:?}");
}

/// A trace of so many launches, made as it is read.
struct Lines {
    rows: u64,
    next: u64,
    line: Vec<u8>,
    at: usize,
}

impl Lines {
    fn new(rows: u64) -> std::io::BufReader<Self> {
        let lines = Self {
            rows,
            next: 0,
            line: Vec::new(),
            at: 0,
        };
        std::io::BufReader::with_capacity(1 << 20, lines)
    }
}

impl std::io::Read for Lines {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.line.len() {
            self.at = 0;
            let i = self.next;
            self.next += 1;
            self.line = match i {
                0 => b"time_s,profile,owner,duration_s\n".to_vec(),
                _ if i <= self.rows => {
                    let profile = i * 7919 % 10_000;
                    format!("{}.5,app-{profile},user-{},\n", i / 100, profile % 500).into()
                }
                _ => Vec::new(),
            };
        }
        let n = out.len().min(self.line.len() - self.at);
        out[..n].copy_from_slice(&self.line[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

/// How many events the large import has, unless the environment variable
/// `FORELAY_IMPORT_EVENTS` says another number; ten million take minutes.
const LARGE_IMPORT: u64 = 100_000;

#[tokio::test]
async fn many_events_of_ten_thousand_profiles_are_imported_in_few_bytes_each() {
    let asked = std::env::var("FORELAY_IMPORT_EVENTS");
    let rows = asked.map_or(LARGE_IMPORT, |rows| rows.parse().unwrap());
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let options = ImportOptions {
        origin: Timestamp(0),
        on_bad_row: OnBadRow::Stop,
    };
    let started = std::time::Instant::now();
    let report = import_csv(&history, Lines::new(rows), options)
        .await
        .unwrap();
    let peak = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = peak.lines().find(|l| l.starts_with("VmHWM"));
    let size = size(&history).await;
    println!(
        "{:?} in {:?}; {}; {size:?}",
        report.appended,
        started.elapsed(),
        peak.unwrap_or("")
    );
    assert_eq!((report.appended.stored, report.bad_rows), (rows, 0));
    assert_eq!((size.raw_events, size.profiles), (rows, rows.min(10_000)));
    assert!(size.bytes < rows * 64, "{size:?}");
}
