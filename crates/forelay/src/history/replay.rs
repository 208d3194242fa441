//! Giving the history back: rolled-up state first, then every raw event in order of time.
//!
//! Memory is bounded by one day of raw events, whatever the length of the history.

use std::collections::HashMap;

use forelay_image::Digest;
use forelay_predict::resources::Sketch;
use forelay_predict::time::{DAY_MS, Timestamp};
use forelay_predict::working_set::WorkingSet;
use sqlx::{Row, SqliteConnection};

use super::append::raw_tables;
use super::codec::{Times, decode_members};
use super::working_sets::{components, touches_of};
use super::{ComponentRef, ProfileRef, Replayed, ResourceSample, Sink, SqliteHistory};

/// Names behind the ids of the database.
struct Dictionary {
    profiles: HashMap<i64, ProfileRef>,
    components: HashMap<i64, (Digest, String)>,
    compositions: HashMap<i64, Vec<i64>>,
}

impl Dictionary {
    async fn load(db: &mut SqliteConnection) -> Result<Self, sqlx::Error> {
        let mut profiles = HashMap::new();
        for row in sqlx::query("SELECT id, name, owner FROM profile")
            .fetch_all(&mut *db)
            .await?
        {
            let of = ProfileRef {
                profile: row.try_get(1)?,
                owner: row.try_get(2)?,
            };
            profiles.insert(row.try_get(0)?, of);
        }
        let mut compositions = HashMap::new();
        for row in sqlx::query("SELECT id, members FROM composition")
            .fetch_all(&mut *db)
            .await?
        {
            let members: Vec<u8> = row.try_get(1)?;
            compositions.insert(
                row.try_get(0)?,
                decode_members(&members).unwrap_or_default(),
            );
        }
        Ok(Self {
            profiles,
            components: components(db).await?,
            compositions,
        })
    }

    fn members(&self, ids: impl IntoIterator<Item = i64>) -> Vec<ComponentRef> {
        let known = |id| self.components.get(&id);
        ids.into_iter()
            .filter_map(known)
            .map(|(image, name)| ComponentRef {
                name: name.clone(),
                image: *image,
            })
            .collect()
    }
}

impl SqliteHistory {
    pub(super) async fn replay_all(
        &self,
        since: Timestamp,
        sink: &mut (dyn Sink + Send),
    ) -> Result<Replayed, sqlx::Error> {
        // One transaction, so that a concurrent roll-up cannot show an event twice or never.
        let mut tx = self.pool.begin().await?;
        let names = Dictionary::load(&mut tx).await?;
        let mut done = Replayed::default();
        replay_state(&mut tx, &names, sink, &mut done).await?;
        replay_rollups(&mut tx, since, &names, sink, &mut done).await?;
        let mut from = i64::MIN;
        while let Some(oldest) = oldest_raw(&mut tx, from).await? {
            let end = (oldest.div_euclid(DAY_MS) + 1).saturating_mul(DAY_MS);
            let events = raw_events(&mut tx, (from, end), &names).await?;
            for event in events {
                if event.at.0 >= since.0 || !matches!(event.what, Raw::Launch { .. }) {
                    event.deliver(&names, sink, &mut done);
                }
            }
            from = end;
        }
        Ok(done)
    }
}

