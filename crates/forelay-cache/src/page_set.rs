//! A set of pages of one image: sorted runs while they are few, one bit a page once
//! they are many.
//!
//! Owns the compact containers that the mapping table is made of. Refuses to know what
//! being in a set means (resident, touched, pinned).
//!
//! Invariants (checked by [`PageSet::validate`]): runs are sorted, not empty and do not
//! touch each other; the stored count is the number of pages; a set never costs more
//! than about one bit for each page up to its highest one.

use forelay_image::{Extent, PAGE_BYTES};

/// Pages `start..end` of an image, half open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    /// First page.
    pub start: u32,
    /// The page after the last one.
    pub end: u32,
}

impl PageRun {
    /// The pages `start..end`; empty if `end <= start`.
    pub const fn new(start: u32, end: u32) -> Self {
        Self { start, end }
    }

    /// All pages that `extent` touches, cut at page `u32::MAX` (16 TiB).
    pub fn covering(extent: Extent) -> Self {
        let page = |byte: u64| u32::try_from(byte / PAGE_BYTES).unwrap_or(u32::MAX);
        if extent.len == 0 {
            return Self::new(page(extent.offset), page(extent.offset));
        }
        let end = extent.end().div_ceil(PAGE_BYTES);
        let end = u32::try_from(end).unwrap_or(u32::MAX);
        Self::new(page(extent.offset), end)
    }

    /// The bytes of these pages.
    pub const fn extent(self) -> Extent {
        Extent::new(
            self.start as u64 * PAGE_BYTES,
            self.pages() as u64 * PAGE_BYTES,
        )
    }

    /// How many pages.
    pub const fn pages(self) -> u32 {
        self.end.saturating_sub(self.start)
    }

    /// Whether there is no page in it.
    pub const fn is_empty(self) -> bool {
        self.end <= self.start
    }

    /// The pages that both have; may be empty.
    pub fn intersection(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self::new(start, self.end.min(other.end).max(start))
    }
}

/// A set of pages of one image.
#[derive(Clone, Debug, Default)]
pub struct PageSet {
    pages: u32,
    form: Form,
}

#[derive(Clone, Debug)]
enum Form {
    Runs(Vec<PageRun>),
    Bits(Vec<u64>),
}

impl Default for Form {
    fn default() -> Self {
        Self::Runs(Vec::new())
    }
}

impl PartialEq for PageSet {
    fn eq(&self, other: &Self) -> bool {
        self.pages == other.pages && self.runs().eq(other.runs())
    }
}

impl Eq for PageSet {}

impl FromIterator<PageRun> for PageSet {
    fn from_iter<T: IntoIterator<Item = PageRun>>(runs: T) -> Self {
        let mut set = Self::new();
        for run in runs {
            set.insert(run);
        }
        set
    }
}

/// Bits `from..to` of a word (`to` at most 64, `from < to`).
const fn mask(from: u32, to: u32) -> u64 {
    (u64::MAX >> (64 - (to - from))) << from
}

/// Calls `each(word index, mask)` for every word that `run` touches.
fn words_of(run: PageRun, mut each: impl FnMut(usize, u64)) {
    let mut page = run.start;
    while page < run.end {
        let word = page / 64;
        let stop = (u64::from(word + 1) * 64).min(u64::from(run.end)) as u32;
        each(word as usize, mask(page % 64, stop - word * 64));
        page = stop;
    }
}

