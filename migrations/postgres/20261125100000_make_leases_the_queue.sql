-- The queue: one small row per unfinished job, with everything that a sweep, a
-- takeover or a cancel reads. `run_after` is when a waiting job may run;
-- `lease_until` is when a running job's lease ends.
--
-- Expand: workers of the version before this one go on. They do not write the
-- new columns, so triggers fill them in. `lease_until` of a waiting job is still
-- written, because those workers read it.
ALTER TABLE leases
    ADD COLUMN job_id uuid,
    ADD COLUMN task text COLLATE "C",
    -- 'infinity': an earlier job of its ordering key is unfinished.
    ADD COLUMN run_after timestamptz;

CREATE FUNCTION trainyard_fill_lease() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    SELECT m.job_id, m.task INTO NEW.job_id, NEW.task
    FROM processed_messages m
    WHERE m.subscription = NEW.subscription AND m.key = NEW.key;
    NEW.run_after := NEW.lease_until;
    RETURN NEW;
END $$;

CREATE TRIGGER fill_lease BEFORE INSERT ON leases
    FOR EACH ROW WHEN (NEW.job_id IS NULL) EXECUTE FUNCTION trainyard_fill_lease();

CREATE FUNCTION trainyard_fill_run_after() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.run_after := NEW.lease_until;
    RETURN NEW;
END $$;

-- A release or a retry by an earlier version.
CREATE TRIGGER fill_run_after BEFORE UPDATE OF lease_until ON leases
    FOR EACH ROW WHEN (NEW.token IS NULL AND NEW.lease_until IS DISTINCT FROM OLD.lease_until
                       AND NEW.run_after IS NOT DISTINCT FROM OLD.run_after
                       AND NEW.run_after IS DISTINCT FROM 'infinity')
    EXECUTE FUNCTION trainyard_fill_run_after();

-- When a job of an ordering key leaves the queue, however it does, the next one
-- may run. A trigger, because its queries see what was committed while the
-- deleting statement waited for the row. The next job may be leaving as well:
-- then the update waits for that, changes nothing, and the one behind it is next.
CREATE FUNCTION trainyard_promote_next() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    next record;
BEGIN
    LOOP
        SELECT subscription, key, run_after INTO next FROM leases
        WHERE subscription = OLD.subscription AND ordering_key = OLD.ordering_key
        ORDER BY position
        LIMIT 1;
        EXIT WHEN NOT FOUND OR next.run_after < 'infinity';
        UPDATE leases SET run_after = now()
        WHERE subscription = next.subscription AND key = next.key AND run_after = 'infinity';
        EXIT WHEN FOUND;
    END LOOP;
    RETURN NULL;
END $$;

CREATE TRIGGER promote_next AFTER DELETE ON leases
    FOR EACH ROW WHEN (OLD.ordering_key IS NOT NULL) EXECUTE FUNCTION trainyard_promote_next();
