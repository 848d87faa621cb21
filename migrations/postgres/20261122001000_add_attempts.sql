-- What an attempt has told about itself, for people. No state is read from it.
-- Its rows go with the job's.
CREATE TABLE attempts (
    subscription text COLLATE "C" NOT NULL,
    key          text COLLATE "C" NOT NULL,
    attempt      integer NOT NULL,
    worker       text NOT NULL,
    ended_at     timestamptz NOT NULL DEFAULT now(),
    outcome      text NOT NULL,
    -- The last lines of its output, and its progress reports, thinned.
    log          json NOT NULL,
    series       json NOT NULL,
    PRIMARY KEY (subscription, key, attempt)
);
