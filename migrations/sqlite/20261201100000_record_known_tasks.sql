-- Which tasks live workers know. Each worker moves `known_until` of its own on; while no
-- worker does, the task's jobs wait, and in the end are given up.
CREATE TABLE known_tasks (
    subscription TEXT    NOT NULL,
    task         TEXT    NOT NULL,
    known_until  INTEGER NOT NULL,
    PRIMARY KEY (subscription, task)
) STRICT, WITHOUT ROWID;

-- Workers of the version before this one do not write that table. During a roll-out
-- their jobs are not given up.
INSERT INTO known_tasks (subscription, task, known_until)
SELECT DISTINCT subscription, task, CAST(unixepoch('subsec') * 1000 AS INTEGER) + 3600000
FROM leases WHERE unknown_since IS NULL;

-- Those workers would give up the jobs that they do not know and that wait for a worker of
-- this version. Contract: drop the column and the trigger when none of them is left.
UPDATE leases SET unknown_since = NULL WHERE unknown_since IS NOT NULL;

-- Since when the job waits, if it has never run.
ALTER TABLE leases ADD COLUMN queued_at INTEGER;
UPDATE leases SET queued_at = CAST(unixepoch('subsec') * 1000 AS INTEGER);

-- Those workers do not write it.
CREATE TRIGGER fill_queued_at AFTER INSERT ON leases WHEN NEW.queued_at IS NULL
BEGIN
    UPDATE leases
    SET queued_at = CAST(unixepoch('subsec') * 1000 AS INTEGER), unknown_since = NULL
    WHERE subscription = NEW.subscription AND key = NEW.key;
END;

DROP INDEX leases_of_unknown_tasks;

DROP VIEW jobs;
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
       CASE WHEN leases.key IS NULL
                 OR leases.token IS NOT NULL
                    AND leases.lease_until >= CAST(unixepoch('subsec') * 1000 AS INTEGER)
                 THEN NULL
            WHEN leases.token IS NULL AND leases.run_after = 9223372036854775807 THEN 'turn'
            WHEN NOT EXISTS (
                    SELECT 1 FROM known_tasks
                    WHERE known_tasks.subscription = leases.subscription
                      AND known_tasks.task = leases.task
                      AND known_until > CAST(unixepoch('subsec') * 1000 AS INTEGER)) THEN 'task'
            WHEN leases.token IS NOT NULL THEN 'takeover'
            WHEN leases.run_after > CAST(unixepoch('subsec') * 1000 AS INTEGER) THEN 'attempt'
            ELSE 'room' END AS waits_for
FROM processed_messages m LEFT JOIN leases USING (subscription, key);

-- The tasks of waiting jobs that no live worker knows.
CREATE VIEW unknown_tasks AS
SELECT subscription, task, count(*) AS jobs
FROM leases
WHERE (token IS NULL OR lease_until < CAST(unixepoch('subsec') * 1000 AS INTEGER))
  AND NOT EXISTS (
      SELECT 1 FROM known_tasks
      WHERE known_tasks.subscription = leases.subscription
        AND known_tasks.task = leases.task
        AND known_until > CAST(unixepoch('subsec') * 1000 AS INTEGER))
GROUP BY subscription, task;
