//! Trains the weights by L-BFGS, one iteration at a time.
//!
//! Does not use linfa-logistic, which has the same solver: its fit is one call that can
//! be neither watched nor stopped. It also measures every row's scores from the highest
//! of the whole table, so with widely spread scores its loss goes wrong and the search
//! stalls (tried in warm-started chunks of ten iterations, it left some splits of the
//! digits below 0.90 accuracy).

use argmin::core::{IterState, Problem, Solver, State};
use argmin::solver::linesearch::MoreThuenteLineSearch;
use argmin::solver::quasinewton::LBFGS;
use ndarray::{Array1, Array2};

use super::error::TrainError;
use super::objective::{Evaluated, Examples, Objective, Shared};

/// How many past steps the solver keeps to estimate curvature.
const MEMORY: usize = 10;

/// Training has converged when the gradient's norm, or the change of the objective in one
/// iteration, is below its tolerance.
const GRADIENT_TOLERANCE: f64 = 1e-5;
const CHANGE_TOLERANCE: f64 = 1e-8;

/// When to stop, and how strongly to penalise large weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub max_iterations: u64,
    pub l2: f64,
}

/// The progress of the training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    pub iteration: u64,
    /// Mean cross-entropy over the training rows, in nats.
    pub loss: f64,
    /// Share of the training rows predicted right.
    pub accuracy: f64,
}

/// The trained weights.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fitted {
    /// `features × classes`.
    pub weights: Array2<f64>,
    /// One per class.
    pub intercepts: Array1<f64>,
    pub last: Step,
    /// False if the iterations ran out, or the solver could not improve, before a
    /// tolerance was met.
    pub converged: bool,
}

type Vector = Array1<f64>;
type Lbfgs = LBFGS<MoreThuenteLineSearch<Vector, Vector, f64>, Vector, Vector, f64>;
type Iterate = IterState<Vector, Vector, (), (), (), f64>;

/// Trains until it converges or runs out of iterations, calling `watch` before the first
/// iteration and after each.
///
/// # Errors
/// [`TrainError::Stopped`] once `stopped`, checked several times an iteration, returns
/// true; [`TrainError::Dataset`] when the solver cannot make a first step.
pub(super) fn fit(
    examples: &Examples,
    limits: Limits,
    stopped: &dyn Fn() -> bool,
    watch: &mut dyn FnMut(Step),
) -> Result<Fitted, TrainError> {
    let objective = Objective::new(examples, limits.l2, stopped);
    let failed = |error| match stopped() {
        true => TrainError::Stopped,
        false => cannot_train(&error),
    };
    let mut tell = |step| {
        watch(step);
        match stopped() {
            true => Err(TrainError::Stopped),
            false => Ok(()),
        }
    };
    let mut best = objective.evaluate(&objective.origin()).map_err(failed)?;
    tell(step(examples, 0, &best))?;
    let mut descent = Descent::new(&objective).map_err(failed)?;
    let mut iteration = 0;
    while iteration < limits.max_iterations && !descent.converged() {
        match descent.advance() {
            Ok(next) => best = next,
            Err(error) if stopped() || iteration == 0 => return Err(failed(error)),
            // Rounding can leave no improving step; the current weights stand.
            Err(_) => break,
        }
        iteration += 1;
        tell(step(examples, iteration, &best))?;
    }
    let divided = objective.divide(&best.params);
    let (weights, intercepts) = divided.map_err(|error| cannot_train(&error.into()))?;
    Ok(Fitted {
        weights: weights.to_owned(),
        intercepts: intercepts.to_owned(),
        last: step(examples, iteration, &best),
        converged: descent.converged(),
    })
}

fn cannot_train(error: &argmin::core::Error) -> TrainError {
    TrainError::Dataset(format!("cannot train on this table: {error}"))
}

fn step(examples: &Examples, iteration: u64, at: &Evaluated) -> Step {
    let rows = examples.labels.len() as f64;
    Step {
        iteration,
        loss: at.loss,
        accuracy: at.right as f64 / rows,
    }
}

/// Drives the solver by hand: argmin's own loop can neither be watched nor stopped with
/// borrowed state.
struct Descent<'a> {
    objective: &'a Objective<'a>,
    problem: Problem<Shared<'a>>,
    solver: Lbfgs,
    /// `None` once the solver has given up.
    state: Option<Iterate>,
}

impl<'a> Descent<'a> {
    fn new(objective: &'a Objective<'a>) -> Result<Self, argmin::core::Error> {
        let mut problem = Problem::new(Shared(objective));
        let mut solver = LBFGS::new(MoreThuenteLineSearch::new(), MEMORY)
            .with_tolerance_grad(GRADIENT_TOLERANCE)?
            .with_tolerance_cost(CHANGE_TOLERANCE)?;
        let start = IterState::new().param(objective.origin());
        let (mut state, _) = solver.init(&mut problem, start)?;
        state.update();
        Ok(Self {
            objective,
            problem,
            solver,
            state: Some(state),
        })
    }

