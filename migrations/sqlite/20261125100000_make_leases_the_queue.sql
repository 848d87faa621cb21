-- The queue: one small row per unfinished job, with everything that a sweep, a
-- takeover or a cancel reads. `run_after` is when a waiting job may run;
-- `lease_until` is when a running job's lease ends.
--
-- Expand: workers of the version before this one go on. They do not write the
-- new columns, so triggers fill them in. `lease_until` of a waiting job is still
-- written, because those workers read it.
ALTER TABLE leases ADD COLUMN job_id BLOB;
ALTER TABLE leases ADD COLUMN task TEXT;
-- The largest integer: an earlier job of its ordering key is unfinished.
ALTER TABLE leases ADD COLUMN run_after INTEGER;

CREATE TRIGGER fill_lease AFTER INSERT ON leases WHEN NEW.job_id IS NULL
BEGIN
    UPDATE leases
    SET run_after = NEW.lease_until, (job_id, task) = (
        SELECT m.job_id, m.task FROM processed_messages m
        WHERE m.subscription = NEW.subscription AND m.key = NEW.key)
    WHERE subscription = NEW.subscription AND key = NEW.key;
END;

-- A release or a retry by an earlier version.
CREATE TRIGGER fill_run_after AFTER UPDATE OF lease_until ON leases
WHEN NEW.token IS NULL AND NEW.lease_until <> OLD.lease_until AND NEW.run_after = OLD.run_after
     AND NEW.run_after < 9223372036854775807
BEGIN
    UPDATE leases SET run_after = NEW.lease_until
    WHERE subscription = NEW.subscription AND key = NEW.key;
END;

-- When a job of an ordering key leaves the queue, however it does, the next one
-- may run.
CREATE TRIGGER promote_next AFTER DELETE ON leases WHEN OLD.ordering_key IS NOT NULL
BEGIN
    UPDATE leases SET run_after = CAST(unixepoch('subsec') * 1000 AS INTEGER)
    WHERE run_after = 9223372036854775807
      AND (subscription, key) = (
          SELECT next.subscription, next.key FROM leases next
          WHERE next.subscription = OLD.subscription AND next.ordering_key = OLD.ordering_key
          ORDER BY next.position
          LIMIT 1);
END;
