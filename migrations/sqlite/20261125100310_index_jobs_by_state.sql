CREATE INDEX processed_messages_by_state ON processed_messages (state, job_id)
    WHERE state IN ('dead', 'cancelled');
