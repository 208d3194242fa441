//! Rolling up: raw events of a day become one row per profile, days become weeks, and what the
//! forecaster learns from (working sets, compositions, memory) is folded into state per profile.
//!
//! Each day is one transaction, which also moves the mark before which events are refused: a
//! crash leaves a day either raw or rolled up. The newest day with events is never rolled up by
//! age, so a clock that jumps ahead closes nothing that is still going on.

use std::collections::{BTreeMap, HashMap};

use forelay_predict::resources::Sketch;
use forelay_predict::time::{DAY_MS, HOUR_MS, Timestamp};
use futures_util::TryStreamExt as _;
use sqlx::{AssertSqlSafe, Row, SqliteConnection};

use super::append::raw_tables;
use super::codec::{Times, decode_members, encode_members};
use super::names::Names;
use super::query::used_bytes;
use super::working_sets::fold_touched;
use super::{RolledUp, SqliteHistory};

/// Share of a memory sketch that is left after a further day is folded in.
const MEMORY_DECAY_PER_DAY: f64 = 0.9;
/// Days in which a composition's uses count half when the least used are dropped.
const COMPOSITION_HALF_LIFE_DAYS: f64 = 30.0;

impl SqliteHistory {
    pub(super) async fn roll_up_all(&self, now: Timestamp) -> Result<RolledUp, sqlx::Error> {
        let mut names = self.writer.lock().await;
        let mut done = RolledUp::default();
        if !self.drop_misdated(now, &mut done).await? {
            done.clock_suspect = true;
            return Ok(done);
        }
        let today = now.0.div_euclid(DAY_MS);
        let limits = self.limits;
        self.fold_old_touches(now, &mut done).await?;
        let by_age = today.saturating_sub(i64::from(limits.raw_days));
        while self.roll_oldest_day(by_age, &mut names, &mut done).await? {}
        let daily_from = today.saturating_sub(i64::from(limits.daily_days));
        self.merge_weeks(daily_from, &mut done).await?;
        self.delete_before(today.saturating_sub(i64::from(limits.kept_days)), &mut done)
            .await?;
        self.prune_compositions(today).await?;
        self.shrink_to_limit(today, &mut names, &mut done).await?;
        let mut db = self.pool.acquire().await?;
        sqlx::raw_sql("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")
            .execute(&mut *db)
            .await?;
        Ok(done)
    }

    /// Deletes events from after tomorrow; answers `false`, deleting nothing, if most events are,
    /// since then it is `now` that is wrong.
    async fn drop_misdated(
        &self,
        now: Timestamp,
        done: &mut RolledUp,
    ) -> Result<bool, sqlx::Error> {
        let horizon = now.0.saturating_add(DAY_MS);
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let (mut ahead, mut behind): (i64, i64) = (0, 0);
        for table in raw_tables() {
            let sql = format!(
                "SELECT (SELECT count(*) FROM {table} WHERE at_ms > ?1),
                        (SELECT count(*) FROM {table} WHERE at_ms <= ?1)"
            );
            let row = sqlx::query(AssertSqlSafe(sql))
                .bind(horizon)
                .fetch_one(&mut *tx)
                .await?;
            ahead += row.try_get::<i64, _>(0)?;
            behind += row.try_get::<i64, _>(1)?;
        }
        if ahead > behind {
            return Ok(false);
        }
        if ahead > 0 {
            for table in raw_tables() {
                let sql = format!("DELETE FROM {table} WHERE at_ms > ?");
                let query = sqlx::query(AssertSqlSafe(sql)).bind(horizon);
                done.misdated += query.execute(&mut *tx).await?.rows_affected();
            }
        }
        tx.commit().await?;
        Ok(true)
    }

