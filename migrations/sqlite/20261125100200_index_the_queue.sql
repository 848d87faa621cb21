CREATE INDEX leases_waiting ON leases (subscription, task, run_after, position)
    WHERE token IS NULL;
CREATE INDEX leases_running ON leases (subscription, task) WHERE token IS NOT NULL;
CREATE INDEX leases_to_cancel ON leases (worker) WHERE cancel_requested;
CREATE INDEX leases_by_job_id ON leases (job_id);
CREATE INDEX leases_of_unknown_tasks ON leases (task) WHERE unknown_since IS NOT NULL;
