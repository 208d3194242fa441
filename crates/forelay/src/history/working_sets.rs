//! Touches folded into stored working sets.

use std::collections::{HashMap, HashSet};

use forelay_image::{Digest, Touch};
use forelay_predict::working_set::{WorkingSet, WorkingSetConfig, WorkingSets};
use sqlx::{Row, SqliteConnection};

use super::codec::decode_touches;
use super::rollup::close_before;

/// Images by component id.
pub(super) async fn components(
    db: &mut SqliteConnection,
) -> Result<HashMap<i64, (Digest, String)>, sqlx::Error> {
    let rows = sqlx::query("SELECT id, image, name FROM component")
        .fetch_all(db)
        .await?;
    let mut out = HashMap::with_capacity(rows.len());
    for row in rows {
        let image: Vec<u8> = row.try_get(1)?;
        if let Ok(bytes) = <[u8; 32]>::try_from(image) {
            out.insert(
                row.try_get(0)?,
                (Digest::from_bytes(bytes), row.try_get(2)?),
            );
        }
    }
    Ok(out)
}

/// Images and touches of one launch from its stored form.
pub(super) fn touches_of(
    data: &[u8],
    components: &HashMap<i64, (Digest, String)>,
) -> Option<(Vec<Digest>, Vec<Touch>)> {
    let mut images = Vec::new();
    let mut touches = Vec::new();
    for list in decode_touches(data)? {
        let (image, _) = components.get(&list.component)?;
        images.push(*image);
        touches.extend(list.extents.iter().map(|(extent, ms)| Touch {
            image: *image,
            extent: *extent,
            first_touch_ms: *ms,
        }));
    }
    Some((images, touches))
}

/// Folds touches from before `before_ms` into the stored working sets and deletes them. Returns
/// how many launches' touches that were.
pub(super) async fn fold_touched(
    db: &mut SqliteConnection,
    before_ms: i64,
) -> Result<u64, sqlx::Error> {
    let components = components(db).await?;
    let ids: HashMap<Digest, i64> = components.iter().map(|(id, (d, _))| (*d, *id)).collect();
    let rows = sqlx::query(
        "SELECT profile, at_ms, late, data FROM touched WHERE at_ms < ?
         ORDER BY profile, at_ms, nonce",
    )
    .bind(before_ms)
    .fetch_all(&mut *db)
    .await?;
    // One profile's sets at a time, in a store of their own.
    let mut sets = WorkingSets::new(WorkingSetConfig::default());
    let mut loaded: HashSet<Digest> = HashSet::new();
    let mut current: Option<(i64, i64)> = None;
    for row in &rows {
        let (profile, at_ms): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        if current.is_some_and(|(last, _)| last != profile) {
            store_working_sets(db, &sets, current, &ids).await?;
            sets = WorkingSets::new(WorkingSetConfig::default());
            loaded.clear();
        }
        current = Some((profile, at_ms));
        let (late, data): (bool, Vec<u8>) = (row.try_get(2)?, row.try_get(3)?);
        let Some((images, touches)) = touches_of(&data, &components) else {
            continue;
        };
        for image in &images {
            if !loaded.insert(*image) {
                continue;
            }
            let stored =
                sqlx::query("SELECT data FROM working_set WHERE profile = ? AND component = ?")
                    .bind(profile)
                    .bind(ids.get(image).copied())
                    .fetch_optional(&mut *db)
                    .await?;
            if let Some(stored) = stored {
                // What is unreadable is learned again.
                if let Ok(set) = WorkingSet::from_bytes(&stored.try_get::<Vec<u8>, _>(0)?) {
                    sets.insert("", *image, set);
                }
            }
        }
        if late {
            sets.observe_late("", &touches);
        } else {
            sets.observe("", &images, &touches);
        }
    }
    store_working_sets(db, &sets, current, &ids).await?;
    sqlx::query("DELETE FROM touched WHERE at_ms < ?")
        .bind(before_ms)
        .execute(&mut *db)
        .await?;
    close_before(db, "touched_closed_before_ms", before_ms).await?;
    Ok(rows.len() as u64)
}

async fn store_working_sets(
    db: &mut SqliteConnection,
    sets: &WorkingSets,
    current: Option<(i64, i64)>,
    ids: &HashMap<Digest, i64>,
) -> Result<(), sqlx::Error> {
    let Some((profile, last_ms)) = current else {
        return Ok(());
    };
    for (_, image, set) in sets.pairs() {
        sqlx::query(
            "INSERT OR REPLACE INTO working_set (profile, component, last_ms, data)
             VALUES (?, ?, ?, ?)",
        )
        .bind(profile)
        .bind(ids.get(image).copied())
        .bind(last_ms)
        .bind(set.to_bytes())
        .execute(&mut *db)
        .await?;
    }
    Ok(())
}
