pub const BUILTIN_NAMES: &[&str] = &["train-classifier"];
