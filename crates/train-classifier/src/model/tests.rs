use super::*;

/// Predicts `left` or `right` by the sign of `(x - 10) / 2`; ignores `y`.
fn model() -> Model {
    let (format, version, task) = Model::stamp();
    Model {
        format,
        version,
        task,
        target: "side".to_owned(),
        features: vec!["x".to_owned(), "y".to_owned()],
        classes: vec!["left".to_owned(), "right".to_owned()],
        weights: vec![vec![-1.0, 0.0], vec![1.0, 0.0]],
        intercepts: vec![0.0, 0.0],
        scaling: Scaling {
            mean: vec![10.0, 0.0],
            scale: vec![2.0, 1.0],
        },
        hyperparameters: Hyperparameters {
            test_fraction: 0.25,
            seed: 3,
            max_iterations: 50,
            l2: 0.5,
        },
        accuracy: 0.75,
        train_accuracy: 0.5,
        iterations: 20,
        converged: true,
        dataset: Origin {
            path: "t.csv".into(),
            sha256: "00".to_owned(),
            rows: 8,
            test_rows: 2,
        },
    }
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn a_row_is_predicted_by_its_highest_score() {
    let model = model();
    assert_eq!(model.predict(&[9.0, 100.0]).unwrap(), "left");
    assert_eq!(model.predict(&[11.0, -100.0]).unwrap(), "right");
}

#[test]
fn a_row_of_another_width_is_not_predicted() {
    let error = model().predict(&[1.0]).unwrap_err();
    let expected = "the row has 1 cells where the model has 2 features";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_saved_model_loads_as_it_was_and_replaces_the_one_before() {
    let directory = tempfile::tempdir().unwrap();
    model().save(directory.path(), &|| false).unwrap();
    let second = Model {
        accuracy: 0.5,
        ..model()
    };
    let path = second.save(directory.path(), &|| false).unwrap();
    assert_eq!(Model::load(&path).unwrap(), second);
    assert_eq!(names_in(directory.path()), ["model.json"]);
}

#[test]
fn a_stop_leaves_the_model_before_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = model().save(directory.path(), &|| false).unwrap();
    let second = Model {
        accuracy: 0.5,
        ..model()
    };
    let error = second.save(directory.path(), &|| true).unwrap_err();
    assert!(matches!(error, TrainError::Stopped));
    assert_eq!(Model::load(path).unwrap(), model());
    assert_eq!(names_in(directory.path()), ["model.json"]);
}

#[test]
fn a_directory_that_cannot_be_written_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("gone");
    let error = model().save(&missing, &|| false).unwrap_err();
    assert!(matches!(&error, TrainError::Io { .. }));
    assert!(error.to_string().starts_with("cannot write the model "));
}

#[test]
fn another_version_or_shape_is_not_loaded() {
    let refusal = |model: &Model| {
        let text = serde_json::to_vec(model).unwrap();
        Model::parse(&text).unwrap_err()
    };
    let newer = Model {
        version: 2,
        ..model()
    };
    assert!(refusal(&newer).contains("version 2, not `trainyard-linear-classifier` version 1"));
    let narrow = Model {
        weights: vec![vec![1.0], vec![1.0]],
        ..model()
    };
    assert!(refusal(&narrow).contains("do not fit its 2 features and 2 classes"));
}

fn column(values: &[f64]) -> Table {
    Table {
        features: vec!["x".to_owned()],
        values: values.to_vec(),
        labels: vec![0; values.len()],
        classes: vec!["only".to_owned()],
        sha256: String::new(),
    }
}

#[test]
fn a_column_is_scaled_to_mean_0_and_deviation_1_over_the_training_rows() {
    let scaling = Scaling::measure(&column(&[1.0, 3.0, 99.0]), &[0, 1]).unwrap();
    assert_eq!(
        (&scaling.mean[..], &scaling.scale[..]),
        (&[2.0][..], &[1.0][..])
    );
    assert_eq!(scaling.apply(&[5.0]).collect::<Vec<_>>(), [3.0]);
}

#[test]
fn a_constant_column_is_only_centred() {
    let scaling = Scaling::measure(&column(&[0.1; 7]), &[0, 1, 2, 3, 4, 5, 6]).unwrap();
    assert_eq!(
        (&scaling.mean[..], &scaling.scale[..]),
        (&[0.1][..], &[1.0][..])
    );
}

#[test]
fn a_column_too_large_to_standardise_is_named() {
    let error = Scaling::measure(&column(&[f64::MAX, f64::MIN]), &[0, 1]).unwrap_err();
    let expected = "the numbers in column `x` are too large to standardise";
    assert!(matches!(error, TrainError::Dataset(reason) if reason == expected));
}
