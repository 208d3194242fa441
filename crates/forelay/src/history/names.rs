//! Ids of profiles, components and compositions.
//!
//! Invariant: the cache holds only ids that are committed; a transaction that is lost clears it.

use std::collections::HashMap;

use forelay_image::Digest;
use sqlx::{Row, SqliteConnection};

use super::codec::encode_members;
use super::{ComponentRef, ProfileRef};

/// Ids of names, cached. Bounded: cleared when it grows past [`Names::MAX`].
#[derive(Default)]
pub(super) struct Names {
    profiles: HashMap<ProfileRef, i64>,
    components: HashMap<Digest, i64>,
    compositions: HashMap<Vec<u8>, i64>,
}

impl Names {
    const MAX: usize = 100_000;

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn bound(&mut self) {
        let len = self.profiles.len() + self.components.len() + self.compositions.len();
        if len > Self::MAX {
            self.clear();
        }
    }

    pub(super) async fn profile(
        &mut self,
        db: &mut SqliteConnection,
        of: &ProfileRef,
    ) -> Result<i64, sqlx::Error> {
        if let Some(id) = self.profiles.get(of) {
            return Ok(*id);
        }
        let row = sqlx::query(
            "INSERT INTO profile (name, owner) VALUES (?, ?)
             ON CONFLICT (owner, name) DO UPDATE SET name = name RETURNING id",
        )
        .bind(&of.profile)
        .bind(&of.owner)
        .fetch_one(db)
        .await?;
        let id = row.try_get(0)?;
        self.profiles.insert(of.clone(), id);
        Ok(id)
    }

    /// The id of an image; an empty name leaves a known name as it is.
    pub(super) async fn component(
        &mut self,
        db: &mut SqliteConnection,
        image: &Digest,
        name: &str,
    ) -> Result<i64, sqlx::Error> {
        if let Some(id) = self.components.get(image) {
            return Ok(*id);
        }
        let row = sqlx::query(
            "INSERT INTO component (image, name) VALUES (?1, ?2)
             ON CONFLICT (image) DO UPDATE SET name = iif(?2 = '', name, ?2) RETURNING id",
        )
        .bind(image.as_bytes().to_vec())
        .bind(name.to_owned())
        .fetch_one(db)
        .await?;
        let id = row.try_get(0)?;
        if !name.is_empty() {
            self.components.insert(*image, id);
        }
        Ok(id)
    }

    pub(super) async fn composition(
        &mut self,
        db: &mut SqliteConnection,
        components: &[ComponentRef],
    ) -> Result<Option<i64>, sqlx::Error> {
        if components.is_empty() {
            return Ok(None);
        }
        let mut ids = Vec::with_capacity(components.len());
        for component in components {
            ids.push(
                self.component(db, &component.image, &component.name)
                    .await?,
            );
        }
        self.composition_of(db, encode_members(&ids))
            .await
            .map(Some)
    }

    pub(super) async fn composition_of(
        &mut self,
        db: &mut SqliteConnection,
        members: Vec<u8>,
    ) -> Result<i64, sqlx::Error> {
        if let Some(id) = self.compositions.get(&members) {
            return Ok(*id);
        }
        let row = sqlx::query(
            "INSERT INTO composition (members) VALUES (?)
             ON CONFLICT (members) DO UPDATE SET members = members RETURNING id",
        )
        .bind(members.clone())
        .fetch_one(db)
        .await?;
        let id = row.try_get(0)?;
        self.compositions.insert(members, id);
        Ok(id)
    }
}
