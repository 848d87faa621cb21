use clap::Args;

use super::{Shared, print, table};
use crate::app;
use crate::store::Missing;

/// Show the history of a message.
///
/// Lists in order its deliveries and duplicates, claims, attempts, lost leases,
/// takeovers, outcome and acks, separately for each subscription.
#[derive(Debug, Args)]
pub(super) struct Explain {
    /// The message id, as returned by the publisher
    message_id: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Explain {
    pub(super) async fn execute(self, shared: &Shared) -> anyhow::Result<()> {
        let store = app::open_store(&shared.load()?, Missing::Fail).await?;
        store.check_schema().await?;
        let stories = store.stories(&self.message_id).await?;
        anyhow::ensure!(
            !stories.is_empty(),
            "message {} is not on record: it has not been pulled yet, or its retention has ended",
            self.message_id
        );
        if self.json {
            return print(&serde_json::to_string_pretty(&stories)?);
        }
        for story in &stories {
            print(&table::of_story(story))?;
        }
        Ok(())
    }
}
