//! `forelay events`: what happened on this host, and what happens.

use anyhow::{Result, bail};

use super::output;
use crate::api::HostEvent;
use crate::client::Client;

/// `forelay events`.
pub async fn run(client: &Client, follow: bool, json: bool) -> Result<()> {
    if !follow {
        let recent: Vec<HostEvent> = client.get("/v1/events/recent").await?;
        if json {
            return output::json(&recent);
        }
        if recent.is_empty() {
            say!("nothing has happened since the daemon's worker started");
        }
        recent.iter().for_each(print);
        return Ok(());
    }
    let mut stream = client.stream("/v1/events?after=0").await?;
    while let Some((kind, data)) = stream.next().await? {
        if kind == "dropped" {
            bail!("{data}");
        }
        if json {
            say!("{data}");
        } else {
            print(&serde_json::from_str(&data)?);
        }
    }
    bail!("the daemon's worker has ended")
}

fn print(event: &HostEvent) {
    let bytes = event
        .bytes
        .map(|bytes| format!(" ({})", output::bytes(bytes)));
    say!(
        "{}  {:15} {}{}{}",
        time_of_day(event.at_ms),
        event.kind.name(),
        event
            .vm
            .as_ref()
            .map(|vm| format!("{vm}: "))
            .unwrap_or_default(),
        event.message.replace('\n', " "),
        bytes.unwrap_or_default(),
    );
}

/// The time of day in UTC.
fn time_of_day(at_ms: i64) -> String {
    let ms = at_ms.rem_euclid(86_400_000);
    let (s, ms) = (ms / 1000, ms % 1000);
    format!("{:02}:{:02}:{:02}.{ms:03}Z", s / 3600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_day_is_utc() {
        assert_eq!(time_of_day(1_700_000_000_123), "22:13:20.123Z");
        assert_eq!(time_of_day(-1), "23:59:59.999Z");
    }
}
