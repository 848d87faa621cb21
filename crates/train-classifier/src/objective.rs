//! The training objective: the cross-entropy of multinomial logistic regression with an
//! L2 penalty, and its gradient.

use std::cell::{Cell, RefCell};

use argmin::core::{CostFunction, Error, Gradient};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, ShapeError, s};

use super::model::best_class;

/// Products of cells and classes between two checks of the stop signal: a few hundredths
/// of a second.
const BLOCK_WORK: usize = 1 << 22;

/// Computing a score's exponential costs about this many products.
const SCORE_WORK: usize = 10;

/// A line search that needs more evaluations than this has stalled.
const MAX_EVALUATIONS: u32 = 100;

/// The rows trained on.
pub(super) struct Examples {
    /// `rows × features`, standardised.
    pub features: Array2<f64>,
    /// Each row's class, below `classes`.
    pub labels: Vec<usize>,
    pub classes: usize,
}

/// The objective: the mean over the rows of `-ln p(label)`, plus `l2 / (2 rows)` times
/// the sum of the squared weights; the intercepts are not penalised. As a mean, its
/// gradient has a length of about 1 at the start, which suits the solver's first step.
///
/// Parameters are one vector: the weights, `features × classes` row after row,
/// then the `classes` intercepts.
pub(super) struct Objective<'a> {
    examples: &'a Examples,
    l2: f64,
    stopped: &'a dyn Fn() -> bool,
    evaluations: Cell<u32>,
    /// The solver asks for cost and gradient of one point by turns.
    newest: RefCell<Option<Evaluated>>,
}

type Divided<'p> = (ArrayView2<'p, f64>, ArrayView1<'p, f64>);

/// The objective at one point.
#[derive(Debug, Clone)]
pub(super) struct Evaluated {
    pub params: Array1<f64>,
    pub cost: f64,
    gradient: Array1<f64>,
    /// The mean cross-entropy, without the penalty.
    pub loss: f64,
    /// How many rows are predicted right.
    pub right: usize,
}

impl<'a> Objective<'a> {
    pub fn new(examples: &'a Examples, l2: f64, stopped: &'a dyn Fn() -> bool) -> Self {
        Self {
            examples,
            l2,
            stopped,
            evaluations: Cell::new(0),
            newest: RefCell::new(None),
        }
    }

    /// The starting point: every parameter 0.
    pub fn origin(&self) -> Array1<f64> {
        Array1::zeros((self.examples.features.ncols() + 1) * self.examples.classes)
    }

    /// Resets the evaluation limit for a new line search.
    pub fn begin_iteration(&self) {
        self.evaluations.set(0);
    }

    /// Splits parameters into weights (`features × classes`) and intercepts.
    pub fn divide<'p>(&self, params: &'p Array1<f64>) -> Result<Divided<'p>, ShapeError> {
        let (features, classes) = (self.examples.features.ncols(), self.examples.classes);
        let (weights, intercepts) = params.view().split_at(Axis(0), features * classes);
        Ok((
            weights.into_shape_with_order((features, classes))?,
            intercepts,
        ))
    }

    /// Cost and gradient at `params`.
    ///
    /// # Errors
    /// Fails when asked to stop, when the cost is not finite, or after too many
    /// evaluations in one iteration.
    pub fn evaluate(&self, params: &Array1<f64>) -> Result<Evaluated, Error> {
        if let Some(newest) = self.newest.borrow().as_ref()
            && newest.params == params
        {
            return Ok(newest.clone());
        }
        self.evaluations.set(self.evaluations.get() + 1);
        anyhow::ensure!(
            self.evaluations.get() <= MAX_EVALUATIONS,
            "the line search does not end"
        );
        let evaluated = self.evaluate_anew(params)?;
        self.newest.replace(Some(evaluated.clone()));
        Ok(evaluated)
    }

    fn evaluate_anew(&self, params: &Array1<f64>) -> Result<Evaluated, Error> {
        let (weights, _) = self.divide(params)?;
        let penalty = self.l2 / self.examples.labels.len() as f64;
        let sums = self.sum_over_rows(params)?;
        let rows = self.examples.labels.len() as f64;

        let mut gradient = sums.gradient;
        gradient /= rows;
        let held_down = weights.len();
        let mut held = gradient.slice_mut(s![..held_down]);
        held.scaled_add(penalty, &params.slice(s![..held_down]));

        let loss = sums.loss / rows;
        let squares: f64 = weights.iter().map(|weight| weight * weight).sum();
        let cost = loss + 0.5 * penalty * squares;
        anyhow::ensure!(
            cost.is_finite() && gradient.iter().all(|slope| slope.is_finite()),
            "the numbers grow beyond every bound"
        );
        Ok(Evaluated {
            params: params.clone(),
            cost,
            gradient,
            loss,
            right: sums.right,
        })
    }

    /// Processes the rows in blocks, so that few scores are in memory and a stop is
    /// noticed soon.
    fn sum_over_rows(&self, params: &Array1<f64>) -> Result<Sums, Error> {
        let Examples {
            features,
            labels,
            classes,
        } = self.examples;
        let (weights, intercepts) = self.divide(params)?;
        let (rows, width) = features.dim();
        let block = (BLOCK_WORK / ((width + SCORE_WORK) * classes)).clamp(1, rows);

        let mut slopes = Array2::zeros((width, *classes));
        let mut intercept_slopes = vec![0.0; *classes];
        let mut scores = Array2::zeros((block, *classes));
        let (mut loss, mut right) = (0.0, 0);
        for start in (0..rows).step_by(block) {
            anyhow::ensure!(!(self.stopped)(), "stopped");
            let end = (start + block).min(rows);
            let part = features.slice(s![start..end, ..]);
            let mut scores = scores.slice_mut(s![..end - start, ..]);
            scores.assign(&intercepts);
            general_mat_mul(1.0, &part, &weights, 1.0, &mut scores);
            for (mut row, label) in scores.rows_mut().into_iter().zip(&labels[start..end]) {
                let row = row.as_slice_mut().unwrap_or_default();
                right += usize::from(best_class(row.iter().copied()) == *label);
                loss += cross_entropy(row, *label);
                for (sum, slope) in intercept_slopes.iter_mut().zip(row.iter()) {
                    *sum += slope;
                }
            }
            general_mat_mul(1.0, &part.t(), &scores, 1.0, &mut slopes);
        }
        let mut gradient = slopes.into_raw_vec_and_offset().0;
        gradient.extend(intercept_slopes);
        Ok(Sums {
            gradient: gradient.into(),
            loss,
            right,
        })
    }
}

