//! The mapping table behind one lock, for the planner and for readers beside it.
//!
//! One writer (the planner's step) and many readers (`forelay map`, READ threads that
//! want to know a state): one read-write lock is enough and simple to reason about.
//! The kind of lock is a parameter so that tests explore interleavings with shuttle.
//!
//! Invariant: every closure given to [`SharedTable::write`] leaves a valid table.

use std::sync::{PoisonError, RwLock};

use super::MappingTable;

/// A lock around a mapping table.
pub trait TableLock {
    /// A lock around `table`.
    fn new(table: MappingTable) -> Self;
    /// Calls `reader` with the table while nobody writes.
    fn read<R>(&self, reader: impl FnOnce(&MappingTable) -> R) -> R;
    /// Calls `writer` with the table while nobody else uses it.
    fn write<R>(&self, writer: impl FnOnce(&mut MappingTable) -> R) -> R;
}

impl TableLock for RwLock<MappingTable> {
    fn new(table: MappingTable) -> Self {
        Self::new(table)
    }

    fn read<R>(&self, reader: impl FnOnce(&MappingTable) -> R) -> R {
        // A panic elsewhere says nothing about the table: operations are all or nothing.
        reader(&self.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<R>(&self, writer: impl FnOnce(&mut MappingTable) -> R) -> R {
        writer(&mut self.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A mapping table that threads share.
#[derive(Debug)]
pub struct SharedTable<L: TableLock = RwLock<MappingTable>>(L);

impl<L: TableLock> SharedTable<L> {
    /// Shares `table`.
    pub fn new(table: MappingTable) -> Self {
        Self(L::new(table))
    }

    /// Calls `reader` with the table; do not block in it.
    pub fn read<R>(&self, reader: impl FnOnce(&MappingTable) -> R) -> R {
        self.0.read(reader)
    }

    /// Calls `writer` with the table; do not block in it.
    pub fn write<R>(&self, writer: impl FnOnce(&mut MappingTable) -> R) -> R {
        self.0.write(writer)
    }
}

impl Default for SharedTable {
    fn default() -> Self {
        Self::new(MappingTable::new())
    }
}

#[cfg(test)]
mod tests {
    use forelay_image::{Digest, Extent};
    use shuttle::sync::{Arc, Mutex, RwLock};

    use super::*;
    use crate::mapping_table::{Arrival, PageState, Phase};
    use crate::names::{DeviceImage, Domain, ProfileName, SharedImage, VmName};

    impl TableLock for RwLock<MappingTable> {
        fn new(table: MappingTable) -> Self {
            Self::new(table)
        }
        fn read<R>(&self, reader: impl FnOnce(&MappingTable) -> R) -> R {
            reader(&self.read().unwrap())
        }
        fn write<R>(&self, writer: impl FnOnce(&mut MappingTable) -> R) -> R {
            writer(&mut self.write().unwrap())
        }
    }

    /// Two VMs fault on overlapping extents while a third party evicts: every missing
    /// page is fetched by exactly one of them at a time, and the table stays valid.
    #[test]
    fn a_page_is_fetched_by_one_thread_at_a_time() {
        shuttle::check_random(
            || {
                let device = DeviceImage {
                    image: Digest::of(b"image"),
                    image_bytes: 16 * 4096,
                };
                let domain = Domain::from("d");
                let key = SharedImage::new(domain.clone(), device.image);
                let table = SharedTable::<RwLock<MappingTable>>::new(MappingTable::new());
                let (table, flying) = (Arc::new(table), Arc::new(Mutex::new([0u8; 16])));
                let mut threads = Vec::new();
                for (vm, first) in [("a", 0u64), ("b", 4)] {
                    let (table, flying, key) = (table.clone(), flying.clone(), key.clone());
                    let domain = domain.clone();
                    threads.push(shuttle::thread::spawn(move || {
                        let vm = VmName::from(vm);
                        let profile = ProfileName::from("p");
                        let map = |t: &mut MappingTable| {
                            t.map(&vm, &domain, &profile, &[device], Phase::Running)
                        };
                        table.write(map).unwrap();
                        let extent = Extent::new(first * 4096, 8 * 4096);
                        let mine = table.write(|t| t.begin_fetch(&key, extent)).unwrap();
                        let pages = || mine.iter().flat_map(|e| e.offset / 4096..e.end() / 4096);
                        for page in pages() {
                            let mut flying = flying.lock().unwrap();
                            flying[page as usize] += 1;
                            assert_eq!(flying[page as usize], 1, "page {page} fetched twice");
                        }
                        shuttle::thread::yield_now();
                        for page in pages() {
                            flying.lock().unwrap()[page as usize] -= 1;
                        }
                        for &extent in &mine {
                            let done = |t: &mut MappingTable| {
                                t.complete_fetch(&key, extent, Arrival::Demand)
                            };
                            table.write(done).unwrap();
                        }
                    }));
                }
                let (evicting, evicted) = (table.clone(), key.clone());
                threads.push(shuttle::thread::spawn(move || {
                    let known = evicting.read(|t| t.image_bytes(&evicted).is_some());
                    if known {
                        let half = Extent::new(0, 8 * 4096);
                        evicting.write(|t| t.evict(&evicted, half)).unwrap();
                    }
                }));
                for thread in threads {
                    thread.join().unwrap();
                }
                table.read(|table| {
                    table.validate().unwrap();
                    assert_eq!(table.fetching_bytes(), 0);
                    assert_eq!(table.state(&key, 11 * 4096), PageState::Resident);
                    assert_eq!(table.mapped_by(&key), 2);
                });
            },
            300,
        );
    }
}
