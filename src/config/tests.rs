use super::load::from_toml;

#[test]
fn the_variables_of_a_command_are_masked() {
    let text = "[tasks.t]\ncommand = ['sh']\nenv = { API_KEY = 'secret' }";
    let config = from_toml(text).unwrap();
    assert_eq!(config.tasks["t"].env["API_KEY"], "secret");
    let shown = toml::to_string(&config.masked()).unwrap();
    assert!(shown.contains("API_KEY = \"***\""), "{shown}");
    assert!(!shown.contains("secret"), "{shown}");
}

#[test]
fn each_impossible_value_is_named_by_its_key() {
    for (text, key) in [
        ("[database]\nurl = 'mysql://h/d'", "database.url"),
        (
            "[database]\nmax_connections = 0",
            "database.max_connections",
        ),
        ("[database]\npooler = 'session'", "database.pooler"),
        ("[database]\npooler = 'pgbouncer'", "database.pooler"),
        ("[worker]\nslots = 0", "worker.slots"),
        ("[worker]\nlease = '1s'", "worker.lease"),
        ("[worker]\nlease = '20s'", "worker.lease"),
        ("[worker]\nlease = '100years'", "worker.lease"),
        ("[worker]\nlease = 120", "worker.lease"),
        (
            "[worker]\nreserve_after = '11years'",
            "worker.reserve_after",
        ),
        ("[guard]\nretention = '11years'", "guard.retention"),
        ("[tasks.t]\ntimeout = '11years'", "tasks.t.timeout"),
        ("[tasks.t]\nbackoff.max = '11years'", "tasks.t.backoff.max"),
        (
            "[subscriptions.s]\nquiet_limit = '11years'",
            "subscriptions.s.quiet_limit",
        ),
        ("[tasks.t]\ntimeout = '0s'", "tasks.t.timeout"),
        ("[tasks.t]\nack = 'afterrun'", "tasks.t.ack"),
        ("[tasks.t]\nmax_attempts = 0", "tasks.t.max_attempts"),
        ("[tasks.t]\nconcurrency = 0", "tasks.t.concurrency"),
        ("[tasks.t]\nbackoff.max = '1s'", "tasks.t.backoff.max"),
        (
            "[tasks.t]\nbackoff.multiplier = 0.5",
            "tasks.t.backoff.multiplier",
        ),
        (
            "[subscriptions.s]\nprefetch = 100000",
            "subscriptions.s.prefetch",
        ),
        (
            "[subscriptions.s]\nconcurrency = 0",
            "subscriptions.s.concurrency",
        ),
        (
            "[subscriptions.s]\nquiet_limit = '1s'",
            "subscriptions.s.quiet_limit",
        ),
        (
            "[subscriptions.s]\ndead_letter_topic = ''",
            "subscriptions.s.dead_letter_topic",
        ),
        ("[guard]\nmax_crashes = 0", "guard.max_crashes"),
        ("[guard]\nretention = '0s'", "guard.retention"),
        (
            "[subscriptions.s]\ndedupe_key = 'attribut:id'",
            "subscriptions.s.dedupe_key",
        ),
        (
            "[worker]\nstop_grace = '1m'\nlease = '5m'",
            "worker.stop_grace",
        ),
        (
            "[subscriptions.s]\nack_deadline = '1s'",
            "subscriptions.s.ack_deadline",
        ),
        ("[tasks.t]\nbuiltin = 'train-clasifier'", "tasks.t.builtin"),
    ] {
        let error = from_toml(text).unwrap_err().to_string();
        assert!(error.contains(&format!("`{key}`")), "{error}");
    }
}

#[test]
fn the_defaults_have_no_problems() {
    from_toml("").unwrap();
}

#[test]
fn each_impossible_value_of_a_command_is_named_by_its_key() {
    for (lines, key) in [
        ("command = []", "command"),
        ("command = ['']", "command"),
        ("command = [\"a\\u0000b\"]", "command"),
        ("command = ['sh']\nbuiltin = 'rehearsal'", "command"),
        ("command = ['sh']\nenv = { \"A=B\" = '1' }", "env"),
        ("command = ['sh']\nenv = { A = \"\\u0000\" }", "env"),
        ("command = ['sh']\nenv = { TRAINYARD_FENCE = '1' }", "env"),
        (
            "command = ['sh']\nenv = { CUDA_VISIBLE_DEVICES = '1' }",
            "env",
        ),
        (
            "command = ['sh']\npass_env = ['TRAINYARD__DATABASE__URL']",
            "pass_env",
        ),
        ("pass_env = ['HF_TOKEN']", "pass_env"),
        (
            "command = ['sh']\npermanent_exit_codes = [0]",
            "permanent_exit_codes",
        ),
        (
            "command = ['sh']\npermanent_exit_codes = [256]",
            "permanent_exit_codes[0]",
        ),
        ("command = ['sh']\nmemory = '0B'", "memory"),
        ("command = ['sh']\nmemory = '4'", "memory"),
        ("command = ['sh']\nnice = 20", "nice"),
        ("command = ['sh']\nopen_files = 3", "open_files"),
        ("command = ['sh']\nstall_timeout = '0s'", "stall_timeout"),
        ("command = ['sh']\nstop_grace = '26s'", "stop_grace"),
        ("command = ['sh']\nstop_grace = '41s'", "stop_grace"),
        ("memory = '4GiB'", "memory"),
        ("builtin = 'rehearsal'\ngpus = 1", "gpus"),
    ] {
        let error = from_toml(&format!("[tasks.t]\n{lines}")).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(&format!("`tasks.t.{key}`")), "{error}");
    }
}

#[test]
fn a_command_with_everything_has_no_problems() {
    from_toml(
        r#"
        [worker]
        gpus = ["0", "1"]
        work_dir = "/var/tmp/jobs"
        [tasks.finetune]
        command = ["python3", "finetune.py"]
        cwd = "/srv/finetune"
        timeout = "12h"
        stop_grace = "20s"
        stall_timeout = "10m"
        permanent_exit_codes = [2, 65]
        memory = "4GiB"
        nice = 10
        open_files = 1024
        gpus = 1
        keep_work_dir = true
        pass_env = ["HF_TOKEN"]
        env = { HF_HOME = "/srv/hf", PYTHONUNBUFFERED = "1" }
        "#,
    )
    .unwrap();
}
