//! Questions that `forelay history` asks.

use forelay_predict::time::Timestamp;
use serde::{Deserialize, Serialize};
use sqlx::{Row, SqliteConnection};

use super::{ProfileRef, SqliteHistory};

/// One launch and what it cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchRecord {
    /// Whose it was.
    #[serde(flatten)]
    pub of: ProfileRef,
    /// When.
    pub at: Timestamp,
    /// The VM.
    pub vm: u64,
    /// Launches this row stands for.
    pub count: u32,
    /// Milliseconds until it was ready, if it ever was.
    pub ready_ms: Option<u64>,
    /// How long it ran, if it has stopped.
    pub ran_ms: Option<u64>,
    /// Demand fetches it waited for.
    pub demand_fetches: u64,
    /// Time it stood still for them, in nanoseconds.
    pub stall_ns: u64,
    /// Bytes prefetched for it.
    pub prefetched_bytes: u64,
    /// Of these, bytes it touched.
    pub used_bytes: u64,
}

/// Totals of a profile, over all that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileSummary {
    /// Whose they are.
    #[serde(flatten)]
    pub of: ProfileRef,
    /// Launches.
    pub launches: u64,
    /// The latest launch, to the day if it is rolled up.
    pub last: Option<Timestamp>,
}

impl SqliteHistory {
    pub(super) async fn latest_launches(
        &self,
        profile: Option<&str>,
        limit: u32,
    ) -> Result<Vec<LaunchRecord>, sqlx::Error> {
        let rows = sqlx::query(
            "SELECT p.name, p.owner, l.at_ms, l.nonce, l.count,
                (SELECT ready_ms FROM ready r WHERE r.at_ms >= l.at_ms AND r.vm = l.nonce),
                (SELECT ran_ms FROM stop s WHERE s.at_ms >= l.at_ms AND s.vm = l.nonce),
                (SELECT total(fetches) FROM demand_fetch d
                    WHERE d.at_ms >= l.at_ms AND d.vm = l.nonce),
                (SELECT total(stall_ns) FROM demand_fetch d
                    WHERE d.at_ms >= l.at_ms AND d.vm = l.nonce),
                (SELECT total(prefetched_bytes) FROM prefetch f
                    WHERE f.at_ms >= l.at_ms AND f.vm = l.nonce),
                (SELECT total(used_bytes) FROM prefetch f
                    WHERE f.at_ms >= l.at_ms AND f.vm = l.nonce)
             FROM (SELECT * FROM launch
                   WHERE ?1 IS NULL OR profile IN (SELECT id FROM profile WHERE name = ?1)
                   ORDER BY at_ms DESC, nonce DESC LIMIT ?2) l
             JOIN profile p ON p.id = l.profile
             ORDER BY l.at_ms DESC, l.nonce DESC",
        )
        .bind(profile.map(str::to_owned))
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        let unsigned = |value: Option<i64>| value.map(|v| u64::try_from(v).unwrap_or(0));
        let mut out = Vec::with_capacity(rows.len());
        for row in rows {
            let total = |i: usize| row.try_get::<f64, _>(i).map(|v| v.max(0.0) as u64);
            out.push(LaunchRecord {
                of: ProfileRef {
                    profile: row.try_get(0)?,
                    owner: row.try_get(1)?,
                },
                at: Timestamp(row.try_get(2)?),
                vm: row.try_get::<i64, _>(3)?.cast_unsigned(),
                count: u32::try_from(row.try_get::<i64, _>(4)?).unwrap_or(1),
                ready_ms: unsigned(row.try_get(5)?),
                ran_ms: unsigned(row.try_get(6)?),
                demand_fetches: total(7)?,
                stall_ns: total(8)?,
                prefetched_bytes: total(9)?,
                used_bytes: total(10)?,
            });
        }
        Ok(out)
    }

    pub(super) async fn profile_summaries(&self) -> Result<Vec<ProfileSummary>, sqlx::Error> {
        let rows = sqlx::query(
            "SELECT p.name, p.owner, sum(t.n), max(t.last_ms) FROM (
                SELECT profile, sum(count) AS n, max(at_ms) AS last_ms FROM launch GROUP BY profile
                UNION ALL
                SELECT profile, sum(launches), max((day + days - 1) * 86400000) FROM rollup
                    WHERE launches > 0 GROUP BY profile
             ) t JOIN profile p ON p.id = t.profile
             GROUP BY p.id ORDER BY p.owner, p.name",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                Ok(ProfileSummary {
                    of: ProfileRef {
                        profile: row.try_get(0)?,
                        owner: row.try_get(1)?,
                    },
                    launches: u64::try_from(row.try_get::<i64, _>(2)?).unwrap_or(0),
                    last: row.try_get::<Option<i64>, _>(3)?.map(Timestamp),
                })
            })
            .collect()
    }
}

/// Bytes of the pages in use.
pub(super) async fn used_bytes(db: &mut SqliteConnection) -> Result<u64, sqlx::Error> {
    let row = sqlx::query(
        "SELECT (page_count - freelist_count) * page_size
         FROM pragma_page_count(), pragma_freelist_count(), pragma_page_size()",
    )
    .fetch_one(db)
    .await?;
    Ok(u64::try_from(row.try_get::<i64, _>(0)?).unwrap_or(0))
}
