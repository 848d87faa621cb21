-- Leases that ended without a word from their worker.
ALTER TABLE leases ADD COLUMN crashes INTEGER NOT NULL DEFAULT 0;
-- Milliseconds after a lease's end before a reaper may take the job over: none
-- once the message is acked, an ack deadline while Pub/Sub still has it.
ALTER TABLE leases ADD COLUMN reap_delay INTEGER NOT NULL DEFAULT 0;

-- What happened to each message, in order, for people. No state is read from
-- it. Its rows go with the job's.
CREATE TABLE ledger (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    subscription TEXT NOT NULL,
    key          TEXT NOT NULL,
    at           INTEGER NOT NULL,
    worker       TEXT NOT NULL,
    kind         TEXT NOT NULL CHECK (kind IN ('claimed', 'taken_over', 'suppressed',
                     'released', 'lease_lost', 'finished', 'parked', 'refused', 'acked')),
    attempt      INTEGER,
    -- Where it is another message's than the job's first.
    message_id   TEXT,
    detail       TEXT
) STRICT;

CREATE INDEX ledger_by_job ON ledger (subscription, key);
CREATE INDEX ledger_by_message_id ON ledger (message_id) WHERE message_id IS NOT NULL;
