//! Raw events into their tables: one transaction a batch, many rows a statement.

use forelay_image::{Digest, Touch};
use sqlx::{QueryBuilder, Sqlite, SqliteConnection};

use super::codec::{TouchedImage, encode_touches};
use super::names::Names;
use super::{Appended, Event, SqliteHistory, What};

/// A raw row, ready to insert.
struct RawRow {
    at_ms: i64,
    nonce: i64,
    profile: i64,
    numbers: Vec<Option<i64>>,
    blob: Option<Vec<u8>>,
}

/// The raw tables with their columns after (at_ms, nonce, profile).
const RAW_TABLES: [(&str, &str); 8] = [
    ("launch", "composition, count"),
    ("ready", "vm, mounted_ms, ready_ms"),
    ("stop", "vm, ran_ms"),
    ("attachment", "vm, component"),
    ("touched", "vm, late, data"),
    (
        "sample",
        "vm, since_launch_ms, cpu_ms, memory_bytes, read_bytes, written_bytes, received_bytes, \
         sent_bytes",
    ),
    ("demand_fetch", "vm, component, fetches, bytes, stall_ns"),
    ("prefetch", "vm, component, prefetched_bytes, used_bytes"),
];

/// Numbers beyond what SQLite holds saturate.
fn signed(value: u64) -> Option<i64> {
    Some(i64::try_from(value).unwrap_or(i64::MAX))
}

/// Table and numbers of an event that names no component.
fn plain_row(vm: Option<i64>, what: &What) -> Option<(usize, Vec<Option<i64>>)> {
    Some(match what {
        What::Ready {
            mounted_ms,
            ready_ms,
        } => (1, vec![vm, signed(*mounted_ms), signed(*ready_ms)]),
        What::Stop { ran_ms } => (2, vec![vm, signed(*ran_ms)]),
        What::Sample(s) => {
            let values = [
                s.since_launch_ms,
                s.cpu_ms,
                s.memory_bytes,
                s.read_bytes,
                s.written_bytes,
                s.received_bytes,
                s.sent_bytes,
            ];
            let numbers = std::iter::once(vm).chain(values.map(signed)).collect();
            (5, numbers)
        }
        _ => return None,
    })
}

/// The row of an event, and the index of its table.
async fn raw_row(
    names: &mut Names,
    db: &mut SqliteConnection,
    event: &Event,
) -> Result<(usize, RawRow), sqlx::Error> {
    let mut row = RawRow {
        at_ms: event.id.at.0,
        nonce: event.id.nonce.cast_signed(),
        profile: names.profile(db, &event.of).await?,
        numbers: Vec::new(),
        blob: None,
    };
    let vm = Some(event.vm.cast_signed());
    if let Some((table, numbers)) = plain_row(vm, &event.what) {
        row.numbers = numbers;
        return Ok((table, row));
    }
    let table = match &event.what {
        What::Launch { components, count } => {
            let composition = names.composition(db, components).await?;
            row.numbers = vec![composition, Some(i64::from(*count))];
            0
        }
        What::Attach { component } => {
            let id = names
                .component(db, &component.image, &component.name)
                .await?;
            row.numbers = vec![vm, Some(id)];
            3
        }
        What::Touched { images, touches } => {
            row.numbers = vec![vm, Some(0)];
            row.blob = Some(touched(names, db, images, touches).await?);
            4
        }
        What::TouchedLate { touches } => {
            row.numbers = vec![vm, Some(1)];
            let mut images: Vec<Digest> = touches.iter().map(|touch| touch.image).collect();
            images.sort_unstable();
            images.dedup();
            row.blob = Some(touched(names, db, &images, touches).await?);
            4
        }
        What::DemandFetch {
            image,
            fetches,
            bytes,
            stall_ns,
        } => {
            let id = names.component(db, image, "").await?;
            let (fetches, bytes) = (signed(*fetches), signed(*bytes));
            row.numbers = vec![vm, Some(id), fetches, bytes, signed(*stall_ns)];
            6
        }
        What::Prefetch {
            image,
            prefetched_bytes,
            used_bytes,
        } => {
            let id = names.component(db, image, "").await?;
            row.numbers = vec![vm, Some(id), signed(*prefetched_bytes), signed(*used_bytes)];
            7
        }
        What::Ready { .. } | What::Stop { .. } | What::Sample(_) => unreachable!("plain rows"),
    };
    Ok((table, row))
}

/// The stored form of what was touched of `images`.
async fn touched(
    names: &mut Names,
    db: &mut SqliteConnection,
    images: &[Digest],
    touches: &[Touch],
) -> Result<Vec<u8>, sqlx::Error> {
    let mut lists = Vec::with_capacity(images.len());
    for image in images {
        let component = names.component(db, image, "").await?;
        let extents = touches
            .iter()
            .filter(|touch| touch.image == *image)
            .map(|touch| (touch.extent, touch.first_touch_ms))
            .collect();
        lists.push(TouchedImage { component, extents });
    }
    Ok(encode_touches(&mut lists))
}

/// Inserts rows of one table; rows whose key is there already are left out. Returns how many went
/// in.
async fn insert(
    db: &mut SqliteConnection,
    table: usize,
    rows: &[RawRow],
) -> Result<u64, sqlx::Error> {
    let (name, columns) = RAW_TABLES[table];
    let mut stored = 0;
    for chunk in rows.chunks(256) {
        let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(format!(
            "INSERT OR IGNORE INTO {name} (at_ms, nonce, profile, {columns}) "
        ));
        query.push_values(chunk, |mut tuple, row| {
            tuple
                .push_bind(row.at_ms)
                .push_bind(row.nonce)
                .push_bind(row.profile);
            for number in &row.numbers {
                tuple.push_bind(*number);
            }
            if let Some(blob) = &row.blob {
                tuple.push_bind(blob.clone());
            }
        });
        // Full chunks share one statement; odd remainders are not worth caching.
        let query = query.build().persistent(chunk.len() == 256);
        stored += query.execute(&mut *db).await?.rows_affected();
    }
    Ok(stored)
}

impl SqliteHistory {
    pub(super) async fn append_in_one_transaction(
        &self,
        events: &[Event],
    ) -> Result<Appended, sqlx::Error> {
        let mut names = self.writer.lock().await;
        names.bound();
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let (closed, touched_closed) = Self::closed_before(&mut tx).await?;
        let mut tables: [Vec<RawRow>; RAW_TABLES.len()] = Default::default();
        let mut done = Appended::default();
        for event in events {
            let closed = match event.what {
                What::Touched { .. } | What::TouchedLate { .. } => touched_closed.max(closed),
                _ => closed,
            };
            if event.id.at.0 < closed {
                done.late += 1;
                continue;
            }
            let (table, row) = raw_row(&mut names, &mut tx, event).await?;
            tables[table].push(row);
        }
        for (table, rows) in tables.iter_mut().enumerate() {
            // In order of key a batch appends to the tree instead of jumping about in it.
            rows.sort_by_key(|row| (row.at_ms, row.nonce));
            let stored = insert(&mut tx, table, rows).await?;
            done.stored += stored;
            done.duplicates += rows.len() as u64 - stored;
        }
        let result = tx.commit().await;
        if result.is_err() {
            names.clear();
        }
        result.map(|()| done)
    }
}

/// Names of the raw tables.
pub(super) fn raw_tables() -> impl Iterator<Item = &'static str> {
    RAW_TABLES.iter().map(|(name, _)| *name)
}
