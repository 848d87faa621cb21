-- What people read: the same columns on every database. Times are milliseconds
-- since 1970.
CREATE VIEW jobs AS
SELECT m.job_id, m.subscription, m.key, m.message_id, m.task, m.duplicates, m.reason,
       m.state AS stored_state,
       right(m.job_id::text, 4) AS last_digits,
       replace(m.job_id::text, '-', '') AS digits,
       nullif(m.ordering_key, '') AS ordering_key,
       CASE WHEN m.state <> 'open' THEN m.state
            WHEN leases.token IS NOT NULL AND leases.lease_until >= now() THEN 'running'
            ELSE 'waiting' END AS state,
       coalesce(leases.attempt - leases.interruptions, m.attempts) AS attempts,
       coalesce(leases.worker, m.worker) AS worker,
       coalesce(leases.checkpoint, m.checkpoint) AS checkpoint,
       coalesce(m.error, leases.last_error) AS error,
       m.result::text AS result,
       (extract(epoch FROM m.publish_time) * 1000)::bigint AS publish_time,
       (extract(epoch FROM m.received_at) * 1000)::bigint AS received_at,
       (extract(epoch FROM coalesce(leases.started_at, m.started_at)) * 1000)::bigint AS started_at,
       (extract(epoch FROM m.finished_at) * 1000)::bigint AS finished_at,
       CASE WHEN leases.token IS NULL AND leases.run_after < 'infinity'
                 AND leases.run_after > now()
            THEN (extract(epoch FROM leases.run_after) * 1000)::bigint END AS waits_until,
       CASE WHEN leases.token IS NOT NULL OR leases.key IS NULL THEN NULL
            WHEN leases.run_after = 'infinity' THEN 'turn'
            WHEN leases.unknown_since IS NOT NULL THEN 'task'
            WHEN leases.run_after > now() THEN 'attempt'
            ELSE 'room' END AS waits_for
FROM processed_messages m LEFT JOIN leases USING (subscription, key);

-- The unfinished ones, found without the jobs that have ended. The condition of a
-- running job does not tell that its token is set, so `is_claimed` lets a statement say
-- it, and read the index of those.
CREATE VIEW unfinished_jobs AS
SELECT job_id, task,
       CASE WHEN token IS NOT NULL AND lease_until >= now() THEN 'running'
            ELSE 'waiting' END AS state,
       token IS NOT NULL AS is_claimed
FROM leases;

CREATE VIEW job_ledger AS
SELECT subscription, key, id, (extract(epoch FROM at) * 1000)::bigint AS at, worker, kind, attempt,
       message_id, detail
FROM ledger;

CREATE VIEW job_attempts AS
SELECT m.job_id, attempts.attempt, attempts.worker,
       (extract(epoch FROM attempts.ended_at) * 1000)::bigint AS ended_at, attempts.outcome,
       attempts.log::text AS log, attempts.series::text AS series
FROM attempts JOIN processed_messages m USING (subscription, key);
