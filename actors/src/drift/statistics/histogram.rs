//! Histograms over the union of two samples, and the population stability index.
//!
//! Bins are Sturges' (1926), edges and the side an edge belongs to are numpy's (`histogram(x, edges)`): every bin is
//! `[left, right)` but the last, which is closed.

/// Equal-width edges over both ascending samples by Sturges' rule: `ceil(log2(n) + 1)` bins, so that many plus one
/// edges. `None` when both are empty or all values are equal (there is nothing to tell apart).
#[must_use]
pub fn sturges_edges(reference: &[f64], current: &[f64]) -> Option<Vec<f64>> {
    let ends = [
        reference.first(),
        current.first(),
        reference.last(),
        current.last(),
    ];
    let low = ends.iter().flatten().copied().copied().reduce(f64::min)?;
    let high = ends.iter().flatten().copied().copied().reduce(f64::max)?;
    edges_between(low, high, (reference.len() + current.len()) as u64)
}

fn edges_between(low: f64, high: f64, total: u64) -> Option<Vec<f64>> {
    // A subtraction that underflows to nothing, or overflows, cannot be cut into bins.
    let range = high - low;
    if range <= 0.0 || !range.is_finite() {
        return None;
    }
    let bins = ((total as f64).log2() + 1.0).ceil() as usize;
    let step = range / bins as f64;
    let mut edges: Vec<f64> = (0..bins).map(|bin| low + bin as f64 * step).collect();
    edges.push(high);
    Some(edges)
}

/// Counts an ascending sample into bins; values outside the edges belong to none.
fn counts(sample: &[f64], edges: &[f64]) -> Vec<u64> {
    let last = edges.len() - 1;
    let below = |edge: usize| {
        if edge == last {
            sample.partition_point(|x| *x <= edges[edge])
        } else {
            sample.partition_point(|x| *x < edges[edge])
        }
    };
    (0..last)
        .map(|bin| (below(bin + 1).saturating_sub(below(bin))) as u64)
        .collect()
}

/// The population stability index of two ascending samples over Sturges bins of their union; `None` when one is empty,
/// `0` when every value of both is the same.
#[must_use]
pub fn population_stability_index(reference: &[f64], current: &[f64]) -> Option<f64> {
    if reference.is_empty() || current.is_empty() {
        return None;
    }
    let Some(edges) = sturges_edges(reference, current) else {
        return Some(0.0);
    };
    psi_of_counts(&counts(reference, &edges), &counts(current, &edges))
}

/// Counts ascending points, each for as many as it stands for; values outside the edges belong to none.
fn counts_of_points(points: &[(f64, u64)], edges: &[f64]) -> Vec<u64> {
    let mut counts = vec![0; edges.len() - 1];
    let last = counts.len() - 1;
    let mut bin = 0;
    for (value, count) in points.iter().filter(|(value, _)| *value >= edges[0]) {
        while bin < last && *value >= edges[bin + 1] {
            bin += 1;
        }
        if *value <= edges[last + 1] {
            counts[bin] += count;
        }
    }
    counts
}

/// The same of a reference that is known by ascending points, each of which stands for as many values as its second number says, and by its
/// smallest and largest value.
#[must_use]
pub fn population_stability_index_of_points(
    reference: &[(f64, u64)],
    (smallest, largest): (f64, f64),
    current: &[f64],
) -> Option<f64> {
    let total: u64 = reference.iter().map(|(_, count)| count).sum();
    let (first, last) = (current.first()?, current.last()?);
    let total = total + current.len() as u64;
    let Some(edges) = edges_between(smallest.min(*first), largest.max(*last), total) else {
        return Some(0.0);
    };
    psi_of_counts(
        &counts_of_points(reference, &edges),
        &counts(current, &edges),
    )
}

