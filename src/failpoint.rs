//! Steps at which a test can make the process abort, as in a crash.
//!
//! `TRAINYARD_FAILPOINT=after_claim` aborts at that step, and
//! `TRAINYARD_FAILPOINT=after_claim@3` when the step is reached the third time.
//! Only a build with the feature `failpoints` reads the variable.

/// The steps in a message's life. A crash after each leaves a different state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    AfterReceive,
    AfterClaim,
    /// The early ack, if the task's ack timing has one.
    BeforeAck,
    AfterAck,
    DuringRun,
    AfterRun,
    BeforeFinish,
    AfterFinish,
    /// The ack of an ended job.
    BeforeFinalAck,
}

impl Step {
    pub const ALL: [Self; 9] = [
        Self::AfterReceive,
        Self::AfterClaim,
        Self::BeforeAck,
        Self::AfterAck,
        Self::DuringRun,
        Self::AfterRun,
        Self::BeforeFinish,
        Self::AfterFinish,
        Self::BeforeFinalAck,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AfterReceive => "after_receive",
            Self::AfterClaim => "after_claim",
            Self::BeforeAck => "before_ack",
            Self::AfterAck => "after_ack",
            Self::DuringRun => "during_run",
            Self::AfterRun => "after_run",
            Self::BeforeFinish => "before_finish",
            Self::AfterFinish => "after_finish",
            Self::BeforeFinalAck => "before_final_ack",
        }
    }
}

/// Aborts the process if the environment asks for it at this step.
#[cfg(feature = "failpoints")]
pub fn reach(step: Step) {
    enabled::reach(step);
}

/// Does nothing in a build without failpoints.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn reach(_: Step) {}

#[cfg(feature = "failpoints")]
mod enabled {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::Step;

    const VARIABLE: &str = "TRAINYARD_FAILPOINT";

    struct Failpoint {
        step: Step,
        /// The process aborts when this reaches zero.
        left: AtomicU32,
    }

    impl Failpoint {
        fn parse(text: &str) -> Option<Self> {
            let (name, time) = text.split_once('@').unwrap_or((text, "1"));
            let step = Step::ALL.into_iter().find(|step| step.as_str() == name)?;
            let left = time.parse().ok().filter(|time| *time > 0)?;
            Some(Self {
                step,
                left: AtomicU32::new(left),
            })
        }

        fn is_hit(&self, step: Step) -> bool {
            step == self.step && self.left.fetch_sub(1, Ordering::AcqRel) == 1
        }
    }

    pub(super) fn reach(step: Step) {
        static FAILPOINT: OnceLock<Option<Failpoint>> = OnceLock::new();
        let failpoint = FAILPOINT.get_or_init(|| {
            let text = std::env::var(VARIABLE).ok()?;
            let failpoint = Failpoint::parse(&text);
            if failpoint.is_none() {
                tracing::error!("{VARIABLE}={text} names no step and is ignored");
            }
            failpoint
        });
        if failpoint.as_ref().is_some_and(|point| point.is_hit(step)) {
            eprintln!("{VARIABLE}: aborting at {}", step.as_str());
            std::process::abort();
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_failpoint_is_hit_once_at_its_time() {
            let failpoint = Failpoint::parse("after_claim@2").unwrap();
            assert!(!failpoint.is_hit(Step::AfterClaim));
            assert!(!failpoint.is_hit(Step::AfterRun));
            assert!(failpoint.is_hit(Step::AfterClaim));
            assert!(!failpoint.is_hit(Step::AfterClaim));
        }

        #[test]
        fn an_unknown_step_is_not_a_failpoint() {
            for text in ["", "somewhere", "after_claim@", "after_claim@0"] {
                assert!(Failpoint::parse(text).is_none());
            }
        }
    }
}
