//! Samples of a time, as few numbers.

/// What some samples have in common. Times on a busy machine have a long tail, so the middle is the median, and the spread
/// the range of the middle half.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Statistics {
    /// Samples.
    pub count: usize,
    /// The smallest.
    pub least: f64,
    /// A quarter is below.
    pub lower: f64,
    /// Half are below.
    pub median: f64,
    /// Three quarters are below.
    pub upper: f64,
}

impl Statistics {
    /// Of samples, of which there must be one; those that are no numbers are left out.
    pub fn of(samples: &[f64]) -> Option<Statistics> {
        let mut sorted: Vec<f64> = samples.iter().copied().filter(|sample| sample.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        Some(Statistics {
            count: sorted.len(),
            least: *sorted.first()?,
            lower: quantile(&sorted, 0.25)?,
            median: quantile(&sorted, 0.5)?,
            upper: quantile(&sorted, 0.75)?,
        })
    }

    /// The range of the middle half, as a share of the median.
    pub fn spread(&self) -> f64 {
        if self.median > 0.0 { (self.upper - self.lower) / self.median } else { 0.0 }
    }
}

/// Linear between the two samples that are nearest (type 7 of Hyndman and Fan, The American Statistician 50(4), 1996).
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = share * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted.get(place.floor() as usize)?, sorted.get(place.ceil() as usize)?);
    Some(below + (above - below) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_a_hand() {
        let of = |samples: &[f64]| Statistics::of(samples).unwrap();
        let found = of(&[4.0, 1.0, 3.0, 2.0, 100.0]);
        assert_eq!((found.count, found.least), (5, 1.0));
        assert_eq!((found.lower, found.median, found.upper), (2.0, 3.0, 4.0));
        assert_eq!(found.spread(), 2.0 / 3.0);
        // Between two samples.
        let found = of(&[1.0, 2.0, 3.0, 4.0]);
        assert_eq!((found.lower, found.median, found.upper), (1.75, 2.5, 3.25));
        let one = of(&[7.0]);
        assert_eq!((one.lower, one.median, one.upper, one.spread()), (7.0, 7.0, 7.0, 0.0));
    }

    #[test]
    fn what_is_no_number_does_not_count() {
        assert_eq!(Statistics::of(&[]), None);
        assert_eq!(Statistics::of(&[f64::NAN, f64::INFINITY]), None);
        assert_eq!(Statistics::of(&[f64::NAN, 2.0]).unwrap().median, 2.0);
        assert_eq!(Statistics::of(&[0.0, 0.0]).unwrap().spread(), 0.0);
    }
}
