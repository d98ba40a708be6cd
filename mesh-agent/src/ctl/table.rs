//! Owns plain text tables: aligned columns, no borders, so that `awk` works on them too.

/// Side of a column that its cells are pushed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table under construction.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<(&'static str, Align)>,
    /// How many of the columns, the last ones, have cells added by [`Table::more`].
    wide: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Starts a table with a heading for each column.
    pub(super) fn new(columns: &[(&'static str, Align)]) -> Self {
        Self { columns: columns.to_vec(), wide: 0, rows: Vec::new() }
    }

    /// Has more columns at the end, if there is room for them (`-o wide`).
    pub(super) fn widened(mut self, wide: bool, columns: &[(&'static str, Align)]) -> Self {
        if wide {
            self.columns.extend_from_slice(columns);
            self.wide += columns.len();
        }
        self
    }

    /// Adds a row. An empty cell is printed as `-`, so that the columns can be counted.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.columns.len() - self.wide, "a cell for each column");
        self.rows.push(cells.into_iter().map(printed).collect());
    }

    /// Adds the cells of the columns that only a wide table has to the last row.
    pub(super) fn more<const N: usize>(&mut self, cells: [String; N]) {
        if let Some(row) = self.rows.last_mut().filter(|_| self.wide > 0) {
            debug_assert_eq!(N, self.wide, "a cell for each column");
            row.extend(cells.into_iter().map(printed));
        }
    }

    /// Whether no row was added.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The text, each line ended.
    pub(super) fn render(&self) -> String {
        let mut widths: Vec<usize> =
            self.columns.iter().map(|(heading, _)| heading.chars().count()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let headings: Vec<String> = self.columns.iter().map(|(heading, _)| (*heading).to_owned()).collect();
        let mut out = String::new();
        for row in std::iter::once(&headings).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(&self.columns) {
                let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
                match align {
                    Align::Left => line.extend([cell.as_str(), &pad, "  "]),
                    Align::Right => line.extend([pad.as_str(), cell, "  "]),
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

fn printed(cell: String) -> String {
    if cell.is_empty() { "-".to_owned() } else { cell.replace(['\n', '\t'], " ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_for_which_there_is_room_come_last() {
        let of = |wide| {
            let mut table =
                Table::new(&[("A", Align::Left)]).widened(wide, &[("B", Align::Left), ("C", Align::Right)]);
            table.row(["1".into()]);
            table.more(["2".into(), String::new()]);
            table.render()
        };
        assert_eq!(of(false), "A\n1\n");
        assert_eq!(of(true), "A  B  C\n1  2  -\n");
    }

    #[test]
    fn columns_line_up_and_numbers_stand_right() {
        let mut table = Table::new(&[("NAME", Align::Left), ("CONNS", Align::Right), ("WHY", Align::Left)]);
        table.row(["reviews".into(), "7".into(), String::new()]);
        table.row(["b".into(), "123456".into(), "port 15001\nis taken".into()]);
        assert_eq!(
            table.render(),
            "NAME      CONNS  WHY\n\
             reviews       7  -\n\
             b        123456  port 15001 is taken\n"
        );
    }

    #[test]
    fn width_is_counted_in_characters() {
        let mut table = Table::new(&[("T", Align::Left), ("X", Align::Left)]);
        table.row(["5 µs".into(), "1".into()]);
        table.row(["5 ns".into(), "2".into()]);
        assert_eq!(table.render(), "T     X\n5 µs  1\n5 ns  2\n");
    }
}
