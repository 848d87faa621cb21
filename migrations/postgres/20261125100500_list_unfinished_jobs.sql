-- The newest unfinished jobs, found without the rest of the queue. No renewal
-- changes a job's id. The view's condition of a running job does not tell that its
-- token is set, so `is_held` lets a statement say it, and read the index of those.
CREATE INDEX leases_by_job_id ON leases (job_id);

CREATE OR REPLACE VIEW unfinished_jobs AS
SELECT job_id, task,
       CASE WHEN token IS NOT NULL AND lease_until >= now() THEN 'running'
            ELSE 'waiting' END AS state,
       token IS NOT NULL AS is_held
FROM leases;
