-- Which tasks live workers know. Each worker moves `known_until` of its own on; while no
-- worker does, the task's jobs wait, and in the end are given up.
CREATE TABLE known_tasks (
    subscription text COLLATE "C" NOT NULL,
    task         text COLLATE "C" NOT NULL,
    known_until  timestamptz      NOT NULL,
    PRIMARY KEY (subscription, task)
);

-- Workers of the version before this one do not write that table. During a roll-out
-- their jobs are not given up.
INSERT INTO known_tasks (subscription, task, known_until)
SELECT DISTINCT subscription, task, now() + interval '1 hour' FROM leases
WHERE unknown_since IS NULL;

-- Those workers would give up the jobs that they do not know and that wait for a worker of
-- this version. Contract: drop the column and the trigger when none of them is left.
UPDATE leases SET unknown_since = NULL WHERE unknown_since IS NOT NULL;

CREATE FUNCTION trainyard_clear_unknown_since() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.unknown_since := NULL;
    RETURN NEW;
END $$;

CREATE TRIGGER clear_unknown_since BEFORE INSERT ON leases
    FOR EACH ROW WHEN (NEW.unknown_since IS NOT NULL)
    EXECUTE FUNCTION trainyard_clear_unknown_since();

-- Since when the job waits, if it has never run.
ALTER TABLE leases ADD COLUMN queued_at timestamptz NOT NULL DEFAULT now();

DROP INDEX leases_of_unknown_tasks;

CREATE OR REPLACE VIEW jobs AS
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
       CASE WHEN leases.key IS NULL OR leases.token IS NOT NULL AND leases.lease_until >= now()
                 THEN NULL
            WHEN leases.token IS NULL AND leases.run_after = 'infinity' THEN 'turn'
            WHEN NOT EXISTS (
                    SELECT 1 FROM known_tasks
                    WHERE known_tasks.subscription = leases.subscription
                      AND known_tasks.task = leases.task AND known_until > now()) THEN 'task'
            WHEN leases.token IS NOT NULL THEN 'takeover'
            WHEN leases.run_after > now() THEN 'attempt'
            ELSE 'room' END AS waits_for
FROM processed_messages m LEFT JOIN leases USING (subscription, key);

-- The tasks of waiting jobs that no live worker knows.
CREATE VIEW unknown_tasks AS
SELECT subscription, task, count(*) AS jobs
FROM leases
WHERE (token IS NULL OR lease_until < now())
  AND NOT EXISTS (
      SELECT 1 FROM known_tasks
      WHERE known_tasks.subscription = leases.subscription
        AND known_tasks.task = leases.task AND known_until > now())
GROUP BY subscription, task;