impl PageSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self {
            pages: 0,
            form: Form::Runs(Vec::new()),
        }
    }

    /// How many pages are in it.
    pub const fn len(&self) -> u32 {
        self.pages
    }

    /// Whether no page is in it.
    pub const fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Bytes of the pages in it.
    pub const fn bytes(&self) -> u64 {
        self.pages as u64 * PAGE_BYTES
    }

    /// Heap memory that the set itself takes, in bytes.
    pub fn heap_bytes(&self) -> usize {
        match &self.form {
            Form::Runs(runs) => runs.capacity() * size_of::<PageRun>(),
            Form::Bits(words) => words.capacity() * size_of::<u64>(),
        }
    }

    /// Whether `page` is in it. Allocates nothing.
    pub fn contains(&self, page: u32) -> bool {
        match &self.form {
            Form::Runs(runs) => {
                let at = runs.partition_point(|run| run.end <= page);
                runs.get(at).is_some_and(|run| run.start <= page)
            }
            Form::Bits(words) => words
                .get((page / 64) as usize)
                .is_some_and(|word| word >> (page % 64) & 1 == 1),
        }
    }

    /// Adds `run` and returns how many pages are new.
    pub fn insert(&mut self, run: PageRun) -> u32 {
        if run.is_empty() {
            return 0;
        }
        let added = match &mut self.form {
            Form::Runs(runs) => insert_run(runs, run),
            Form::Bits(words) => insert_bits(words, run),
        };
        self.pages += added;
        self.widen_if_smaller();
        added
    }

    /// Removes `run` and returns how many pages were in the set.
    pub fn remove(&mut self, run: PageRun) -> u32 {
        if run.is_empty() || self.pages == 0 {
            return 0;
        }
        let removed = match &mut self.form {
            Form::Runs(runs) => remove_run(runs, run),
            Form::Bits(words) => {
                let mut removed = 0;
                words_of(clip(words, run), |word, mask| {
                    removed += (words[word] & mask).count_ones();
                    words[word] &= !mask;
                });
                removed
            }
        };
        self.pages -= removed;
        if self.pages == 0 {
            self.form = Form::default();
        } else {
            self.widen_if_smaller();
        }
        removed
    }

    /// How many pages of `run` are in the set.
    pub fn count_within(&self, run: PageRun) -> u32 {
        match &self.form {
            Form::Runs(_) => self.runs_within(run).map(PageRun::pages).sum(),
            Form::Bits(words) => {
                let mut count = 0;
                words_of(clip(words, run), |word, mask| {
                    count += (words[word] & mask).count_ones();
                });
                count
            }
        }
    }

    /// The runs of the set in order.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_within(PageRun::new(0, u32::MAX))
    }

    /// The runs of the set inside `window`, cut at its borders, in order.
    pub fn runs_within(&self, window: PageRun) -> Runs<'_> {
        let at = match &self.form {
            Form::Runs(runs) => runs.partition_point(|run| run.end <= window.start),
            Form::Bits(_) => 0,
        };
        Runs {
            form: &self.form,
            at,
            window,
        }
    }

    /// The parts of `window` that are not in the set, in order.
    pub fn gaps_within(&self, window: PageRun) -> impl Iterator<Item = PageRun> + '_ {
        let mut from = window.start;
        let mut runs = self.runs_within(window);
        let mut done = window.is_empty();
        std::iter::from_fn(move || {
            while !done {
                let gap = match runs.next() {
                    Some(run) => {
                        let gap = PageRun::new(from, run.start);
                        from = run.end;
                        gap
                    }
                    None => {
                        done = true;
                        PageRun::new(from, window.end)
                    }
                };
                if !gap.is_empty() {
                    return Some(gap);
                }
            }
            None
        })
    }

    /// The longest run around `page` in which every page is in the set as `page` is.
    pub fn run_around(&self, page: u32, window: PageRun) -> PageRun {
        let inside = self.contains(page);
        match &self.form {
            Form::Runs(runs) => {
                let at = runs.partition_point(|run| run.end <= page);
                if inside {
                    return runs[at].intersection(window);
                }
                let start = if at == 0 { 0 } else { runs[at - 1].end };
                let end = runs.get(at).map_or(u32::MAX, |run| run.start);
                PageRun::new(start, end).intersection(window)
            }
            Form::Bits(words) => around_bits(words, page, inside, window),
        }
    }

    /// Chooses the smaller form and gives spare heap memory back.
    pub fn compact(&mut self) {
        if let Form::Bits(words) = &mut self.form {
            while words.last() == Some(&0) {
                words.pop();
            }
            let needed = words.len();
            if self.runs().take(needed + 1).count() <= needed {
                self.form = Form::Runs(self.runs().collect());
            }
        }
        match &mut self.form {
            Form::Runs(runs) => runs.shrink_to_fit(),
            Form::Bits(words) => words.shrink_to_fit(),
        }
    }

    /// Turns runs into bits when those are smaller; a run and a word are 8 bytes each.
    fn widen_if_smaller(&mut self) {
        let Form::Runs(runs) = &self.form else { return };
        let Some(last) = runs.last() else { return };
        let needed = last.end.div_ceil(64) as usize;
        if runs.len() <= needed + 2 {
            return;
        }
        let mut words = vec![0; needed];
        for &run in runs {
            words_of(run, |word, mask| words[word] |= mask);
        }
        self.form = Form::Bits(words);
    }

    /// Checks the invariants named in the module's header; the error says which broke.
    pub fn validate(&self) -> Result<(), String> {
        if let Form::Runs(runs) = &self.form {
            if runs.iter().any(|run| run.is_empty()) {
                return Err("empty run".into());
            }
            if runs.windows(2).any(|pair| pair[0].end >= pair[1].start) {
                return Err("runs overlap, touch or are unsorted".into());
            }
        }
        let counted: u64 = self.runs().map(|run| u64::from(run.pages())).sum();
        if counted != u64::from(self.pages) {
            return Err(format!("count is {}, runs have {counted}", self.pages));
        }
        Ok(())
    }
}

