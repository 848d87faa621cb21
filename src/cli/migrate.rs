use clap::Args;

use super::{Shared, print};
use crate::app;
use crate::database_url::masked;
use crate::store::Missing;

/// Migrate the database's tables to this version.
///
/// It can run repeatedly, and while workers run: migrations are compatible with
/// running older workers.
#[derive(Debug, Args)]
pub(super) struct Migrate {}

impl Migrate {
    pub(super) async fn execute(self, shared: &Shared) -> anyhow::Result<()> {
        let config = shared.load()?;
        let applied = app::open_store(&config, Missing::Create)
            .await?
            .migrate(app::tell_who_is_in_the_way)
            .await?;
        let url = masked(&config.database.url);
        print(&match applied {
            0 => format!("{url} is up to date"),
            1 => format!("{url}: 1 migration applied"),
            many => format!("{url}: {many} migrations applied"),
        })
    }
}
