//! Splits a table's rows into training rows and held-out rows.

use fastrand::Rng;

/// Row numbers of the two parts, which together are every row once.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Split {
    pub train: Vec<usize>,
    pub test: Vec<usize>,
}

/// Holds out `test_fraction` of the rows at random, stratified by class as closely as
/// whole rows allow, and keeps at least one row of each class for training. `labels` are
/// class numbers below `classes`, each in use. The same arguments give the same split.
///
/// Returns `None` when there are too few rows to hold out even one.
pub(super) fn stratified(
    labels: &[usize],
    classes: usize,
    test_fraction: f64,
    seed: u64,
) -> Option<Split> {
    let spare = labels.len().checked_sub(classes).filter(|rows| *rows > 0)?;
    let held_out = (labels.len() as f64 * test_fraction).round() as usize;
    let held_out = held_out.clamp(1, spare);

    let mut order: Vec<usize> = (0..labels.len()).collect();
    Rng::with_seed(seed).shuffle(&mut order);
    order.sort_by_key(|row| labels[*row]); // stable: shuffled within each class

    let mut split = Split {
        train: Vec::with_capacity(labels.len() - held_out),
        test: Vec::with_capacity(held_out),
    };
    let mut class = None;
    let mut candidates = 0;
    for row in order {
        if class.replace(labels[row]) != Some(labels[row]) {
            split.train.push(row); // the class's one sure training row
            continue;
        }
        candidates += 1;
        // Every `spare / held_out`-th candidate, which spreads over the classes.
        if candidates * held_out / spare > split.test.len() {
            split.test.push(row);
        } else {
            split.train.push(row);
        }
    }
    Some(split)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 30 rows of class 0, 20 of class 1, 10 of class 2.
    fn labels() -> Vec<usize> {
        [vec![0; 30], vec![1; 20], vec![2; 10]].concat()
    }

    #[test]
    fn each_class_is_held_out_in_its_share() {
        let labels = labels();
        let split = stratified(&labels, 3, 0.2, 1).unwrap();
        let mut counts = [0; 3];
        split.test.iter().for_each(|row| counts[labels[*row]] += 1);
        assert_eq!(split.test.len(), 12);
        assert_eq!(counts, [6, 4, 2]);
    }

    #[test]
    fn every_row_is_in_one_part() {
        let split = stratified(&labels(), 3, 0.37, 5).unwrap();
        let mut rows = [split.train, split.test].concat();
        rows.sort_unstable();
        assert_eq!(rows, (0..60).collect::<Vec<_>>());
    }

    #[test]
    fn the_seed_decides_the_split() {
        let split = |seed| stratified(&labels(), 3, 0.2, seed);
        assert_eq!(split(7), split(7));
        assert_ne!(split(7), split(8));
    }

    #[test]
    fn every_class_keeps_a_training_row() {
        let split = stratified(&[0, 0, 1, 1, 2], 3, 0.99, 1).unwrap();
        assert_eq!((split.train.len(), split.test.len()), (3, 2));
    }

    #[test]
    fn a_small_fraction_still_holds_out_one_row() {
        assert_eq!(stratified(&labels(), 3, 0.001, 1).unwrap().test.len(), 1);
    }

    #[test]
    fn one_row_per_class_cannot_be_split() {
        assert_eq!(stratified(&[0, 1, 2], 3, 0.5, 1), None);
    }
}
