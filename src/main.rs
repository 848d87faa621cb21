//! Arguments → command → exit code.

use std::process::ExitCode;
use std::time::Duration;

use tokio::runtime::Runtime;
use trainyard::config::ConfigError;

/// Something went wrong while running.
const FAILED: u8 = 1;
/// The configuration, or what it names, has to be mended first.
const MISCONFIGURED: u8 = 2;

/// How long the process waits at its end for threads that do not listen to a
/// stop; a task's blocking thread could keep it forever.
const LAST_WORDS: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    trainyard::run_as_keeper_if_asked();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("trainyard: cannot start its threads: {error}");
            return ExitCode::from(FAILED);
        }
    };
    let code = match runtime.block_on(trainyard::cli::main()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("trainyard: {error:#}");
            ExitCode::from(match error.downcast_ref::<ConfigError>() {
                Some(_) => MISCONFIGURED,
                None => FAILED,
            })
        }
    };
    runtime.shutdown_timeout(LAST_WORDS);
    code
}