/// Working sets, compositions and memory sketches.
async fn replay_state(
    db: &mut SqliteConnection,
    names: &Dictionary,
    sink: &mut (dyn Sink + Send),
    done: &mut Replayed,
) -> Result<(), sqlx::Error> {
    for row in sqlx::query("SELECT profile, component, data FROM working_set ORDER BY 1, 2")
        .fetch_all(&mut *db)
        .await?
    {
        let of = names.profiles.get(&row.try_get(0)?);
        let component = names.components.get(&row.try_get(1)?);
        let set = WorkingSet::from_bytes(&row.try_get::<Vec<u8>, _>(2)?);
        match (of, component, set) {
            (Some(of), Some((image, _)), Ok(set)) => {
                sink.working_set(of, *image, set);
                done.working_sets += 1;
            }
            _ => done.unreadable += 1,
        }
    }
    for row in sqlx::query(
        "SELECT profile, composition, uses, last_ms FROM composition_use ORDER BY last_ms, 1, 2",
    )
    .fetch_all(&mut *db)
    .await?
    {
        let of = names.profiles.get(&row.try_get(0)?);
        let members = names.compositions.get(&row.try_get(1)?);
        if let (Some(of), Some(members)) = (of, members) {
            let members = names.members(members.iter().copied());
            let at = Timestamp(row.try_get(3)?);
            sink.composition(of, at, &members, row.try_get::<i64, _>(2)? as f64);
        }
    }
    for row in sqlx::query("SELECT profile, data FROM memory_use ORDER BY 1")
        .fetch_all(&mut *db)
        .await?
    {
        let of = names.profiles.get(&row.try_get(0)?);
        match (of, Sketch::from_bytes(&row.try_get::<Vec<u8>, _>(1)?)) {
            (Some(of), Some(sketch)) => sink.memory_sketch(of, sketch),
            _ => done.unreadable += 1,
        }
    }
    Ok(())
}

/// Launches of rolled-up days and weeks, in order of time.
async fn replay_rollups(
    db: &mut SqliteConnection,
    since: Timestamp,
    names: &Dictionary,
    sink: &mut (dyn Sink + Send),
    done: &mut Replayed,
) -> Result<(), sqlx::Error> {
    let days = sqlx::query("SELECT DISTINCT day FROM rollup WHERE day + days > ? ORDER BY day")
        .bind(since.0.div_euclid(DAY_MS))
        .fetch_all(&mut *db)
        .await?;
    for day in days {
        let day: i64 = day.try_get(0)?;
        let mut launches = Vec::new();
        for row in sqlx::query("SELECT profile, times FROM rollup WHERE day = ?")
            .bind(day)
            .fetch_all(&mut *db)
            .await?
        {
            let profile: i64 = row.try_get(0)?;
            let Some(times) = Times::decode(&row.try_get::<Vec<u8>, _>(1)?) else {
                done.unreadable += 1;
                continue;
            };
            for (ms, count) in times.at {
                // The middle of a bin is the best guess of when in it.
                let at = day * DAY_MS + ms + times.resolution_ms / 2;
                launches.push((at, profile, count, times.resolution_ms));
            }
        }
        launches.sort_unstable();
        for (at, profile, count, resolution_ms) in launches {
            if let Some(of) = names.profiles.get(&profile)
                && at >= since.0
            {
                sink.launches(of, Timestamp(at), count, resolution_ms);
                done.launches += u64::from(count);
            }
        }
    }
    Ok(())
}

/// A raw event as read back.
struct RawEvent {
    at: Timestamp,
    nonce: i64,
    profile: i64,
    what: Raw,
}

enum Raw {
    Launch { count: u32, members: Vec<i64> },
    Attach { vm: i64, component: i64 },
    Stop { vm: i64, ran_ms: i64 },
    Touched { late: bool, data: Vec<u8> },
    Sample { vm: i64, sample: ResourceSample },
}

impl RawEvent {
    fn deliver(self, names: &Dictionary, sink: &mut (dyn Sink + Send), done: &mut Replayed) {
        let Some(of) = names.profiles.get(&self.profile) else {
            done.unreadable += 1;
            return;
        };
        match self.what {
            Raw::Launch { count, members } => {
                sink.launches(of, self.at, count, 1);
                if !members.is_empty() {
                    let members = names.members(members);
                    sink.launched_with(of, self.at, self.nonce.cast_unsigned(), &members);
                }
                done.launches += u64::from(count);
            }
            Raw::Attach { vm, component } => {
                for component in names.members([component]) {
                    sink.attached(of, self.at, vm.cast_unsigned(), &component);
                }
                done.events += 1;
            }
            Raw::Stop { vm, ran_ms } => {
                sink.stopped(of, self.at, vm.cast_unsigned(), ran_ms.unsigned_abs());
                done.events += 1;
            }
            Raw::Touched { late, data } => match touches_of(&data, &names.components) {
                Some((images, touches)) => {
                    if late {
                        sink.touched_late(of, &touches);
                    } else {
                        sink.touched(of, &images, &touches);
                    }
                    done.events += 1;
                }
                None => done.unreadable += 1,
            },
            Raw::Sample { vm, sample } => {
                sink.sample(of, self.at, vm.cast_unsigned(), &sample);
                done.events += 1;
            }
        }
    }
}