    /// Folds touches older than [`super::Limits::touched_hours`] (as seen from the newest of them,
    /// should `now` be ahead) into working sets.
    async fn fold_old_touches(
        &self,
        now: Timestamp,
        done: &mut RolledUp,
    ) -> Result<(), sqlx::Error> {
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let newest: Option<i64> = sqlx::query("SELECT max(at_ms) FROM touched")
            .fetch_one(&mut *tx)
            .await?
            .try_get(0)?;
        let Some(newest) = newest else { return Ok(()) };
        let hours = i64::from(self.limits.touched_hours) * HOUR_MS;
        let before = newest.min(now.0).saturating_sub(hours);
        done.events += fold_touched(&mut tx, before).await?;
        tx.commit().await
    }

    /// Rolls up the oldest day with raw events if it is before `before` and not the newest day.
    async fn roll_oldest_day(
        &self,
        before: i64,
        names: &mut Names,
        done: &mut RolledUp,
    ) -> Result<bool, sqlx::Error> {
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let (mut oldest, mut newest) = (i64::MAX, i64::MIN);
        for table in raw_tables() {
            let sql = format!("SELECT min(at_ms), max(at_ms) FROM {table}");
            let row = sqlx::query(AssertSqlSafe(sql)).fetch_one(&mut *tx).await?;
            if let (Some(low), Some(high)) = (row.try_get(0)?, row.try_get(1)?) {
                oldest = oldest.min(low);
                newest = newest.max(high);
            }
        }
        let day = oldest.div_euclid(DAY_MS);
        if oldest > newest || day >= before || day >= newest.div_euclid(DAY_MS) {
            return Ok(false);
        }
        let end = (day + 1).saturating_mul(DAY_MS);
        done.events += fold_touched(&mut tx, end).await?;
        let rows = day_rows(&mut tx, day, names).await?;
        for (profile, row) in rows {
            row.store(&mut tx, day, profile).await?;
        }
        for table in raw_tables() {
            let sql = format!("DELETE FROM {table} WHERE at_ms < ?");
            let query = sqlx::query(AssertSqlSafe(sql)).bind(end);
            done.events += query.execute(&mut *tx).await?.rows_affected();
        }
        close_before(&mut tx, "closed_before_ms", end).await?;
        tx.commit().await?;
        done.days += 1;
        Ok(true)
    }

    /// Joins the daily rows of whole weeks before day `before`.
    async fn merge_weeks(&self, before: i64, done: &mut RolledUp) -> Result<(), sqlx::Error> {
        let before = before.div_euclid(7) * 7;
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let rows = sqlx::query("SELECT * FROM rollup WHERE days = 1 AND day < ? ORDER BY day")
            .bind(before)
            .fetch_all(&mut *tx)
            .await?;
        if rows.is_empty() {
            return Ok(());
        }
        let mut weeks: BTreeMap<(i64, i64), Totals> = BTreeMap::new();
        for row in &rows {
            let (day, profile): (i64, i64) = (row.try_get("day")?, row.try_get("profile")?);
            let week = day.div_euclid(7) * 7;
            let times: Vec<u8> = row.try_get("times")?;
            let totals = weeks.entry((week, profile)).or_default();
            totals.add_row(row)?;
            for (ms, count) in Times::decode(&times).unwrap_or_default().at {
                totals.times.push((ms + (day - week) * DAY_MS, count));
            }
        }
        sqlx::query("DELETE FROM rollup WHERE days = 1 AND day < ?")
            .bind(before)
            .execute(&mut *tx)
            .await?;
        for ((week, profile), mut totals) in weeks {
            totals.days = 7;
            totals.store(&mut tx, week, profile).await?;
        }
        tx.commit().await?;
        done.weekly_merged += rows.len() as u64;
        Ok(())
    }

    async fn delete_before(&self, day: i64, done: &mut RolledUp) -> Result<u64, sqlx::Error> {
        let deleted = sqlx::query("DELETE FROM rollup WHERE day + days <= ?")
            .bind(day)
            .execute(&self.pool)
            .await?
            .rows_affected();
        done.deleted += deleted;
        Ok(deleted)
    }

