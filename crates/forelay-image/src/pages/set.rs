//! A set of pages of one image: sorted runs while they are few, one bit a page once
//! they are many.
//!
//! Invariants (checked by [`PageSet::validate`]): runs are sorted, not empty and do not
//! touch each other; the stored count is the number of pages; a set never costs more
//! than about one bit for each page up to its highest one.

use std::ops::{BitAnd, BitOrAssign, Sub, SubAssign};

use super::{PageNo, PageRun, Pages};
use crate::extent::Extent;

/// A set of pages of one image.
#[derive(Clone, Debug, Default)]
pub struct PageSet {
    pages: Pages,
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

impl Extend<PageRun> for PageSet {
    fn extend<T: IntoIterator<Item = PageRun>>(&mut self, runs: T) {
        for run in runs {
            self.insert(run);
        }
    }
}

impl FromIterator<PageRun> for PageSet {
    fn from_iter<T: IntoIterator<Item = PageRun>>(runs: T) -> Self {
        let mut set = Self::new();
        set.extend(runs);
        set
    }
}

/// All pages that the extents touch.
impl Extend<Extent> for PageSet {
    fn extend<T: IntoIterator<Item = Extent>>(&mut self, extents: T) {
        self.extend(extents.into_iter().map(PageRun::covering));
    }
}

/// All pages that the extents touch.
impl FromIterator<Extent> for PageSet {
    fn from_iter<T: IntoIterator<Item = Extent>>(extents: T) -> Self {
        extents.into_iter().map(PageRun::covering).collect()
    }
}

impl BitAnd for &PageSet {
    type Output = PageSet;

    fn bitand(self, other: Self) -> PageSet {
        self.runs().flat_map(|run| other.runs_within(run)).collect()
    }
}

impl Sub for &PageSet {
    type Output = PageSet;

