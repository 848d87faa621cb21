//! Faults on request, while the emulator runs.

use google_cloud_gax::error::rpc::Code;
use tokio::sync::watch;

use super::Broker;
use crate::faults::Faults;

impl Broker {
    /// The faults in force, with their seed.
    pub fn faults(&self) -> Faults {
        self.with(|engine, _| engine.faults().clone())
    }

    /// Replaces all faults. With a seed, the generator restarts from it.
    pub fn set_faults(&self, faults: Faults) {
        let set = self.with(|engine, now| {
            // Under the lock, so that of two changes the later one decides both.
            self.shared.silence.send_replace(faults.silence);
            engine.set_faults(faults, now);
            engine.faults().clone()
        });
        tracing::info!(faults = %set, seed = set.seed, "the emulator's faults were changed");
    }

    /// Ends every open stream with this status, and returns how many there were.
    pub fn reset_streams(&self, status: Code) -> usize {
        let open = self.shared.resets.receiver_count();
        self.shared.resets.send_replace(status);
        open
    }

    /// Whether streams must send nothing.
    pub(crate) fn silence(&self) -> watch::Receiver<bool> {
        self.shared.silence.subscribe()
    }

    /// Changes when the calling stream must end with the status in it.
    pub(crate) fn resets(&self) -> watch::Receiver<Code> {
        self.shared.resets.subscribe()
    }
}
