//! The model: what is known of a claimed key, and the rows that the tables must have for
//! it.

use trainyard::job::{Fence, FinalState};
use uuid::Uuid;

use super::{KEYS, MAX_ATTEMPTS, MAX_CRASHES};

#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    pub job_id: Uuid,
    pub state: Option<FinalState>,
    pub attempt: u32,
    pub interruptions: u32,
    pub crashes: u32,
    pub duplicates: u32,
    /// The fence whose writes are accepted; without one, the job waits.
    pub holder: Option<Fence>,
    /// The holder's lease has expired, or the job has waited long enough.
    pub is_due: bool,
    /// Its place within its ordering key, while it is unfinished.
    pub position: usize,
    pub checkpoint: Option<String>,
    pub cancel_requested: bool,
    /// The fence that ended the job, if a run did.
    pub ended_by: Option<Fence>,
}

impl Known {
    /// On record, and due.
    pub fn new(job_id: Uuid, position: usize) -> Self {
        Self {
            job_id,
            state: None,
            attempt: 0,
            interruptions: 0,
            crashes: 0,
            duplicates: 0,
            holder: None,
            is_due: true,
            position,
            checkpoint: None,
            cancel_requested: false,
            ended_by: None,
        }
    }

    pub fn waits(&self) -> bool {
        self.state.is_none() && self.holder.is_none()
    }

    pub fn is_held(&self) -> bool {
        self.state.is_none() && self.holder.is_some() && !self.is_due
    }

    pub fn counted_attempts(&self) -> u32 {
        self.attempt - self.interruptions
    }

    /// A claim of a free job; returns whether it is acquired.
    pub fn take_over(&mut self) -> bool {
        let crashed = self.holder.is_some();
        self.crashes += u32::from(crashed);
        let is_lost_too_often =
            self.crashes >= MAX_CRASHES || self.counted_attempts() >= MAX_ATTEMPTS;
        if crashed && is_lost_too_often {
            self.end(FinalState::Dead, None);
            return false;
        }
        self.attempt += 1;
        self.is_due = false;
        true
    }

    pub fn end(&mut self, state: FinalState, by: Option<Fence>) {
        assert_eq!(self.state, None, "a job ends once");
        self.state = Some(state);
        self.holder = None;
        self.ended_by = by;
    }

    pub fn wait(&mut self, is_due: bool) {
        self.holder = None;
        // A job that is to be cancelled does not wait for its next attempt.
        self.is_due = is_due || self.cancel_requested;
    }

    /// Like a new job, except for its fence and its work so far.
    pub fn reopen(&mut self, position: usize) {
        *self = Self {
            attempt: self.attempt,
            interruptions: self.attempt,
            duplicates: self.duplicates,
            checkpoint: self.checkpoint.take(),
            ..Self::new(self.job_id, position)
        };
    }
}

/// The tables' row of one key.
#[derive(Debug, PartialEq, sqlx::FromRow)]
pub struct Row {
    pub key: String,
    job_id: Uuid,
    state: String,
    duplicates: i32,
    finished_by: Option<Uuid>,
    leased: bool,
    attempt: Option<i32>,
    interruptions: Option<i32>,
    crashes: Option<i32>,
    token: Option<Uuid>,
    is_due: bool,
    checkpoint: Option<String>,
    cancel_requested: bool,
}

impl Row {
    /// `now` is the database's.
    pub fn query(subscription: &str, now: &str) -> String {
        format!(
            "SELECT m.key, m.job_id, m.state, m.duplicates, m.finished_by,
                    l.key IS NOT NULL AS leased, l.attempt, l.interruptions, l.crashes, l.token,
                    coalesce(CASE WHEN l.token IS NULL THEN l.run_after ELSE l.lease_until END
                             <= {now}, false) AS is_due, l.checkpoint,
                    coalesce(l.cancel_requested, false) AS cancel_requested
             FROM processed_messages m LEFT JOIN leases l USING (subscription, key)
             WHERE subscription = '{subscription}'"
        )
    }

    /// The state is open exactly while there is a lease row. A waiting job is not due before
    /// its turn.
    pub fn expected(key: usize, known: &Known, has_to_wait: bool) -> Self {
        let open = known.state.is_none();
        let live = |number: u32| open.then_some(number.cast_signed());
        Self {
            key: KEYS[key].0.to_owned(),
            job_id: known.job_id,
            state: known.state.map_or("open", FinalState::as_str).to_owned(),
            duplicates: known.duplicates.cast_signed(),
            finished_by: known.ended_by.as_ref().map(|fence| fence.token),
            leased: open,
            attempt: live(known.attempt),
            interruptions: live(known.interruptions),
            crashes: live(known.crashes),
            token: known.holder.as_ref().map(|fence| fence.token),
            is_due: open && known.is_due && !(known.waits() && has_to_wait),
            checkpoint: known.checkpoint.clone().filter(|_| open),
            cancel_requested: open && known.cancel_requested,
        }
    }
}
