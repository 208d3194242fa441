//! Tables of Markdown pages, as cells of text.

/// The first table below the heading: its header, then its rows.
pub fn below<'a>(page: &'a str, heading: &str) -> Option<Vec<Vec<&'a str>>> {
    let mut lines = page
        .lines()
        .skip_while(|line| !is_heading(line, heading))
        .skip(1)
        .skip_while(|line| !line.starts_with('|') && !line.starts_with('#'))
        .take_while(|line| line.starts_with('|'));
    let header = lines.next()?;
    // The rule between them.
    lines.next()?;
    let rows = std::iter::once(header).chain(lines);
    Some(rows.map(cells).collect())
}

fn is_heading(line: &str, heading: &str) -> bool {
    line.starts_with('#') && line.trim_start_matches('#').trim() == heading
}

fn cells(line: &str) -> Vec<&str> {
    let inner = line.trim().trim_start_matches('|').trim_end_matches('|');
    inner.split('|').map(|cell| cell.trim()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_the_heading_is_found() {
        let page = "\
# One
| a |
|---|
| 1 |
## Two
Text.

| b | c |
|---|---|
| 2 |   |
| 3 | x |
End.
## Three
";
        let expected = vec![vec!["b", "c"], vec!["2", ""], vec!["3", "x"]];
        assert_eq!(below(page, "Two"), Some(expected));
        assert_eq!(below(page, "Three"), None);
        assert_eq!(below(page, "Four"), None);
    }
}
