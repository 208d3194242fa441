//! Layers that are components already: an image with them is what it is without.

use std::io::Cursor;
use std::sync::{Arc, Mutex};

use forelay_image::erofs::read::{SharedSource, tree_over};
use forelay_image::erofs::write::write_image;

use super::random::{Maker, image_of};
use super::*;

/// Layers as a repository has them, by name and version.
#[derive(Default)]
struct WrittenLayers(Mutex<BTreeMap<(String, String), (Component, SharedSource)>>);

impl std::fmt::Debug for WrittenLayers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("layers that were written")
    }
}

impl KnownLayers for WrittenLayers {
    fn find(&self, name: &str, version: &str) -> Option<(Component, Tree)> {
        let key = (name.to_owned(), version.to_owned());
        let (component, source) = self.0.lock().unwrap().get(&key)?.clone();
        Some((component, tree_over(&source).unwrap()))
    }
}

impl WrittenLayers {
    fn add(&self, imported: &Imported) {
        for part in &imported.split_off {
            let mut out = Cursor::new(Vec::new());
            let written = write_image(&part.tree, &mut out).unwrap();
            let component = part.draft.clone().with_image(written.image);
            if let Some(known) = &part.at_hand {
                assert_eq!(known.image, component.image);
            }
            let key = (component.name.clone(), component.version.clone());
            let source: SharedSource = Arc::new(out.into_inner());
            self.0.lock().unwrap().insert(key, (component, source));
        }
    }
}

/// All that an import tells, or why it is refused.
fn told(imported: &Result<Imported, ImportError>) -> Result<String, String> {
    let imported = imported.as_ref().map_err(ToString::to_string)?;
    let seen = seen(&laid(imported), i64::MAX);
    let main = &imported.main.draft;
    Ok(format!("{:?} {:?} {seen:#?}", names(imported), main.notes))
}

#[test]
fn layers_that_are_components_already_are_what_their_archives_are() {
    let (mut taken, mut settled_again) = (0, 0);
    for case in 0..120 {
        let one = Maker::seeded(case).layers();
        // The same layers on others than before, and others on them.
        let below = Maker::seeded(1000 + case).layers();
        let mixed: Vec<_> = below
            .iter()
            .chain(&one)
            .chain(&below[1..])
            .cloned()
            .collect();
        let known = WrittenLayers::default();
        for layers in [&one, &one, &mixed, &mixed] {
            let made = image_of(layers);
            let plain = made.import();
            let knowing = import_knowing(made.path(), None, Some(&known));
            assert_eq!(told(&knowing), told(&plain), "case {case}: {layers:?}");
            let (Ok(plain), Ok(knowing)) = (plain, knowing) else {
                continue;
            };
            let at_hand = |part: &&Part| part.at_hand.is_some();
            taken += knowing.split_off.iter().filter(at_hand).count();
            let others = knowing
                .split_off
                .iter()
                .filter(|part| part.at_hand.is_none());
            settled_again += others
                .filter(|part| part.draft.version.starts_with("1+"))
                .count();
            known.add(&knowing);
            known.add(&plain);
        }
    }
    assert!(taken > 200 && settled_again > 20, "{taken} {settled_again}");
}

#[test]
fn a_layer_that_hides_all_others_hides_them_again() {
    let alone: &[TarEntry<'_>] = &[(Regular, ".wh..wh..opq", ""), (Regular, "only", "x")];
    let known = WrittenLayers::default();
    for layers in [&[BASE, alone][..], &[BASE, alone], &[alone]] {
        let made = Made::new(layers);
        let plain = made.import();
        let knowing = import_knowing(made.path(), None, Some(&known));
        assert_eq!(told(&knowing), told(&plain));
        assert_eq!(laid(knowing.as_ref().unwrap()).reachable().len(), 2);
        known.add(&knowing.unwrap());
    }
}
