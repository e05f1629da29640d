-- Runs over several events: `runs.event` is the first, `members` the later ones; `windows` tells which run an event may join.

ALTER TABLE runs ADD COLUMN mode TEXT;                              -- NULL: one event, one run
ALTER TABLE runs ADD COLUMN deliveries INTEGER NOT NULL DEFAULT 1;  -- events in it: what it counts for in the sum of P9

CREATE TABLE members (
    run   INTEGER NOT NULL,
    event INTEGER NOT NULL,
    PRIMARY KEY (run, event)
) WITHOUT ROWID;
CREATE INDEX members_event ON members (event);

CREATE TABLE windows (
    subscription TEXT NOT NULL,
    lane         TEXT NOT NULL,      -- '' without a key
    run          INTEGER NOT NULL,   -- the last window; closed once that run has begun, ended, or is full
    count        INTEGER NOT NULL,
    opened_at    INTEGER NOT NULL,
    PRIMARY KEY (subscription, lane)
) WITHOUT ROWID;
CREATE INDEX windows_run ON windows (run);
