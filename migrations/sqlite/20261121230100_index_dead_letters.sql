CREATE INDEX processed_messages_dead_letters ON processed_messages (finished_at)
    WHERE dead_letter_topic IS NOT NULL;
