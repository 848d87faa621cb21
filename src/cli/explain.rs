use clap::Args;

use super::{Shared, say, table};
use crate::app;
use crate::store::Missing;

/// Tell the whole story of a message.
///
/// Shows, in order, what happened to it: deliveries and duplicates, claims,
/// attempts, leases lost and taken over, outcome, acks. One story for each
/// subscription that it came through.
#[derive(Debug, Args)]
pub(super) struct Explain {
    /// The message's id, as publishing returned it
    message_id: String,
    /// As JSON
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
            "no delivery of message {} is on record: it has not been pulled yet, or its retention is over",
            self.message_id
        );
        if self.json {
            return say(&serde_json::to_string_pretty(&stories)?);
        }
        for story in &stories {
            say(&table::of_story(story))?;
        }
        Ok(())
    }
}
