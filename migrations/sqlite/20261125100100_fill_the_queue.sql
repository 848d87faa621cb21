-- A job behind another of its ordering key gets a time, too: what is written from
-- here could be out of date by now, and the order is looked at in any case.
UPDATE leases
SET job_id = m.job_id, task = m.task, run_after = leases.lease_until
FROM processed_messages m
WHERE m.subscription = leases.subscription AND m.key = leases.key AND leases.job_id IS NULL;
