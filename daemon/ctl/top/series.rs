//! A curve of bounded size, however long it goes on.
//!
//! ```text
//!   push ──► open (mean of `stride` samples) ──► points ──[MOST reached]──► neighbours are merged, stride × 2
//! ```

/// Points that are kept: more than the dots of the widest terminal.
const MOST: usize = 2048;

/// Samples (x, y) with x growing. What is not finite is left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    points: Vec<(f64, f64)>,
    /// Sum and number of the samples of the point to come.
    open: (f64, f64, u64),
    /// Samples of a point, less one.
    more: u64,
}

impl Series {
    /// Takes in a sample.
    pub fn push(&mut self, x: f64, y: f64) {
        if !x.is_finite() || !y.is_finite() {
            return;
        }
        let (sum_x, sum_y, number) = self.open;
        self.open = (sum_x + x, sum_y + y, number + 1);
        if self.open.2 > self.more {
            self.points.extend(self.pending());
            self.open = (0.0, 0.0, 0);
        }
        if self.points.len() >= MOST {
            self.points = self.points.chunks(2).map(mean).collect();
            self.more = self.more * 2 + 1;
        }
    }

    fn pending(&self) -> Option<(f64, f64)> {
        let (x, y, number) = self.open;
        (number > 0).then(|| (x / number as f64, y / number as f64))
    }

    /// The points, the last one included that is not complete.
    pub fn points(&self) -> Vec<(f64, f64)> {
        self.points.iter().copied().chain(self.pending()).collect()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty() && self.open.2 == 0
    }

    /// The points as an average that forgets: a fiftieth of them is its memory.
    pub fn smooth(&self) -> Vec<(f64, f64)> {
        let mut points = self.points();
        let weight = 2.0 / (points.len() as f64 / 50.0 + 1.0).max(2.0);
        for i in 1..points.len() {
            points[i].1 = points[i - 1].1 + (points[i].1 - points[i - 1].1) * weight;
        }
        points
    }

    /// The mean in each of `width` equal parts from the first x to the last; none where no sample lies.
    pub fn columns(&self, width: usize) -> Vec<Option<f64>> {
        let points = self.points();
        let (Some(first), Some(last)) = (points.first(), points.last()) else { return Vec::new() };
        if points.len() <= width {
            return points.iter().map(|point| Some(point.1)).collect();
        }
        let mut sums = vec![(0.0, 0u32); width];
        for (x, y) in &points {
            let share = (x - first.0) / (last.0 - first.0);
            // The last one, and what a step back of the clock makes of it, lies in the last column.
            let column = if share >= 0.0 { (share * width as f64) as usize } else { 0 };
            if let Some(sum) = sums.get_mut(column.min(width.saturating_sub(1))) {
                *sum = (sum.0 + y, sum.1 + 1);
            }
        }
        sums.into_iter().map(|(sum, number)| (number > 0).then(|| sum / f64::from(number))).collect()
    }
}

fn mean(points: &[(f64, f64)]) -> (f64, f64) {
    let number = points.len().max(1) as f64;
    let sum = points.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
    (sum.0 / number, sum.1 / number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_keeps_its_shape_in_a_bounded_size() {
        let mut series = Series::default();
        for step in 0..1_000_000 {
            series.push(f64::from(step), f64::from(step) / 2.0);
        }
        let points = series.points();
        assert!(points.len() <= MOST + 1 && points.len() >= MOST / 2, "{}", points.len());
        assert!(points.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(points.iter().all(|(x, y)| (y - x / 2.0).abs() < 1e-6));
        assert!(points.last().unwrap().0 > 999_000.0);
        let columns = series.columns(10);
        assert_eq!(columns.len(), 10);
        assert!((columns[0].unwrap() - 25_000.0).abs() < 500.0, "{columns:?}");
        assert!(series.smooth().len() == points.len());
    }

    #[test]
    fn what_is_no_number_is_left_out() {
        let mut series = Series::default();
        series.push(f64::NAN, 1.0);
        series.push(1.0, f64::INFINITY);
        assert!(series.is_empty() && series.columns(5).is_empty() && series.smooth().is_empty());
        series.push(1.0, 2.0);
        assert_eq!((series.points(), series.columns(5)), (vec![(1.0, 2.0)], vec![Some(2.0)]));
        assert_eq!(series.columns(0), []);
    }
}
