//! What stands at one path when layers are laid over each other.
//!
//! The rules are dpkg's, which unpacks one package over others:
//! ```text
//! above \ below   directory          link               anything else
//! directory       both, merged       through the link   replaces it
//! link            the directory      replaces it        replaces it
//! anything else   refused            replaces it        replaces it
//! ```
//! A directory goes through a link only if that leads to a directory (see [`super::links`]).
//! An entry that is marked as [`xattr::REPLACES`] is what it is, whatever lies below, as in
//! overlayfs; so is an opaque directory, which hides what lies below.

use super::links::Way;
#[cfg(doc)]
use crate::erofs::xattr;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Removes what lies below.
    Whiteout,
    Directory,
    Link,
    Other,
}

/// What one layer has at the path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item<'w> {
    pub shape: Shape,
    pub opaque: bool,
    pub replaces: bool,
    /// Where a directory goes that stands on a link, if that is known.
    pub way: Option<&'w Way>,
}

/// What the layers have at one path; numbers are of items.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Laid {
    /// Directories that are merged, lowest first, or one entry of another kind, or nothing.
    pub visible: Vec<usize>,
    /// What is not used although no layer asked for its removal.
    pub lost: Vec<usize>,
    /// Directories that stand on a link of which it is not known where it leads. They are
    /// left out.
    pub open: Vec<usize>,
    /// What hides directories of several layers, in which some may stand on links.
    pub hiders: Vec<usize>,
}

/// Lays `items` over each other, the first lowest. The error names the entry that cannot
/// be where it is, and the directory below it.
pub(super) fn lay(items: &[Item<'_>]) -> Result<Laid, (usize, usize)> {
    use Shape::{Directory, Link, Other, Whiteout};
    let mut laid = Laid::default();
    for (number, item) in items.iter().enumerate() {
        let below = laid.visible.last().map(|&last| items[last].shape);
        let meant = item.replaces || item.opaque;
        match (item.shape, below) {
            // Directories on a link that is removed have gone through it before.
            (Whiteout, _) => {
                laid.replace(number);
                (laid.visible, laid.lost) = Default::default();
            }
            (Directory, Some(Directory)) if !item.opaque => laid.visible.push(number),
            (Directory, Some(Link)) if !meant => match item.way {
                None => laid.open.push(number),
                Some(Way::Through(_)) => {}
                Some(Way::Nowhere) => laid.lost.push(number),
                Some(Way::Replaces) => laid.replace(number),
            },
            (Link, Some(Directory)) if !meant => laid.lost.push(number),
            (Other, Some(Directory)) if !meant => {
                return Err((number, laid.visible[laid.visible.len() - 1]));
            }
            _ => laid.replace(number),
        }
    }
    Ok(laid)
}

impl Laid {
    fn replace(&mut self, number: usize) {
        if self.visible.len() > 1 {
            self.hiders.push(number);
        }
        self.lost.append(&mut self.visible);
        self.visible.push(number);
    }
}

#[cfg(test)]
mod tests {
    use super::Shape::{Directory, Link, Other, Whiteout};
    use super::*;

    fn item(shape: Shape) -> Item<'static> {
        Item {
            shape,
            opaque: false,
            replaces: false,
            way: None,
        }
    }

    fn visible(shapes: &[Shape]) -> Result<Vec<usize>, (usize, usize)> {
        let items: Vec<_> = shapes.iter().map(|shape| item(*shape)).collect();
        lay(&items).map(|laid| laid.visible)
    }

    #[test]
    fn each_pair_is_laid_as_the_table_says() {
        for (below, above, expected) in [
            (Directory, Directory, Ok(vec![0, 1])),
            (Directory, Link, Ok(vec![0])),
            (Directory, Other, Err((1, 0))),
            (Link, Directory, Ok(vec![0])),
            (Link, Link, Ok(vec![1])),
            (Link, Other, Ok(vec![1])),
            (Other, Directory, Ok(vec![1])),
            (Other, Link, Ok(vec![1])),
            (Other, Other, Ok(vec![1])),
            (Directory, Whiteout, Ok(vec![])),
        ] {
            assert_eq!(visible(&[below, above]), expected, "{above:?} on {below:?}");
            // What a whiteout removed counts no more.
            let after = visible(&[below, Whiteout, above]);
            let alone = if above == Whiteout { vec![] } else { vec![2] };
            assert_eq!(after, Ok(alone));
            let meant = Item {
                replaces: true,
                ..item(above)
            };
            let laid = lay(&[item(below), meant]).unwrap();
            let merged = (below, above) == (Directory, Directory);
            assert_eq!(laid.visible.contains(&0), merged, "{above:?} on {below:?}");
        }
    }

    #[test]
    fn a_directory_on_a_link_goes_the_way_that_was_found() {
        let on_link = |way| {
            let directory = Item {
                way: Some(way),
                ..item(Directory)
            };
            let laid = lay(&[item(Link), directory]).unwrap();
            (laid.visible, laid.lost)
        };
        let through = Way::Through(b"usr/bin".to_vec());
        assert_eq!(on_link(&through), (vec![0], vec![]));
        assert_eq!(on_link(&Way::Nowhere), (vec![0], vec![1]));
        assert_eq!(on_link(&Way::Replaces), (vec![1], vec![0]));
        let laid = lay(&[item(Link), item(Directory)]).unwrap();
        assert_eq!((laid.visible, laid.open), (vec![0], vec![1]));
        let removed = lay(&[item(Link), item(Directory), item(Whiteout)]).unwrap();
        assert_eq!((removed.visible, removed.open), (vec![], vec![1]));
    }
}
