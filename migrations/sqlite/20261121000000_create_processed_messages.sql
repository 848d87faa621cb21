-- The guard and the record: one row per (subscription, key), written when a
-- message is first claimed or refused and once more when its job ends.
-- Times are milliseconds since 1970, by the database's clock.
CREATE TABLE processed_messages (
    subscription TEXT NOT NULL,
    key          TEXT NOT NULL,
    job_id       BLOB NOT NULL UNIQUE,
    message_id   TEXT NOT NULL,
    publish_time INTEGER NOT NULL,
    ordering_key TEXT NOT NULL,
    attributes   TEXT NOT NULL,
    -- The message's data as published; NULL once its retention is over.
    payload      BLOB,
    -- NULL: the message named no task that could be read.
    task         TEXT,
    received_at  INTEGER NOT NULL,
    -- `open` exactly while a row of the same key stands in leases.
    state        TEXT NOT NULL CHECK (state IN ('open', 'succeeded', 'dead', 'cancelled')),
    duplicates   INTEGER NOT NULL DEFAULT 0,
    -- These are written with the final state.
    attempts     INTEGER NOT NULL DEFAULT 0,
    worker       TEXT,
    started_at   INTEGER,
    finished_at  INTEGER,
    -- The lease token of the run that ended the job: tells a worker that lost
    -- the answer to its commit whether it was the one.
    finished_by  BLOB,
    error        TEXT,
    result       TEXT,
    PRIMARY KEY (subscription, key)
) STRICT;

CREATE INDEX processed_messages_by_message_id ON processed_messages (message_id);

-- The live part of an unfinished job.
CREATE TABLE leases (
    subscription  TEXT NOT NULL,
    key           TEXT NOT NULL,
    -- Executions begun; the growing part of the fence.
    attempt       INTEGER NOT NULL,
    -- Attempts that a worker's own shutdown cut short.
    interruptions INTEGER NOT NULL DEFAULT 0,
    -- NULL: no worker holds the job.
    token         BLOB,
    worker        TEXT NOT NULL,
    started_at    INTEGER NOT NULL,
    lease_until   INTEGER NOT NULL,
    PRIMARY KEY (subscription, key)
) STRICT;
