//! Deletes old jobs from the record.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::retry::jittered;
use crate::store::{Requests, in_time};

/// Many workers purge one table, so each need not look often.
const EVERY: Duration = Duration::from_secs(60 * 60);
/// Soon: a worker may be restarted more often than every hour.
const AFTER_START: Duration = Duration::from_secs(60);
/// Small, so that no statement takes long.
const BATCH: u32 = 1000;
const BETWEEN_BATCHES: Duration = Duration::from_millis(200);

/// Purges now and then until `draining`.
pub(super) async fn purge(
    requests: Arc<dyn Requests>,
    retention: Duration,
    draining: CancellationToken,
) {
    let purging = async {
        sleep(jittered(AFTER_START)).await;
        loop {
            purge_all(&*requests, retention).await;
            sleep(jittered(EVERY)).await;
        }
    };
    tokio::select! {
        () = draining.cancelled() => {}
        never = purging => never,
    }
}

async fn purge_all(requests: &dyn Requests, retention: Duration) {
    let mut total = 0;
    loop {
        match in_time(requests.purge(retention, BATCH)).await {
            Ok(0) => break,
            Ok(purged) => total += purged,
            Err(error) => {
                warn!(%error, "purging has stopped; the next round goes on");
                break;
            }
        }
        sleep(BETWEEN_BATCHES).await;
    }
    if total > 0 {
        info!(jobs = total, "purged");
    }
}