    fn converged(&mut self) -> bool {
        let Some(state) = &self.state else {
            return false;
        };
        <Lbfgs as Solver<Shared<'_>, Iterate>>::terminate(&mut self.solver, state).terminated()
    }

    /// Makes one iteration and returns its result.
    fn advance(&mut self) -> Result<Evaluated, argmin::core::Error> {
        let gave_up = || anyhow::anyhow!("no step improves on the weights");
        let state = self.state.take().ok_or_else(gave_up)?;
        let cost_before = state.get_cost();
        self.objective.begin_iteration();
        let (mut state, _) = self.solver.next_iter(&mut self.problem, state)?;
        if let Some(reason) = state.get_termination_reason() {
            anyhow::bail!("{reason}");
        }
        let params = state.get_param().ok_or_else(gave_up)?;
        let reached = self.objective.evaluate(params)?;
        anyhow::ensure!(reached.cost <= cost_before, gave_up());
        state.update();
        state.increment_iter();
        self.state = Some(state);
        Ok(reached)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Two overlapping classes on a line, so that training converges.
    fn examples(rows: usize) -> Examples {
        let x = |row: usize| ((row * 37) % 101) as f64 / 50.0 - 1.0;
        let noise = |row: usize| ((row * 53) % 89) as f64 / 60.0 - 0.75;
        Examples {
            features: Array2::from_shape_fn((rows, 1), |(row, _)| x(row)),
            labels: (0..rows)
                .map(|row| usize::from(x(row) + noise(row) > 0.0))
                .collect(),
            classes: 2,
        }
    }

    fn fit_all(examples: &Examples, max_iterations: u64, l2: f64) -> (Fitted, Vec<Step>) {
        let limits = Limits { max_iterations, l2 };
        let mut steps = Vec::new();
        let fitted = fit(examples, limits, &|| false, &mut |step| steps.push(step));
        (fitted.unwrap(), steps)
    }

    #[test]
    fn the_loss_falls_with_every_iteration_until_it_converges() {
        let (fitted, steps) = fit_all(&examples(300), 100, 0.0);
        assert!(fitted.converged);
        assert_eq!(steps.last(), Some(&fitted.last));
        assert!((steps[0].loss - 2f64.ln()).abs() < 1e-12);
        assert!(fitted.last.accuracy > 0.7);
        assert!(steps.is_sorted_by(|a, b| a.iteration + 1 == b.iteration && a.loss >= b.loss));
    }

    #[test]
    fn no_more_iterations_are_made_than_allowed() {
        let (fitted, _) = fit_all(&examples(300), 2, 0.0);
        assert_eq!((fitted.last.iteration, fitted.converged), (2, false));
    }

    #[test]
    fn l2_holds_the_weights_down() {
        let size = |l2| fit_all(&examples(300), 100, l2).0.weights[[0, 1]].abs();
        assert!(size(100.0) < size(1.0) && size(1.0) < size(0.0));
    }

    #[test]
    fn a_stop_between_iterations_ends_training() {
        let limits = Limits {
            max_iterations: 100,
            l2: 1.0,
        };
        for stop_after in 0..2 {
            let stop = Cell::new(false);
            let mut last = None;
            let fitted = fit(&examples(300), limits, &|| stop.get(), &mut |step| {
                last = Some(step.iteration);
                stop.set(step.iteration == stop_after);
            });
            assert!(matches!(fitted, Err(TrainError::Stopped)));
            assert_eq!(last, Some(stop_after));
        }
    }

    #[test]
    fn a_stop_within_an_iteration_ends_training() {
        let limits = Limits {
            max_iterations: 100,
            l2: 1.0,
        };
        // Checked at the start's evaluation, after the first report, and then once more.
        let asked = Cell::new(0);
        let stopped = || asked.replace(asked.get() + 1) >= 2;
        let mut calls = 0;
        let fitted = fit(&examples(300), limits, &stopped, &mut |_| calls += 1);
        assert!(matches!(fitted, Err(TrainError::Stopped)));
        assert_eq!(calls, 1);
    }

    #[test]
    fn separable_classes_without_l2_still_give_finite_weights() {
        let examples = Examples {
            features: Array2::from_shape_fn((20, 1), |(row, _)| if row < 10 { -1.0 } else { 1.0 }),
            labels: (0..20).map(|row| usize::from(row >= 10)).collect(),
            classes: 2,
        };
        let (fitted, _) = fit_all(&examples, 1_000, 0.0);
        assert!(fitted.weights.iter().all(|weight| weight.is_finite()));
        assert_eq!(fitted.last.accuracy, 1.0);
    }

    #[test]
    fn an_absurd_penalty_ends_without_a_wild_model() {
        let limits = Limits {
            max_iterations: 10,
            l2: f64::MAX,
        };
        match fit(&examples(30), limits, &|| false, &mut |_| ()) {
            Err(TrainError::Dataset(reason)) => assert!(reason.starts_with("cannot train")),
            fitted => assert!(fitted.unwrap().last.loss <= 2f64.ln()),
        }
    }
}
