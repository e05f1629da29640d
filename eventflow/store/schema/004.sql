-- Patterns over several events: what is open of each, per key, and the events that wait in it.

CREATE TABLE patterns (
    subscription TEXT NOT NULL,
    key          TEXT NOT NULL,      -- '' without one
    due_at       INTEGER NOT NULL,   -- when it must be asked if nothing comes; rows.NEVER: not at all, or its code is not there
    open         INTEGER NOT NULL,   -- events that wait in it: deliveries that are pending and in no run
    crc          INTEGER NOT NULL,
    state        BLOB,
    PRIMARY KEY (subscription, key)
) WITHOUT ROWID;
CREATE INDEX patterns_due ON patterns (due_at);

CREATE TABLE facts (                 -- events that wait in a pattern, and those that matched nothing; a match takes its own away
    event        INTEGER NOT NULL,
    subscription TEXT NOT NULL,
    key          TEXT NOT NULL,
    size         INTEGER NOT NULL,
    lapsed       TEXT,               -- why it matched nothing; NULL while it waits
    PRIMARY KEY (event, subscription)
) WITHOUT ROWID;
CREATE INDEX facts_open ON facts (subscription, key) WHERE lapsed IS NULL;
