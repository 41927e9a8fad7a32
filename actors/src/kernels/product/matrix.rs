//! Matrices as they lie in memory, and parts of them.

/// A matrix of `f32` with any strides.
#[derive(Debug, Clone, Copy)]
pub struct MatrixView<'a> {
    pub(super) values: &'a [f32],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<'a> MatrixView<'a> {
    /// A view of `values`, `[rows, columns]` large, with the distances between neighbouring rows and
    /// neighbouring columns.
    ///
    /// # Panics
    /// If the last element lies outside `values`.
    #[must_use]
    pub fn new(
        values: &'a [f32],
        [rows, columns]: [usize; 2],
        [row_stride, column_stride]: [usize; 2],
    ) -> Self {
        if rows > 0 && columns > 0 {
            let last = (rows - 1) * row_stride + (columns - 1) * column_stride;
            assert!(
                last < values.len(),
                "a {rows}x{columns} matrix ends at value {last} of {}",
                values.len()
            );
        }
        Self {
            values,
            rows,
            columns,
            row_stride,
            column_stride,
        }
    }

    /// A view of a matrix whose rows follow one another.
    ///
    /// # Panics
    /// If `values` is too short.
    #[must_use]
    pub fn row_major(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::new(values, [rows, columns], [columns, 1])
    }

    /// The same with rows and columns exchanged.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// How many rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// `count` rows from `start` on.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn rows_from(&self, start: usize, count: usize) -> Self {
        assert!(
            start + count <= self.rows,
            "rows {start} and {count} more of {}",
            self.rows
        );
        let all = Span {
            start: 0,
            length: self.columns,
        };
        self.part(
            Span {
                start,
                length: count,
            },
            all,
        )
    }

    /// The value there.
    #[inline(always)]
    pub(super) fn value(&self, row: usize, column: usize) -> f32 {
        self.values[row * self.row_stride + column * self.column_stride]
    }

    pub(super) fn part(&self, rows: Span, columns: Span) -> Self {
        let start = rows.start * self.row_stride + columns.start * self.column_stride;
        Self::new(
            self.values.get(start..).unwrap_or_default(),
            [rows.length, columns.length],
            [self.row_stride, self.column_stride],
        )
    }
}

/// Some neighbouring rows or columns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) start: usize,
    pub(super) length: usize,
}

/// `0..total` in spans of `length` and a shorter last one.
pub(super) fn spans(total: usize, length: usize) -> impl Iterator<Item = Span> + Clone {
    (0..total).step_by(length.max(1)).map(move |start| Span {
        start,
        length: length.min(total - start),
    })
}