/// Sums over the training rows, without the penalty.
struct Sums {
    gradient: Array1<f64>,
    loss: f64,
    right: usize,
}

/// Returns `-ln softmax(scores)[label]` and replaces the scores by its gradient. Measures
/// from the row's highest score, so that nothing overflows.
fn cross_entropy(scores: &mut [f64], label: usize) -> f64 {
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let below_top = top - scores[label];
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - top).exp();
        sum += *score;
    }
    for score in scores.iter_mut() {
        *score /= sum;
    }
    scores[label] -= 1.0;
    below_top + sum.ln()
}

/// The objective as the solver's problem. Borrowed, since the solver drops what it owns
/// when it gives up.
pub(super) struct Shared<'a>(pub &'a Objective<'a>);

impl CostFunction for Shared<'_> {
    type Param = Array1<f64>;
    type Output = f64;

    fn cost(&self, params: &Self::Param) -> Result<f64, Error> {
        Ok(self.0.evaluate(params)?.cost)
    }
}

impl Gradient for Shared<'_> {
    type Param = Array1<f64>;
    type Gradient = Array1<f64>;

    fn gradient(&self, params: &Self::Param) -> Result<Self::Gradient, Error> {
        Ok(self.0.evaluate(params)?.gradient)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> Examples {
        Examples {
            features: ndarray::array![[1.0, -2.0], [0.5, 0.3], [-1.5, 2.0], [0.0, 1.0]],
            labels: vec![0, 2, 1, 2],
            classes: 3,
        }
    }

    #[test]
    fn the_gradient_is_the_slope_of_the_cost() {
        let examples = examples();
        let objective = Objective::new(&examples, 0.7, &|| false);
        let point = Array1::from_shape_fn(9, |index| (index as f64 * 1.3).sin());
        let gradient = objective.evaluate(&point).unwrap().gradient;
        for index in 0..9 {
            let at = |offset: f64| {
                let mut moved = point.clone();
                moved[index] += offset;
                objective.evaluate(&moved).unwrap().cost
            };
            let slope = (at(1e-6) - at(-1e-6)) / 2e-6;
            assert!((slope - gradient[index]).abs() < 1e-8, "{index}");
        }
    }

    #[test]
    fn at_the_origin_every_class_is_as_likely() {
        let examples = examples();
        let objective = Objective::new(&examples, 1.0, &|| false);
        let start = objective.evaluate(&objective.origin()).unwrap();
        assert!((start.loss - 3f64.ln()).abs() < 1e-12);
        assert_eq!(start.cost, start.loss);
    }

    #[test]
    fn scores_far_apart_neither_overflow_nor_lose_the_loss() {
        let mut scores = [1_000.0, -1_000.0];
        assert_eq!(cross_entropy(&mut scores, 1), 2_000.0);
        assert_eq!(scores, [1.0, -1.0]);
    }

    #[test]
    fn a_stop_ends_an_evaluation() {
        let examples = examples();
        let objective = Objective::new(&examples, 1.0, &|| true);
        assert!(objective.evaluate(&objective.origin()).is_err());
    }
}