    /// Keeps the most used compositions of each profile.
    async fn prune_compositions(&self, today: i64) -> Result<(), sqlx::Error> {
        let keep = self.limits.compositions_per_profile as usize;
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let rows = sqlx::query(
            "SELECT profile, composition, uses, last_ms FROM composition_use WHERE profile IN
                (SELECT profile FROM composition_use GROUP BY profile HAVING count(*) > ?)",
        )
        .bind(i64::from(self.limits.compositions_per_profile))
        .fetch_all(&mut *tx)
        .await?;
        let mut by_profile: BTreeMap<i64, Vec<(f64, i64)>> = BTreeMap::new();
        for row in rows {
            let (uses, last): (i64, i64) = (row.try_get(2)?, row.try_get(3)?);
            let age_days = (today - last.div_euclid(DAY_MS)).max(0) as f64;
            let score = uses as f64 * 0.5_f64.powf(age_days / COMPOSITION_HALF_LIFE_DAYS);
            let list = by_profile.entry(row.try_get(0)?).or_default();
            list.push((score, row.try_get(1)?));
        }
        for (profile, mut list) in by_profile {
            list.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            for (_, composition) in list.iter().skip(keep) {
                sqlx::query("DELETE FROM composition_use WHERE profile = ? AND composition = ?")
                    .bind(profile)
                    .bind(composition)
                    .execute(&mut *tx)
                    .await?;
            }
        }
        sqlx::query(
            "DELETE FROM composition WHERE id NOT IN (SELECT composition FROM composition_use)
             AND id NOT IN (SELECT composition FROM launch WHERE composition IS NOT NULL)",
        )
        .execute(&mut *tx)
        .await?;
        tx.commit().await
    }

    /// While the database is larger than allowed: rolls up sooner, then merges sooner, then
    /// deletes the oldest.
    async fn shrink_to_limit(
        &self,
        today: i64,
        names: &mut Names,
        done: &mut RolledUp,
    ) -> Result<(), sqlx::Error> {
        loop {
            let mut db = self.pool.acquire().await?;
            if used_bytes(&mut db).await? <= self.limits.max_bytes {
                return Ok(());
            }
            drop(db);
            if self.roll_oldest_day(i64::MAX, names, done).await? {
                continue;
            }
            let merged = done.weekly_merged;
            self.merge_weeks(today.saturating_sub(7), done).await?;
            if done.weekly_merged > merged {
                continue;
            }
            let oldest: Option<i64> = sqlx::query("SELECT min(day) FROM rollup")
                .fetch_one(&self.pool)
                .await?
                .try_get(0)?;
            let Some(oldest) = oldest else {
                // Only the newest raw day and the state per profile are left.
                return Ok(());
            };
            self.delete_before(oldest.saturating_add(7), done).await?;
        }
    }
}

/// Moves a mark before which events are refused; it never moves back.
pub(super) async fn close_before(
    db: &mut SqliteConnection,
    mark: &'static str,
    at_ms: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO state (name, value) VALUES (?1, ?2)
         ON CONFLICT (name) DO UPDATE SET value = max(value, ?2)",
    )
    .bind(mark)
    .bind(at_ms)
    .execute(db)
    .await?;
    Ok(())
}

/// The numbers of one profile over the days of a row.
#[derive(Default)]
struct Totals {
    days: i64,
    /// In the order of [`NUMBERS`].
    numbers: [i64; NUMBERS.len()],
    times: Vec<(i64, u32)>,
}

const NUMBERS: [&str; 15] = [
    "launches",
    "cold",
    "stops",
    "ran_ms",
    "attachments",
    "samples",
    "cpu_ms",
    "memory_bytes_sum",
    "memory_bytes_max",
    "io_bytes",
    "fetches",
    "fetched_bytes",
    "stall_ns",
    "prefetched_bytes",
    "used_bytes",
];
/// The one number that is a maximum, not a sum.
const MAXIMUM: usize = 8;

impl Totals {
    fn add(&mut self, first: usize, values: &[i64]) {
        for (offset, value) in values.iter().enumerate() {
            let number = &mut self.numbers[first + offset];
            *number = if first + offset == MAXIMUM {
                (*number).max(*value)
            } else {
                number.saturating_add(*value)
            };
        }
    }