/// `run` without the pages that `words` has no bits for.
fn clip(words: &[u64], run: PageRun) -> PageRun {
    let end = u32::try_from(words.len() as u64 * 64).unwrap_or(u32::MAX);
    PageRun::new(run.start, run.end.min(end))
}

fn insert_run(runs: &mut Vec<PageRun>, run: PageRun) -> u32 {
    let first = runs.partition_point(|have| have.end < run.start);
    let last = first + runs[first..].partition_point(|have| have.start <= run.end);
    if first == last {
        runs.insert(first, run);
        return run.pages();
    }
    let had: u32 = runs[first..last].iter().map(|have| have.pages()).sum();
    let joined = PageRun::new(
        runs[first].start.min(run.start),
        runs[last - 1].end.max(run.end),
    );
    runs[first] = joined;
    runs.drain(first + 1..last);
    joined.pages() - had
}

fn insert_bits(words: &mut Vec<u64>, run: PageRun) -> u32 {
    let needed = run.end.div_ceil(64) as usize;
    if needed > words.len() {
        words.reserve_exact(needed - words.len());
        words.resize(needed, 0);
    }
    let mut added = 0;
    words_of(run, |word, mask| {
        added += (!words[word] & mask).count_ones();
        words[word] |= mask;
    });
    added
}

fn remove_run(runs: &mut Vec<PageRun>, run: PageRun) -> u32 {
    let first = runs.partition_point(|have| have.end <= run.start);
    let last = first + runs[first..].partition_point(|have| have.start < run.end);
    if first == last {
        return 0;
    }
    let removed = runs[first..last]
        .iter()
        .map(|have| have.intersection(run).pages())
        .sum();
    let head = PageRun::new(runs[first].start, run.start);
    let tail = PageRun::new(run.end, runs[last - 1].end);
    let kept = [head, tail].into_iter().filter(|part| !part.is_empty());
    runs.splice(first..last, kept);
    removed
}

fn around_bits(words: &[u64], page: u32, inside: bool, window: PageRun) -> PageRun {
    let word_at = |index: usize| {
        let word = words.get(index).copied().unwrap_or(0);
        // One bits where membership differs from `page`'s.
        if inside { !word } else { word }
    };
    let mut start = window.start;
    let mut index = (page / 64) as usize;
    let mut differ = word_at(index) & (mask(0, page % 64 + 1));
    loop {
        if differ != 0 {
            start = start.max(index as u32 * 64 + 64 - differ.leading_zeros());
            break;
        }
        if index == 0 || (index as u32) * 64 <= window.start {
            break;
        }
        index -= 1;
        differ = word_at(index);
    }
    let mut end = window.end;
    let mut index = (page / 64) as usize;
    let mut differ = word_at(index) & (u64::MAX << (page % 64));
    loop {
        if differ != 0 {
            end = end.min(index as u32 * 64 + differ.trailing_zeros());
            break;
        }
        index += 1;
        if index >= words.len() {
            if inside {
                end = end.min(u32::try_from(words.len() * 64).unwrap_or(u32::MAX));
            }
            break;
        }
        differ = word_at(index);
    }
    PageRun::new(start, end)
}

/// Iterator over the runs of a [`PageSet`].
pub struct Runs<'a> {
    form: &'a Form,
    at: usize,
    window: PageRun,
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        if self.window.is_empty() {
            return None;
        }
        match self.form {
            Form::Runs(runs) => {
                let run = runs.get(self.at)?.intersection(self.window);
                self.at += 1;
                self.window.start = run.end;
                (!run.is_empty()).then_some(run)
            }
            Form::Bits(words) => {
                let run = next_bits(words, self.window)?;
                self.window.start = run.end;
                Some(run)
            }
        }
    }
}

