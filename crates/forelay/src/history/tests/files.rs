//! Files that are damaged, foreign or of another schema.

use super::*;

#[tokio::test]
async fn damaged_and_foreign_files_are_refused_untouched() {
    let scratch = Scratch::new();
    let path = scratch.path();
    let open = async |on_corrupt| {
        let options = OpenOptions {
            on_corrupt,
            ..OpenOptions::default()
        };
        SqliteHistory::open(&path, options).await
    };
    // Not a database.
    std::fs::write(&path, vec![0x5a; 9000]).unwrap();
    let error = open(OnCorrupt::Refuse).await.err().unwrap();
    assert!(matches!(error, HistoryError::Corrupt { .. }), "{error:?}");
    assert_eq!(std::fs::read(&path).unwrap(), vec![0x5a; 9000]);
    // Moved aside when asked, never deleted.
    let history = open(OnCorrupt::MoveAside).await.unwrap();
    let aside = scratch.dir.path().join("history.db.corrupt-1");
    assert_eq!(std::fs::read(aside).unwrap().len(), 9000);
    for i in 0..50 {
        history
            .append(&life(i * HOUR_MS, i as u64 * 100, &format!("p{i}")))
            .await
            .unwrap();
    }
    history.close().await;
    // A page in the middle is overwritten.
    let good = std::fs::read(&path).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2 / 4096 * 4096;
    bad[middle..middle + 2048].fill(0xff);
    std::fs::write(&path, &bad).unwrap();
    let error = open(OnCorrupt::Refuse).await.err().unwrap();
    assert!(matches!(error, HistoryError::Corrupt { .. }), "{error:?}");
    assert!(error.to_string().contains("--history-reset"));
    assert_eq!(std::fs::read(&path).unwrap(), bad);
    // Cut short.
    std::fs::write(&path, &good[..good.len() / 2]).unwrap();
    let error = open(OnCorrupt::Refuse).await.err().unwrap();
    assert!(matches!(error, HistoryError::Corrupt { .. }), "{error:?}");
}

#[tokio::test]
async fn older_schemas_are_migrated_and_newer_or_foreign_ones_refused() {
    use sqlx::{Connection as _, SqliteConnection};
    let scratch = Scratch::new();
    let path = scratch.path();
    let url = format!("sqlite://{}?mode=rwc", path.display());
    // As step 1 left it, with one launch in it.
    let mut db = SqliteConnection::connect(&url).await.unwrap();
    let old = format!(
        "{}; PRAGMA application_id = {}; PRAGMA user_version = 1;
         INSERT INTO profile VALUES (4, 'web', 'ann');
         INSERT INTO launch VALUES (86400000, 7, 4, NULL, 2);
         INSERT INTO touched VALUES (86400001, 8, 4, 7, x'');",
        schema::STEPS[0],
        schema::APPLICATION_ID
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(old))
        .execute(&mut db)
        .await
        .unwrap();
    db.close().await.unwrap();
    let history = scratch.open().await;
    let notes = replay(&history).await;
    assert_eq!(notes.launches, [("web".to_owned(), DAY_MS, 2, 1)]);
    assert_eq!((notes.touched, notes.touched_late), (1, 0));
    history.roll_up(Timestamp(90 * DAY_MS)).await.unwrap();
    history.close().await;

    let set = async |sql: &'static str| {
        let mut db = SqliteConnection::connect(&url).await.unwrap();
        sqlx::raw_sql(sql).execute(&mut db).await.unwrap();
        db.close().await.unwrap();
        let before = std::fs::read(&path).unwrap();
        let error = SqliteHistory::open(&path, OpenOptions::default())
            .await
            .err()
            .unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), before, "untouched");
        error
    };
    let newer = set("PRAGMA user_version = 99").await;
    assert!(
        matches!(newer, HistoryError::Newer { found: 99, .. }),
        "{newer:?}"
    );
    let foreign = set("PRAGMA user_version = 1; PRAGMA application_id = 5").await;
    assert!(
        matches!(foreign, HistoryError::Foreign { .. }),
        "{foreign:?}"
    );
}