    fn add_row(&mut self, row: &sqlx::sqlite::SqliteRow) -> Result<(), sqlx::Error> {
        for (i, name) in NUMBERS.iter().enumerate() {
            self.add(i, &[row.try_get(*name)?]);
        }
        Ok(())
    }

    async fn store(
        self,
        db: &mut SqliteConnection,
        day: i64,
        profile: i64,
    ) -> Result<(), sqlx::Error> {
        let times = match self.days {
            7 => Times::of_week(self.times),
            _ => Times::of_day(self.times),
        };
        let sql = format!(
            "INSERT INTO rollup (day, profile, days, {}, times) VALUES (?, ?, ?{}, ?)",
            NUMBERS.join(", "),
            ", ?".repeat(NUMBERS.len())
        );
        let mut query = sqlx::query(AssertSqlSafe(sql))
            .bind(day)
            .bind(profile)
            .bind(self.days.max(1));
        for number in self.numbers {
            query = query.bind(number);
        }
        query.bind(times.encode()).execute(db).await?;
        Ok(())
    }
}

/// Adds up a day's raw events per profile, and folds compositions and memory samples.
async fn day_rows(
    db: &mut SqliteConnection,
    day: i64,
    names: &mut Names,
) -> Result<BTreeMap<i64, Totals>, sqlx::Error> {
    let start = day.saturating_mul(DAY_MS);
    let end = start.saturating_add(DAY_MS);
    let mut rows: BTreeMap<i64, Totals> = BTreeMap::new();
    fold_launches(db, start, end, names, &mut rows).await?;
    fold_samples(db, end, &mut rows).await?;
    // (first number, query): each gives a profile and consecutive numbers.
    let sums = [
        (
            1,
            "SELECT profile, count(DISTINCT vm) FROM demand_fetch WHERE at_ms < ? GROUP BY 1",
        ),
        (
            2,
            "SELECT profile, count(*), sum(ran_ms) FROM stop WHERE at_ms < ? GROUP BY 1",
        ),
        (
            4,
            "SELECT profile, count(*) FROM attachment WHERE at_ms < ? GROUP BY 1",
        ),
        (
            10,
            "SELECT profile, sum(fetches), sum(bytes), sum(stall_ns) FROM demand_fetch
             WHERE at_ms < ? GROUP BY 1",
        ),
        (
            13,
            "SELECT profile, sum(prefetched_bytes), sum(used_bytes) FROM prefetch
             WHERE at_ms < ? GROUP BY 1",
        ),
    ];
    for (first, sql) in sums {
        for row in sqlx::query(sql).bind(end).fetch_all(&mut *db).await? {
            let values: Result<Vec<i64>, _> = (1..row.len()).map(|i| row.try_get(i)).collect();
            rows.entry(row.try_get(0)?)
                .or_default()
                .add(first, &values?);
        }
    }
    Ok(rows)
}

/// What was attached to running VMs before `end`: by VM, the components.
async fn attachments(
    db: &mut SqliteConnection,
    end: i64,
) -> Result<HashMap<i64, Vec<i64>>, sqlx::Error> {
    let mut attached: HashMap<i64, Vec<i64>> = HashMap::new();
    for row in sqlx::query("SELECT vm, component FROM attachment WHERE at_ms < ?")
        .bind(end)
        .fetch_all(&mut *db)
        .await?
    {
        attached
            .entry(row.try_get(0)?)
            .or_default()
            .push(row.try_get(1)?);
    }
    Ok(attached)
}

