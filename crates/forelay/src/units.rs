//! Sizes and times in words, for people.

/// `1536` as `1.5 KiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// `0.0123` as `12.3 ms`, `75` as `1 min 15 s`.
pub fn seconds(value: f64) -> String {
    match value {
        v if v < 0.001 => format!("{:.0} us", v * 1e6),
        v if v < 1.0 => format!("{:.1} ms", v * 1e3),
        v if v < 60.0 => format!("{v:.2} s"),
        v if v < 3600.0 && v % 60.0 < 0.5 => format!("{:.0} min", (v / 60.0).floor()),
        v if v < 3600.0 => format!("{:.0} min {:.0} s", (v / 60.0).floor(), v % 60.0),
        v => format!(
            "{:.0} h {:.0} min",
            (v / 3600.0).floor(),
            (v % 3600.0) / 60.0
        ),
    }
}

/// The time of day in UTC.
pub fn time_of_day(at_ms: i64) -> String {
    let s = at_ms.rem_euclid(86_400_000) / 1000;
    format!("{:02}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_read_well() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(5 << 30), "5.0 GiB");
        assert_eq!(seconds(0.0123), "12.3 ms");
        assert_eq!(seconds(75.0), "1 min 15 s");
        assert_eq!(seconds(600.0), "10 min");
        assert_eq!(seconds(7260.0), "2 h 1 min");
        assert_eq!(time_of_day(1_700_000_000_123), "22:13:20");
        assert_eq!(time_of_day(-1), "23:59:59");
    }
}
