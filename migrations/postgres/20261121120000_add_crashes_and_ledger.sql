ALTER TABLE leases
    -- Leases that ended without a word from their worker.
    ADD COLUMN crashes integer NOT NULL DEFAULT 0,
    -- Seconds after a lease's end before a reaper may take the job over: none
    -- once the message is acked, an ack deadline while Pub/Sub still has it.
    ADD COLUMN reap_delay double precision NOT NULL DEFAULT 0;

-- What happened to each message, in order, for people. No state is read from
-- it. Its rows go with the job's.
CREATE TABLE ledger (
    subscription text COLLATE "C" NOT NULL,
    key          text COLLATE "C" NOT NULL,
    id           bigint GENERATED ALWAYS AS IDENTITY,
    at           timestamptz NOT NULL DEFAULT now(),
    worker       text NOT NULL,
    kind         text NOT NULL CHECK (kind IN ('claimed', 'taken_over', 'suppressed',
                     'released', 'lease_lost', 'finished', 'parked', 'refused', 'acked')),
    attempt      integer,
    -- Where it is another message's than the job's first.
    message_id   text COLLATE "C",
    detail       text,
    PRIMARY KEY (subscription, key, id)
);

CREATE INDEX ledger_by_message_id ON ledger (message_id) WHERE message_id IS NOT NULL;
