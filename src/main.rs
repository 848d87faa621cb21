//! Arguments → command → exit code.

use std::process::ExitCode;

use trainyard::config::ConfigError;

/// Something went wrong while running.
const FAILED: u8 = 1;
/// The configuration, or what it names, has to be mended first.
const MISCONFIGURED: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    match trainyard::cli::main().await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("trainyard: {error:#}");
            ExitCode::from(match error.downcast_ref::<ConfigError>() {
                Some(_) => MISCONFIGURED,
                None => FAILED,
            })
        }
    }
}
