-- By itself: it reads the whole table, and claims wait meanwhile.
-- Four digits have few values, so the index stays small; people give eight.
CREATE INDEX processed_messages_by_last_digits ON processed_messages (right(job_id::text, 4));
CREATE INDEX processed_messages_by_state ON processed_messages (state, job_id)
    WHERE state IN ('dead', 'cancelled');
