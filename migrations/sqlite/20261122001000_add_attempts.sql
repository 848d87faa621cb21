-- What an attempt has told about itself, for people. No state is read from it.
-- Its rows go with the job's.
CREATE TABLE attempts (
    subscription TEXT NOT NULL,
    key          TEXT NOT NULL,
    attempt      INTEGER NOT NULL,
    worker       TEXT NOT NULL,
    ended_at     INTEGER NOT NULL,
    outcome      TEXT NOT NULL,
    -- The last lines of its output, and its progress reports, thinned.
    log          TEXT NOT NULL,
    series       TEXT NOT NULL,
    PRIMARY KEY (subscription, key, attempt)
) STRICT;
