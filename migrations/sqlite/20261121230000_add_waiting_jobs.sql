-- A job may wait in the table, held by no worker: for its turn within an
-- ordering key, for its next attempt, or for a worker that knows its task or
-- has room for it. Then `lease_until` is when it may run.
CREATE TABLE new_leases (
    subscription     TEXT NOT NULL,
    key              TEXT NOT NULL,
    -- Executions begun; the growing part of the fence.
    attempt          INTEGER NOT NULL,
    -- Attempts that a worker's own shutdown cut short.
    interruptions    INTEGER NOT NULL DEFAULT 0,
    -- Leases that ended without a word from their worker.
    crashes          INTEGER NOT NULL DEFAULT 0,
    -- NULL: no worker holds the job.
    token            BLOB,
    -- NULL: no attempt has begun.
    worker           TEXT,
    started_at       INTEGER,
    lease_until      INTEGER NOT NULL,
    -- Milliseconds after a lease's end before a reaper may take the job over:
    -- none once the message is acked, an ack deadline while Pub/Sub still has it.
    reap_delay       INTEGER NOT NULL DEFAULT 0,
    -- NULL: none. Jobs with one ordering key run in order of their position.
    ordering_key     TEXT,
    position         INTEGER NOT NULL DEFAULT 0,
    -- Where the last attempt's work is kept, in the task's own words.
    checkpoint       TEXT,
    -- Why the last attempt failed.
    last_error       TEXT,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    -- Since when no worker that got the message knew its task.
    unknown_since    INTEGER,
    PRIMARY KEY (subscription, key)
) STRICT;

INSERT INTO new_leases (subscription, key, attempt, interruptions, crashes, token, worker,
                        started_at, lease_until, reap_delay, ordering_key, position)
SELECT subscription, key, attempt, interruptions, crashes, token, leases.worker,
       leases.started_at, lease_until, reap_delay, nullif(messages.ordering_key, ''),
       leases.rowid
FROM leases JOIN processed_messages messages USING (subscription, key);

DROP TABLE leases;
ALTER TABLE new_leases RENAME TO leases;

CREATE INDEX leases_by_ordering_key ON leases (subscription, ordering_key, position)
    WHERE ordering_key IS NOT NULL;

-- Why the job is dead, as one word for programs; `error` is for people.
ALTER TABLE processed_messages ADD COLUMN reason TEXT;
ALTER TABLE processed_messages ADD COLUMN checkpoint TEXT;
-- The fence's attempt when the job ended: a retry goes on from it.
ALTER TABLE processed_messages ADD COLUMN last_attempt INTEGER NOT NULL DEFAULT 0;
-- The topic that the dead message is still to be published to, and when it may
-- be tried (again); NULL: at once.
ALTER TABLE processed_messages ADD COLUMN dead_letter_topic TEXT;
ALTER TABLE processed_messages ADD COLUMN dead_letter_due INTEGER;

CREATE TABLE new_ledger (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    subscription TEXT NOT NULL,
    key          TEXT NOT NULL,
    at           INTEGER NOT NULL,
    worker       TEXT NOT NULL,
    -- Of these kinds none is checked: they are for people.
    kind         TEXT NOT NULL,
    attempt      INTEGER,
    -- Where it is another message's than the job's first.
    message_id   TEXT,
    detail       TEXT
) STRICT;

INSERT INTO new_ledger SELECT * FROM ledger;
DROP TABLE ledger;
ALTER TABLE new_ledger RENAME TO ledger;

CREATE INDEX ledger_by_job ON ledger (subscription, key);
CREATE INDEX ledger_by_message_id ON ledger (message_id) WHERE message_id IS NOT NULL;
