-- The guard and the record: one row per (subscription, key), written when a
-- message is first claimed or refused and once more when its job ends.
CREATE TABLE processed_messages (
    subscription text COLLATE "C" NOT NULL,
    key          text COLLATE "C" NOT NULL,
    job_id       uuid NOT NULL UNIQUE,
    message_id   text COLLATE "C" NOT NULL,
    publish_time timestamptz NOT NULL,
    ordering_key text NOT NULL,
    -- json, not jsonb, here and below: jsonb refuses the escape of a NUL.
    attributes   json NOT NULL,
    -- The message's data as published; NULL once its retention is over.
    payload      bytea,
    -- NULL: the message named no task that could be read.
    task         text,
    received_at  timestamptz NOT NULL DEFAULT now(),
    -- `open` exactly while a row of the same key stands in leases.
    state        text NOT NULL CHECK (state IN ('open', 'succeeded', 'dead', 'cancelled')),
    duplicates   integer NOT NULL DEFAULT 0,
    -- These are written with the final state.
    attempts     integer NOT NULL DEFAULT 0,
    worker       text,
    started_at   timestamptz,
    finished_at  timestamptz,
    -- The lease token of the run that ended the job: tells a worker that lost
    -- the answer to its commit whether it was the one.
    finished_by  uuid,
    error        text,
    result       json,
    PRIMARY KEY (subscription, key)
) WITH (fillfactor = 85);

CREATE INDEX processed_messages_by_message_id ON processed_messages (message_id);

-- The live part of an unfinished job. Small, and without any index on what a
-- renewal changes, so that renewals stay heap-only (HOT) updates.
CREATE TABLE leases (
    subscription  text COLLATE "C" NOT NULL,
    key           text COLLATE "C" NOT NULL,
    -- Executions begun; the growing part of the fence.
    attempt       integer NOT NULL,
    -- Attempts that a worker's own shutdown cut short.
    interruptions integer NOT NULL DEFAULT 0,
    -- NULL: no worker holds the job.
    token         uuid,
    worker        text NOT NULL,
    started_at    timestamptz NOT NULL,
    lease_until   timestamptz NOT NULL,
    PRIMARY KEY (subscription, key)
) WITH (fillfactor = 50);
