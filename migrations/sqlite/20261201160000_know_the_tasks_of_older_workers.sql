-- Workers of versions that do not write known_tasks may know each task that was ever run.
-- For a day, during which they are replaced, its jobs are not given up.
INSERT INTO known_tasks (subscription, task, known_until)
SELECT subscription, task, CAST(unixepoch('subsec') * 1000 AS INTEGER) + 86400000 FROM (
    SELECT subscription, task FROM processed_messages WHERE task IS NOT NULL AND attempts > 0
    UNION
    SELECT subscription, task FROM known_tasks
) AS may_be_known
WHERE true
ON CONFLICT (subscription, task) DO UPDATE
SET known_until = max(known_until, excluded.known_until);
