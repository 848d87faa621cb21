use clap::Args;

use super::Shared;
use crate::app;
use crate::registry::Registry;

/// Run the worker: pull messages and train.
///
/// Needs a configuration with a project, at least one subscription and at
/// least one task, and a migrated database. Talks to Google Cloud with
/// Application Default Credentials, or to an emulator when
/// PUBSUB_EMULATOR_HOST is set. SIGTERM stops it cleanly; a second one at once.
#[derive(Debug, Args)]
pub(super) struct Run {
    /// Bring the database's tables up to date first
    #[arg(long)]
    migrate: bool,
}

impl Run {
    pub(super) async fn execute(self, shared: &Shared) -> anyhow::Result<()> {
        app::run_worker(shared.load()?, Registry::new(), self.migrate).await
    }
}
