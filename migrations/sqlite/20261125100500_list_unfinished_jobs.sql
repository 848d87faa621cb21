-- The newest unfinished jobs, found without the rest of the queue. `is_held` is
-- for Postgres, which finds the running ones by it.
CREATE INDEX leases_by_job_id ON leases (job_id);

DROP VIEW unfinished_jobs;
CREATE VIEW unfinished_jobs AS
SELECT job_id, task,
       CASE WHEN token IS NOT NULL
                 AND lease_until >= CAST(unixepoch('subsec') * 1000 AS INTEGER)
            THEN 'running'
            ELSE 'waiting' END AS state,
       token IS NOT NULL AS is_held
FROM leases;