/// The time of the oldest raw event at or after `from`.
async fn oldest_raw(db: &mut SqliteConnection, from: i64) -> Result<Option<i64>, sqlx::Error> {
    let mut oldest: Option<i64> = None;
    for table in raw_tables() {
        let sql = format!("SELECT min(at_ms) FROM {table} WHERE at_ms >= ?");
        let row = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(from)
            .fetch_one(&mut *db)
            .await?;
        if let Some(at) = row.try_get::<Option<i64>, _>(0)? {
            oldest = Some(oldest.map_or(at, |o| o.min(at)));
        }
    }
    Ok(oldest)
}

/// The raw events of a span of time that a sink wants, in order.
async fn raw_events(
    db: &mut SqliteConnection,
    (from, end): (i64, i64),
    names: &Dictionary,
) -> Result<Vec<RawEvent>, sqlx::Error> {
    let mut events = Vec::new();
    let select = async |db: &mut SqliteConnection, sql: &'static str| {
        sqlx::query(sql).bind(from).bind(end).fetch_all(db).await
    };
    let mut push = |row: &sqlx::sqlite::SqliteRow, what| -> Result<(), sqlx::Error> {
        events.push(RawEvent {
            at: Timestamp(row.try_get(0)?),
            nonce: row.try_get(1)?,
            profile: row.try_get(2)?,
            what,
        });
        Ok(())
    };
    let sql = "SELECT at_ms, nonce, profile, composition, count FROM launch
               WHERE at_ms >= ? AND at_ms < ?";
    for row in select(db, sql).await? {
        let composition: Option<i64> = row.try_get(3)?;
        let members = composition
            .and_then(|id| names.compositions.get(&id).cloned())
            .unwrap_or_default();
        let count = u32::try_from(row.try_get::<i64, _>(4)?).unwrap_or(u32::MAX);
        push(&row, Raw::Launch { count, members })?;
    }
    let sql = "SELECT at_ms, nonce, profile, vm, component FROM attachment
               WHERE at_ms >= ? AND at_ms < ?";
    for row in select(db, sql).await? {
        let (vm, component) = (row.try_get(3)?, row.try_get(4)?);
        push(&row, Raw::Attach { vm, component })?;
    }
    let sql = "SELECT at_ms, nonce, profile, vm, ran_ms FROM stop WHERE at_ms >= ? AND at_ms < ?";
    for row in select(db, sql).await? {
        let (vm, ran_ms) = (row.try_get(3)?, row.try_get(4)?);
        push(&row, Raw::Stop { vm, ran_ms })?;
    }
    let sql = "SELECT at_ms, nonce, profile, late, data FROM touched
               WHERE at_ms >= ? AND at_ms < ?";
    for row in select(db, sql).await? {
        let (late, data) = (row.try_get(3)?, row.try_get(4)?);
        push(&row, Raw::Touched { late, data })?;
    }
    let sql = "SELECT at_ms, nonce, profile, vm, since_launch_ms, cpu_ms, memory_bytes, read_bytes,
                   written_bytes, received_bytes, sent_bytes
               FROM sample WHERE at_ms >= ? AND at_ms < ?";
    for row in select(db, sql).await? {
        let number = |i: usize| row.try_get::<i64, _>(i).map(i64::unsigned_abs);
        let sample = ResourceSample {
            since_launch_ms: number(4)?,
            cpu_ms: number(5)?,
            memory_bytes: number(6)?,
            read_bytes: number(7)?,
            written_bytes: number(8)?,
            received_bytes: number(9)?,
            sent_bytes: number(10)?,
        };
        let vm = row.try_get(3)?;
        push(&row, Raw::Sample { vm, sample })?;
    }
    events.sort_by_key(|event| (event.at, event.nonce));
    Ok(events)
}