/// First run of one bits in `window`.
fn next_bits(words: &[u64], window: PageRun) -> Option<PageRun> {
    let start = next_bit(words, window.start, 0)?;
    if start >= window.end {
        return None;
    }
    let end = next_bit(words, start, u64::MAX).unwrap_or_else(|| words.len() as u32 * 64);
    Some(PageRun::new(start, end.min(window.end)))
}

/// First bit from `page` on that is one after XOR with `flip`.
fn next_bit(words: &[u64], page: u32, flip: u64) -> Option<u32> {
    let mut index = (page / 64) as usize;
    let mut word = (words.get(index)? ^ flip) & (u64::MAX << (page % 64));
    while word == 0 {
        index += 1;
        word = words.get(index)? ^ flip;
    }
    Some(index as u32 * 64 + word.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u32, u32),
        Remove(u32, u32),
        Compact,
    }

    fn op() -> impl Strategy<Value = Op> {
        let short = (0u32..400, 0u32..6);
        let long = (0u32..400, 0u32..200);
        prop_oneof![
            6 => short.clone().prop_map(|(start, len)| Op::Insert(start, start + len)),
            2 => long.clone().prop_map(|(start, len)| Op::Insert(start, start + len)),
            4 => short.prop_map(|(start, len)| Op::Remove(start, start + len)),
            1 => long.prop_map(|(start, len)| Op::Remove(start, start + len)),
            1 => Just(Op::Compact),
        ]
    }

    fn runs_of(model: &BTreeSet<u32>, window: PageRun) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        for &page in model.range(window.start..window.end.max(window.start)) {
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(PageRun::new(page, page + 1)),
            }
        }
        runs
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn agrees_with_a_plain_set(ops in prop::collection::vec(op(), 1..120),
                                   from in 0u32..600, len in 0u32..300) {
            let mut set = PageSet::new();
            let mut model = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Insert(start, end) => {
                        let before = model.len();
                        model.extend(start..end);
                        let added = set.insert(PageRun::new(start, end));
                        prop_assert_eq!(added as usize, model.len() - before);
                    }
                    Op::Remove(start, end) => {
                        let before = model.len();
                        model.retain(|page| !(start..end).contains(page));
                        let removed = set.remove(PageRun::new(start, end));
                        prop_assert_eq!(removed as usize, before - model.len());
                    }
                    Op::Compact => set.compact(),
                }
                set.validate().map_err(TestCaseError::fail)?;
                prop_assert_eq!(set.len() as usize, model.len());
            }
            let window = PageRun::new(from, from + len);
            let expected = runs_of(&model, window);
            prop_assert_eq!(set.runs_within(window).collect::<Vec<_>>(), expected);
            let everything: BTreeSet<u32> = (window.start..window.end).collect();
            let absent = everything.difference(&model).copied().collect();
            prop_assert_eq!(set.gaps_within(window).collect::<Vec<_>>(), runs_of(&absent, window));
            prop_assert_eq!(set.count_within(window) as usize, everything.intersection(&model).count());
            let whole = PageRun::new(0, 700);
            let inside = model.contains(&from);
            prop_assert_eq!(set.contains(from), inside);
            let mut around = PageRun::new(from, from + 1);
            while around.start > 0 && model.contains(&(around.start - 1)) == inside {
                around.start -= 1;
            }
            while around.end < 700 && model.contains(&around.end) == inside {
                around.end += 1;
            }
            prop_assert_eq!(set.run_around(from, whole), around);
        }
    }

    #[test]
    fn fully_fragmented_costs_a_bit_a_page() {
        let mut set = PageSet::new();
        for page in (0..64 * 1024).step_by(2) {
            set.insert(PageRun::new(page, page + 1));
        }
        set.compact();
        assert_eq!(set.len(), 32 * 1024);
        assert!(set.heap_bytes() <= 64 * 1024 / 8);
        let mut whole = PageSet::new();
        whole.insert(PageRun::new(0, 1 << 20));
        assert!(whole.heap_bytes() <= 64);
    }
}
