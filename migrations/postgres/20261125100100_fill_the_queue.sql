-- By itself: the lock that adding columns takes is given back before.
UPDATE leases
SET job_id = m.job_id, task = m.task,
    run_after = CASE
        WHEN leases.ordering_key IS NOT NULL AND EXISTS (
            SELECT 1 FROM leases earlier
            WHERE earlier.subscription = leases.subscription
              AND earlier.ordering_key = leases.ordering_key
              AND earlier.position < leases.position) THEN 'infinity'
        ELSE leases.lease_until END
FROM processed_messages m
WHERE m.subscription = leases.subscription AND m.key = leases.key AND leases.job_id IS NULL;
