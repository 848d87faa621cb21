//! Arguments → command → exit code.

use std::process::ExitCode;
use std::time::Duration;

use tokio::runtime::Runtime;
use trainyard::config::ConfigError;
use trainyard::printable::line;

/// The exit code of a failure at run time.
const FAILED: u8 = 1;
/// The exit code of an invalid configuration.
const MISCONFIGURED: u8 = 2;

/// How long the exiting process waits for its threads, as a task's blocking
/// thread may never end.
const THREAD_LIMIT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    trainyard::run_as_keeper_if_asked();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("trainyard: cannot start threads: {error}");
            return ExitCode::from(FAILED);
        }
    };
    let code = match runtime.block_on(trainyard::cli::main()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("trainyard: {}", line(&format!("{error:#}")));
            ExitCode::from(match error.downcast_ref::<ConfigError>() {
                Some(_) => MISCONFIGURED,
                None => FAILED,
            })
        }
    };
    runtime.shutdown_timeout(THREAD_LIMIT);
    code
}
