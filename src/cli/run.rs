use clap::Args;

use super::Shared;
use crate::app;
use crate::registry::Registry;

/// Run a worker.
///
/// Needs a migrated database, and a configuration with a project, a subscription
/// and a task. Connects to Google Cloud with Application Default Credentials, or
/// to an emulator if PUBSUB_EMULATOR_HOST is set. SIGTERM stops it gracefully; a
/// second one asks the runs to stop now; a third ends the process.
#[derive(Debug, Args)]
pub(super) struct Run {
    /// Migrate the database first
    #[arg(long)]
    migrate: bool,
}

impl Run {
    pub(super) async fn execute(self, shared: &Shared) -> anyhow::Result<()> {
        app::run_worker(shared.load()?, Registry::new(), self.migrate).await
    }
}