    fn sub(self, other: Self) -> PageSet {
        self.runs().flat_map(|run| other.gaps_within(run)).collect()
    }
}

impl BitOrAssign<&Self> for PageSet {
    fn bitor_assign(&mut self, other: &Self) {
        self.extend(other.runs());
    }
}

impl SubAssign<&Self> for PageSet {
    fn sub_assign(&mut self, other: &Self) {
        for run in other.runs() {
            self.remove(run);
        }
    }
}

/// Bits `from..to` of a word (`to` at most 64, `from < to`).
const fn mask(from: u32, to: u32) -> u64 {
    (u64::MAX >> (64 - (to - from))) << from
}

/// Calls `each(word index, mask)` for every word that `run` touches.
fn words_of(run: PageRun, mut each: impl FnMut(usize, u64)) {
    let mut page = run.start.0;
    while page < run.end.0 {
        let word = page / 64;
        let stop = (u64::from(word + 1) * 64).min(u64::from(run.end.0)) as u32;
        each(word as usize, mask(page % 64, stop - word * 64));
        page = stop;
    }
}

impl PageSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self {
            pages: Pages::NONE,
            form: Form::Runs(Vec::new()),
        }
    }

    /// How many pages are in it.
    pub const fn len(&self) -> Pages {
        self.pages
    }

    /// Whether no page is in it.
    pub const fn is_empty(&self) -> bool {
        self.pages.0 == 0
    }

    /// Bytes of the pages in it.
    pub const fn bytes(&self) -> u64 {
        self.pages.bytes()
    }

    /// Heap memory that the set itself takes, in bytes.
    pub fn heap_bytes(&self) -> usize {
        match &self.form {
            Form::Runs(runs) => runs.capacity() * size_of::<PageRun>(),
            Form::Bits(words) => words.capacity() * size_of::<u64>(),
        }
    }

    /// Whether `page` is in it. Allocates nothing.
    pub fn contains(&self, page: PageNo) -> bool {
        match &self.form {
            Form::Runs(runs) => {
                let at = runs.partition_point(|run| run.end <= page);
                runs.get(at).is_some_and(|run| run.start <= page)
            }
            Form::Bits(words) => words
                .get((page.0 / 64) as usize)
                .is_some_and(|word| word >> (page.0 % 64) & 1 == 1),
        }
    }

    /// Adds `run` and returns how many pages are new.
    pub fn insert(&mut self, run: PageRun) -> Pages {
        if run.is_empty() {
            return Pages::NONE;
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
    pub fn remove(&mut self, run: PageRun) -> Pages {
        if run.is_empty() || self.is_empty() {
            return Pages::NONE;
        }
        let removed = match &mut self.form {
            Form::Runs(runs) => remove_run(runs, run),
            Form::Bits(words) => {
                let mut removed = 0;
                words_of(clip(words, run), |word, mask| {
                    removed += (words[word] & mask).count_ones();
                    words[word] &= !mask;
                });
                Pages(removed)
            }
        };
        self.pages -= removed;
        if self.is_empty() {
            self.form = Form::default();
        } else {
            self.widen_if_smaller();
        }
        removed
    }

    /// How many pages of `run` are in the set.
    pub fn count_within(&self, run: PageRun) -> Pages {
        match &self.form {
            Form::Runs(_) => self.runs_within(run).map(PageRun::pages).sum(),
            Form::Bits(words) => {
                let mut count = 0;
                words_of(clip(words, run), |word, mask| {
                    count += (words[word] & mask).count_ones();
                });
                Pages(count)
            }
        }
    }

    /// Whether any page of `run` is in the set. Allocates nothing.
    pub fn intersects(&self, run: PageRun) -> bool {
        self.runs_within(run).next().is_some()
    }

    /// The runs of the set in order.
    pub fn runs(&self) -> Runs<'_> {
        self.runs_within(PageRun::ALL)
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

    /// Its pages as extents, in order.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.runs().map(PageRun::extent)
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
    pub fn run_around(&self, page: PageNo, window: PageRun) -> PageRun {
        let inside = self.contains(page);
        match &self.form {
            Form::Runs(runs) => {
                let at = runs.partition_point(|run| run.end <= page);
                if inside {
                    return runs[at].intersection(window);
                }
                let before = runs[..at].last();
                let start = before.map_or(PageNo(0), |run| run.end);
                let end = runs.get(at).map_or(PageNo::END, |run| run.start);
                PageRun::new(start, end).intersection(window)
            }
            Form::Bits(words) => around_bits(words, page, inside, window),
        }
    }

    /// Calls `each` with the number of a word of 64 pages and the bits of those of its pages
    /// that are in the set. A word may come several times, each time with other bits.
    pub fn each_word(&self, mut each: impl FnMut(usize, u64)) {
        match &self.form {
            Form::Runs(runs) => runs.iter().for_each(|&run| words_of(run, &mut each)),
            Form::Bits(words) => {
                for (at, &word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
                    each(at, word);
                }
            }
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
        let needed = last.end.0.div_ceil(64) as usize;
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
        let counted: Pages = self.runs().map(PageRun::pages).sum();
        if counted != self.pages {
            return Err(format!("count is {:?}, runs have {counted:?}", self.pages));
        }
        Ok(())
    }
}

/// `run` without the pages that `words` has no bits for.
fn clip(words: &[u64], run: PageRun) -> PageRun {
    let end = u32::try_from(words.len() as u64 * 64).unwrap_or(u32::MAX);
    PageRun::new(run.start, run.end.min(PageNo(end)))
}

fn insert_run(runs: &mut Vec<PageRun>, run: PageRun) -> Pages {
    let first = runs.partition_point(|have| have.end < run.start);
    let last = first + runs[first..].partition_point(|have| have.start <= run.end);
    if first == last {
        runs.insert(first, run);
        return run.pages();
    }
    let had: Pages = runs[first..last].iter().map(|have| have.pages()).sum();
    let joined = PageRun::new(
        runs[first].start.min(run.start),
        runs[last - 1].end.max(run.end),
    );
    runs[first] = joined;
    runs.drain(first + 1..last);
    joined.pages() - had
}

fn insert_bits(words: &mut Vec<u64>, run: PageRun) -> Pages {
    let needed = run.end.0.div_ceil(64) as usize;
    if needed > words.len() {
        words.reserve_exact(needed - words.len());
        words.resize(needed, 0);
    }
    let mut added = 0;
    words_of(run, |word, mask| {
        added += (!words[word] & mask).count_ones();
        words[word] |= mask;
    });
    Pages(added)
}

fn remove_run(runs: &mut Vec<PageRun>, run: PageRun) -> Pages {
    let first = runs.partition_point(|have| have.end <= run.start);
    let last = first + runs[first..].partition_point(|have| have.start < run.end);
    if first == last {
        return Pages::NONE;
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

fn around_bits(words: &[u64], page: PageNo, inside: bool, window: PageRun) -> PageRun {
    let word_at = |index: usize| {
        let word = words.get(index).copied().unwrap_or(0);
        // One bits where membership differs from `page`'s.
        if inside { !word } else { word }
    };
    let mut start = window.start.0;
    let mut index = (page.0 / 64) as usize;
    let mut differ = word_at(index) & (mask(0, page.0 % 64 + 1));
    loop {
        if differ != 0 {
            start = start.max(index as u32 * 64 + 64 - differ.leading_zeros());
            break;
        }
        if index == 0 || (index as u32) * 64 <= window.start.0 {
            break;
        }
        index -= 1;
        differ = word_at(index);
    }
    let mut end = window.end.0;
    let mut index = (page.0 / 64) as usize;
    let mut differ = word_at(index) & (u64::MAX << (page.0 % 64));
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
    PageRun::new(PageNo(start), PageNo(end))
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
    let start = next_bit(words, window.start.0, 0)?;
    if start >= window.end.0 {
        return None;
    }
    let end = next_bit(words, start, u64::MAX).unwrap_or_else(|| words.len() as u32 * 64);
    Some(PageRun::from(start..end.min(window.end.0)))
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