/// The population stability index of two aligned histograms, `Σ (r − c)·ln(r / c)` over shares; `None` when one of them
/// counts nothing or their lengths differ.
///
/// An empty bin is filled with a millionth of the histogram's smallest share if that is at most `1e-4`, else `1e-4`.
#[must_use]
pub fn psi_of_counts(reference: &[u64], current: &[u64]) -> Option<f64> {
    if reference.len() != current.len() {
        return None;
    }
    let reference = filled_shares(reference)?;
    let current = filled_shares(current)?;
    Some(
        reference
            .iter()
            .zip(&current)
            .map(|(r, c)| (r - c) * (r / c).ln())
            .sum(),
    )
}

fn filled_shares(counts: &[u64]) -> Option<Vec<f64>> {
    let total: u64 = counts.iter().sum();
    let smallest = counts.iter().copied().filter(|count| *count > 0).min()?;
    let smallest_share = smallest as f64 / total as f64;
    let fill = if smallest_share <= 1e-4 {
        smallest_share / 1e6
    } else {
        1e-4
    };
    let share = |count: &u64| {
        if *count == 0 {
            fill
        } else {
            *count as f64 / total as f64
        }
    };
    Some(counts.iter().map(share).collect())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, golden_pair};
    use super::*;

    #[test]
    fn golden_pair_matches_the_reference_values() {
        let (reference, current) = golden_pair();
        let edges = sturges_edges(&reference, &current).unwrap();
        assert_eq!(edges.len() - 1, 12);
        assert_eq!(counts(&reference, &edges)[10..], [42, 0]);
        assert_eq!(counts(&current, &edges)[..2], [42, 87]);
        let psi = population_stability_index(&reference, &current).unwrap();
        assert_close(psi, 0.680_975_736_089_847_1);
    }

    #[test]
    fn the_last_bin_is_closed_and_the_others_are_not() {
        assert_eq!(counts(&[0.0, 1.0, 1.0, 2.0], &[0.0, 1.0, 2.0]), [1, 3]);
        assert_eq!(counts(&[-1.0, 3.0], &[0.0, 1.0, 2.0]), [0, 0]);
    }

    #[test]
    fn points_count_as_the_values_they_stand_for() {
        let (reference, current) = golden_pair();
        let points: Vec<(f64, u64)> = reference.iter().map(|value| (*value, 1)).collect();
        let ends = (reference[0], reference[999]);
        let psi = population_stability_index_of_points(&points, ends, &current).unwrap();
        assert_close(psi, 0.680_975_736_089_847_1);
        let edges = [0.0, 1.0, 2.0];
        let points = [(-1.0, 5), (0.0, 2), (1.0, 3), (2.0, 4), (2.5, 7)];
        assert_eq!(counts_of_points(&points, &edges), [2, 7]);
        assert_eq!(
            population_stability_index_of_points(&[(1.0, 9)], (1.0, 1.0), &[1.0]),
            Some(0.0)
        );
        assert_eq!(
            population_stability_index_of_points(&[], ends, &current),
            None
        );
    }

    #[test]
    fn constant_and_empty_samples() {
        assert_eq!(population_stability_index(&[], &[1.0]), None);
        assert_eq!(population_stability_index(&[0.0; 20], &[0.0; 9]), Some(0.0));
        let apart = population_stability_index(&[0.0; 20], &[1.0; 9]).unwrap();
        assert!(apart.is_finite() && apart > 10.0, "{apart}");
        let tiny = population_stability_index(&[0.0], &[f64::MIN_POSITIVE]).unwrap();
        assert!(tiny.is_finite(), "{tiny}");
        let huge = population_stability_index(&[f64::MIN], &[f64::MAX]).unwrap();
        assert!(huge.is_finite(), "{huge}");
        assert_eq!(psi_of_counts(&[0, 0], &[1, 2]), None);
        assert_eq!(psi_of_counts(&[1], &[1, 2]), None);
    }

    #[test]
    fn a_rare_bin_fills_zeros_with_a_millionth_of_itself() {
        let shares = filled_shares(&[0, 1, 99_999]).unwrap();
        assert_close(shares[0], 1e-11);
        let shares = filled_shares(&[0, 1, 9]).unwrap();
        assert_close(shares[0], 1e-4);
    }
}
