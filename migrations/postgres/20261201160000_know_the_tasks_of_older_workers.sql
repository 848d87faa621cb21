-- Workers of versions that do not write known_tasks may know each task that was ever run.
-- For a day, during which they are replaced, its jobs are not given up. By itself, as it
-- reads all jobs once; it locks none.
INSERT INTO known_tasks AS known (subscription, task, known_until)
SELECT subscription, task, now() + interval '1 day' FROM (
    SELECT subscription, task FROM processed_messages WHERE task IS NOT NULL AND attempts > 0
    UNION
    SELECT subscription, task FROM known_tasks
) AS may_be_known
ORDER BY subscription, task
ON CONFLICT (subscription, task) DO UPDATE
SET known_until = greatest(known.known_until, excluded.known_until);
