-- Four digits have few values, so the index stays small; people give eight.
CREATE INDEX processed_messages_by_last_digits
    ON processed_messages (lower(substr(hex(job_id), -4)));
