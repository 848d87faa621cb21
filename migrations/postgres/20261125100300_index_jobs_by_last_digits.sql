-- no-transaction
-- Concurrently, so that no claim waits while the whole table is read. Four digits
-- have few values, so the index stays small; people give eight.
CREATE INDEX CONCURRENTLY IF NOT EXISTS processed_messages_by_last_digits
    ON processed_messages (right(job_id::text, 4));
