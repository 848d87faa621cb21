use std::cell::Cell;
use std::path::Path;

use super::*;

const DIGITS: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../../examples/data/digits.csv.gz"
);

fn digits(output: &Path) -> Parameters {
    Parameters {
        dataset: DIGITS.into(),
        target: "digit".to_owned(),
        output: output.to_owned(),
        hyperparameters: Hyperparameters::default(),
    }
}

/// Trains without a watcher or a stop.
fn outcome(parameters: &Parameters) -> Result<Trained, TrainError> {
    train(parameters, |_| (), || false)
}

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).unwrap().next().is_none()
}

#[test]
fn the_digits_are_told_apart_whatever_the_seed() {
    for seed in 1..=4 {
        let output = tempfile::tempdir().unwrap();
        let mut parameters = digits(output.path());
        parameters.hyperparameters.seed = seed;
        let model = outcome(&parameters).unwrap().model;
        assert!(model.accuracy >= 0.93, "{}", model.accuracy);
        assert_eq!((model.dataset.rows, model.dataset.test_rows), (1797, 359));
        assert_eq!(model.classes.len(), 10);
    }
}

#[test]
fn the_saved_model_reproduces_the_accuracy() {
    let output = tempfile::tempdir().unwrap();
    let trained = outcome(&digits(output.path())).unwrap();
    let model = Model::load(&trained.path).unwrap();
    assert_eq!(model, trained.model);

    let table = Table::read(Path::new(DIGITS), "digit", &|| false).unwrap();
    let split = split::stratified(&table.labels, 10, 0.2, 1).unwrap();
    let right = |rows: &[usize]| {
        let hits = rows.iter().filter(|row| {
            let label = &table.classes[table.labels[**row]];
            model.predict(table.row(**row)).unwrap() == label
        });
        hits.count() as f64 / rows.len() as f64
    };
    assert_eq!(model.accuracy, right(&split.test));
    assert_eq!(model.train_accuracy, right(&split.train));
    assert_eq!(model.dataset.sha256, table.sha256);
    assert_eq!(model.hyperparameters, Hyperparameters::default());
}

#[test]
fn the_same_seed_gives_the_same_model() {
    let mut models = Vec::new();
    for seed in [4, 4, 5] {
        let output = tempfile::tempdir().unwrap();
        let mut parameters = digits(output.path());
        parameters.hyperparameters.seed = seed;
        parameters.hyperparameters.max_iterations = 20;
        let path = outcome(&parameters).unwrap().path;
        models.push(std::fs::read(path).unwrap());
    }
    assert!(models[0] == models[1]);
    assert!(models[0] != models[2]);
}

#[test]
fn every_iteration_is_told_and_the_last_is_the_models() {
    let output = tempfile::tempdir().unwrap();
    let mut steps = Vec::new();
    let trained = train(&digits(output.path()), |step| steps.push(step), || false);
    let trained = trained.unwrap();
    let iterations: Vec<u64> = steps.iter().map(|step| step.iteration).collect();
    let expected: Vec<u64> = (0..=trained.model.iterations).collect();
    assert_eq!(iterations, expected);
    assert_eq!(steps.last(), Some(&trained.last));
    assert_eq!(trained.last.accuracy, trained.model.train_accuracy);
}

#[test]
fn a_stop_during_training_leaves_no_model() {
    let output = tempfile::tempdir().unwrap();
    let stop = Cell::new(false);
    // The first step is reported before the first iteration.
    let stopped = train(&digits(output.path()), |_| stop.set(true), || stop.get());
    assert!(matches!(stopped, Err(TrainError::Stopped)));
    assert!(is_empty(output.path()));
}

#[test]
fn a_training_already_stopped_does_nothing() {
    let output = tempfile::tempdir().unwrap();
    let parameters = digits(&output.path().join("made"));
    let stopped = train(&parameters, |_| panic!("it trains"), || true);
    assert!(matches!(stopped, Err(TrainError::Stopped)));
    assert!(is_empty(output.path()));
}

#[test]
fn two_classes_and_constant_columns_train_too() {
    let directory = tempfile::tempdir().unwrap();
    let dataset = directory.path().join("two.csv");
    let row = |n: usize| format!("{n},7,{}\n", if n < 20 { "low" } else { "high" });
    let rows: String = (0..40).map(row).collect();
    std::fs::write(&dataset, format!("x,constant,level\n{rows}")).unwrap();
    let parameters = Parameters {
        dataset,
        target: "level".to_owned(),
        ..digits(&directory.path().join("made/for/it"))
    };
    let model = outcome(&parameters).unwrap().model;
    assert_eq!(model.classes, ["high", "low"]);
    assert_eq!(model.predict(&[2.0, 7.0]).unwrap(), "low");
    assert_eq!(model.predict(&[38.0, 7.0]).unwrap(), "high");
}

#[test]
fn a_table_too_small_to_split_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let dataset = directory.path().join("tiny.csv");
    std::fs::write(&dataset, "x,kind\n1,a\n2,b\n").unwrap();
    let parameters = Parameters {
        dataset,
        target: "kind".to_owned(),
        ..digits(directory.path())
    };
    let Err(TrainError::Dataset(reason)) = outcome(&parameters) else {
        panic!("it trains");
    };
    assert!(reason.ends_with("tiny.csv: too few rows to hold any out: 2 for 2 classes"));
}

#[test]
fn an_output_that_cannot_be_made_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = outcome(&digits(&file.join("below"))).unwrap_err();
    assert!(matches!(&error, TrainError::Io { .. }));
    assert!(error.to_string().starts_with("cannot make the directory "));
}

#[test]
fn a_parameter_out_of_range_is_named() {
    let output = tempfile::tempdir().unwrap();
    let refused = |name: &str, change: &dyn Fn(&mut Parameters)| {
        let mut parameters = digits(output.path());
        change(&mut parameters);
        let error = outcome(&parameters).unwrap_err();
        assert!(matches!(&error, TrainError::Parameter { .. }));
        assert!(
            error.to_string().starts_with(&format!("`{name}` ")),
            "{error}"
        );
    };
    for wrong in [0.0, 1.0, f64::NAN] {
        refused("test_fraction", &|p| {
            p.hyperparameters.test_fraction = wrong
        });
    }
    for wrong in [0, 100_001] {
        refused("max_iterations", &|p| {
            p.hyperparameters.max_iterations = wrong
        });
    }
    for wrong in [-0.1, f64::NAN] {
        refused("l2", &|p| p.hyperparameters.l2 = wrong);
    }
    refused("output", &|p| p.output = PathBuf::new());
}
