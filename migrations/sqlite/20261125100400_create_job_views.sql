-- What people read: the same columns on every database. Times are milliseconds
-- since 1970.
CREATE VIEW jobs AS
SELECT m.job_id, m.subscription, m.key, m.message_id, m.task, m.duplicates, m.reason,
       m.state AS stored_state,
       lower(substr(hex(m.job_id), -4)) AS last_digits,
       lower(hex(m.job_id)) AS digits,
       nullif(m.ordering_key, '') AS ordering_key,
       CASE WHEN m.state <> 'open' THEN m.state
            WHEN leases.token IS NOT NULL
                 AND leases.lease_until >= CAST(unixepoch('subsec') * 1000 AS INTEGER)
            THEN 'running'
            ELSE 'waiting' END AS state,
       coalesce(leases.attempt - leases.interruptions, m.attempts) AS attempts,
       coalesce(leases.worker, m.worker) AS worker,
       coalesce(leases.checkpoint, m.checkpoint) AS checkpoint,
       coalesce(m.error, leases.last_error) AS error,
       m.result, m.publish_time, m.received_at,
       coalesce(leases.started_at, m.started_at) AS started_at,
       m.finished_at,
       CASE WHEN leases.token IS NULL AND leases.run_after < 9223372036854775807
                 AND leases.run_after > CAST(unixepoch('subsec') * 1000 AS INTEGER)
            THEN leases.run_after END AS waits_until,
       CASE WHEN leases.token IS NOT NULL OR leases.key IS NULL THEN NULL
            WHEN leases.run_after = 9223372036854775807 THEN 'turn'
            WHEN leases.unknown_since IS NOT NULL THEN 'task'
            WHEN leases.run_after > CAST(unixepoch('subsec') * 1000 AS INTEGER) THEN 'attempt'
            ELSE 'room' END AS waits_for
FROM processed_messages m LEFT JOIN leases USING (subscription, key);

-- The unfinished ones, found without the jobs that have ended. `is_claimed` is for
-- Postgres, which finds the running ones by it.
CREATE VIEW unfinished_jobs AS
SELECT job_id, task,
       CASE WHEN token IS NOT NULL
                 AND lease_until >= CAST(unixepoch('subsec') * 1000 AS INTEGER)
            THEN 'running'
            ELSE 'waiting' END AS state,
       token IS NOT NULL AS is_claimed
FROM leases;

CREATE VIEW job_ledger AS
SELECT subscription, key, id, at, worker, kind, attempt, message_id, detail FROM ledger;

CREATE VIEW job_attempts AS
SELECT m.job_id, attempts.attempt, attempts.worker, attempts.ended_at, attempts.outcome,
       attempts.log, attempts.series
FROM attempts JOIN processed_messages m USING (subscription, key);