/// Launch counts and times, and the compositions that VMs had in the end.
async fn fold_launches(
    db: &mut SqliteConnection,
    start: i64,
    end: i64,
    names: &mut Names,
    rows: &mut BTreeMap<i64, Totals>,
) -> Result<(), sqlx::Error> {
    let mut attached = attachments(db, end).await?;
    let mut uses: BTreeMap<(i64, i64), (i64, i64)> = BTreeMap::new();
    let mut extended: Vec<(i64, i64, i64, i64, Vec<i64>)> = Vec::new();
    let mut launches = sqlx::query(
        "SELECT at_ms, nonce, profile, composition, count FROM launch WHERE at_ms < ?
         ORDER BY at_ms, nonce",
    )
    .bind(end)
    .fetch(&mut *db);
    while let Some(row) = launches.try_next().await? {
        let (at_ms, nonce): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        let (profile, count): (i64, i64) = (row.try_get(2)?, row.try_get(4)?);
        let composition: Option<i64> = row.try_get(3)?;
        let totals = rows.entry(profile).or_default();
        totals.add(0, &[count]);
        let launches = u32::try_from(count).unwrap_or(u32::MAX);
        totals.times.push((at_ms - start, launches));
        match (composition, attached.remove(&nonce)) {
            (Some(composition), None) => {
                let entry = uses.entry((profile, composition)).or_insert((0, at_ms));
                *entry = (entry.0 + count, at_ms);
            }
            (Some(composition), Some(more)) => {
                extended.push((profile, composition, count, at_ms, more));
            }
            (None, _) => {}
        }
    }
    drop(launches);
    for (profile, composition, count, at_ms, more) in extended {
        let row = sqlx::query("SELECT members FROM composition WHERE id = ?")
            .bind(composition)
            .fetch_one(&mut *db)
            .await?;
        let mut members = decode_members(&row.try_get::<Vec<u8>, _>(0)?).unwrap_or_default();
        members.extend(more);
        let id = names.composition_of(db, encode_members(&members)).await?;
        let entry = uses.entry((profile, id)).or_insert((0, at_ms));
        *entry = (entry.0 + count, entry.1.max(at_ms));
    }
    for ((profile, composition), (count, last_ms)) in uses {
        sqlx::query(
            "INSERT INTO composition_use (profile, composition, uses, last_ms)
             VALUES (?1, ?2, ?3, ?4) ON CONFLICT (profile, composition)
             DO UPDATE SET uses = uses + ?3, last_ms = max(last_ms, ?4)",
        )
        .bind(profile)
        .bind(composition)
        .bind(count)
        .bind(last_ms)
        .execute(&mut *db)
        .await?;
    }
    Ok(())
}

/// Sample totals, and memory sketches.
async fn fold_samples(
    db: &mut SqliteConnection,
    end: i64,
    rows: &mut BTreeMap<i64, Totals>,
) -> Result<(), sqlx::Error> {
    let mut sketches: BTreeMap<i64, Sketch> = BTreeMap::new();
    // What the guest says of its network may be any number. Added, four of these are still an
    // integer, not the REAL that SQLite makes of more.
    let mut samples = sqlx::query(
        "SELECT profile, cpu_ms, memory_bytes,
                min(read_bytes, 1 << 60) + min(written_bytes, 1 << 60)
                    + min(received_bytes, 1 << 60) + min(sent_bytes, 1 << 60)
         FROM sample WHERE at_ms < ?",
    )
    .bind(end)
    .fetch(&mut *db);
    while let Some(row) = samples.try_next().await? {
        let profile: i64 = row.try_get(0)?;
        let memory: i64 = row.try_get(2)?;
        let numbers = [1, row.try_get(1)?, memory, memory, row.try_get(3)?];
        rows.entry(profile).or_default().add(5, &numbers);
        sketches.entry(profile).or_default().add(memory as f64, 1.0);
    }
    drop(samples);
    for (profile, day) in sketches {
        let stored = sqlx::query("SELECT data FROM memory_use WHERE profile = ?")
            .bind(profile)
            .fetch_optional(&mut *db)
            .await?;
        let mut sketch = match stored {
            Some(row) => Sketch::from_bytes(&row.try_get::<Vec<u8>, _>(0)?).unwrap_or_default(),
            None => Sketch::new(),
        };
        sketch.decay(MEMORY_DECAY_PER_DAY);
        sketch.merge(&day, 1.0);
        sqlx::query("INSERT OR REPLACE INTO memory_use (profile, data) VALUES (?, ?)")
            .bind(profile)
            .bind(sketch.to_bytes())
            .execute(&mut *db)
            .await?;
    }
    Ok(())
}
