-- The ledger, first form. Instants are microseconds; 0/1 are booleans; `state` and `kind` are the numbers of run.State and
-- journal.Kind. A `crc` is the CRC-32 of the columns that rows.py names, NULL once retention has dropped the payload.

CREATE TABLE ledger (                     -- one row: the last commit, and the sum of P9
    one              INTEGER PRIMARY KEY CHECK (one = 1),
    batch            INTEGER NOT NULL DEFAULT 0,
    at               INTEGER NOT NULL DEFAULT 0,
    epoch            INTEGER NOT NULL DEFAULT 0,
    accepted         INTEGER NOT NULL DEFAULT 0,
    completed        INTEGER NOT NULL DEFAULT 0,
    failed           INTEGER NOT NULL DEFAULT 0,
    dead             INTEGER NOT NULL DEFAULT 0,
    cancelled        INTEGER NOT NULL DEFAULT 0,
    suppressed       INTEGER NOT NULL DEFAULT 0,
    pending          INTEGER NOT NULL DEFAULT 0,
    events           INTEGER NOT NULL DEFAULT 0,
    duplicates       INTEGER NOT NULL DEFAULT 0,
    conflicts        INTEGER NOT NULL DEFAULT 0,
    runs             INTEGER NOT NULL DEFAULT 0,
    pending_bytes    INTEGER NOT NULL DEFAULT 0,
    pruned_completed INTEGER NOT NULL DEFAULT 0,
    pruned_failed    INTEGER NOT NULL DEFAULT 0,
    pruned_cancelled INTEGER NOT NULL DEFAULT 0,
    pruned_events    INTEGER NOT NULL DEFAULT 0,
    pruned_runs      INTEGER NOT NULL DEFAULT 0
);
INSERT INTO ledger (one) VALUES (1);

CREATE TABLE events (
    id                INTEGER PRIMARY KEY,
    key               BLOB NOT NULL,
    digest            BLOB NOT NULL,
    trigger           TEXT NOT NULL,
    event_id          TEXT NOT NULL,
    source            TEXT NOT NULL,
    type              TEXT NOT NULL,
    subject           TEXT,
    received_at       INTEGER NOT NULL,
    matched           INTEGER NOT NULL,             -- runs it started, also after those are pruned
    kept              INTEGER NOT NULL DEFAULT 1,   -- 0: retention dropped body and headers, the identity stays
    duplicates        INTEGER NOT NULL DEFAULT 0,
    last_duplicate_at INTEGER,
    conflicts         INTEGER NOT NULL DEFAULT 0,
    crc               INTEGER,
    verdicts          BLOB NOT NULL,
    headers           BLOB,
    body              BLOB
);
CREATE UNIQUE INDEX events_key ON events (key);
-- Grows at its end only, so it costs little; lists, look-ups by the sender's id and retention read it instead of the bodies.
CREATE INDEX events_scan ON events (id, received_at, kept, trigger, type, event_id);

CREATE TABLE runs (
    id               INTEGER PRIMARY KEY,
    flow             TEXT NOT NULL,
    subscription     TEXT NOT NULL,
    event            INTEGER,
    state            INTEGER NOT NULL,
    created_at       INTEGER NOT NULL,
    due_at           INTEGER NOT NULL,              -- 0: due at once, whatever the clock does; rows.NEVER: until woken
    started_at       INTEGER,
    finished_at      INTEGER,
    token            INTEGER NOT NULL,
    lane             TEXT,
    blocked          INTEGER NOT NULL,              -- 1: another live run of its lane goes first
    priority         INTEGER NOT NULL,
    parent           INTEGER,
    parent_claim     TEXT,
    depth            INTEGER NOT NULL,
    suspect          INTEGER NOT NULL,
    deaths           INTEGER NOT NULL,
    cancel_requested INTEGER NOT NULL,
    size             INTEGER NOT NULL,              -- bytes it adds to the backlog while live
    orphans          INTEGER,
    codec            TEXT,
    reason           TEXT,
    crc              INTEGER NOT NULL,
    outcome_crc      INTEGER,
    params           BLOB,
    result           BLOB,
    error            BLOB
);
CREATE INDEX runs_live ON runs (state, flow, priority DESC, due_at, id) WHERE state < 4 AND blocked = 0;
CREATE INDEX runs_lane ON runs (flow, lane, blocked, id) WHERE lane IS NOT NULL AND state < 4;
CREATE UNIQUE INDEX runs_child ON runs (parent, parent_claim) WHERE parent IS NOT NULL;
CREATE INDEX runs_event ON runs (event) WHERE event IS NOT NULL;
CREATE INDEX runs_unwell ON runs (state, id) WHERE state > 4;

CREATE INDEX runs_blobs ON runs (result) WHERE substr(codec, -5) = '@blob';

CREATE TABLE journal (
    run         INTEGER NOT NULL,
    claim       TEXT NOT NULL,
    attempt     INTEGER NOT NULL,
    kind        INTEGER NOT NULL,
    batch       INTEGER NOT NULL,
    pos         INTEGER NOT NULL,
    at          INTEGER NOT NULL,
    due_at      INTEGER,
    crc         INTEGER NOT NULL,
    codec       TEXT,
    fingerprint BLOB,
    value       BLOB,
    error       BLOB,
    PRIMARY KEY (run, claim, attempt, kind)
) WITHOUT ROWID;
CREATE INDEX journal_blobs ON journal (value) WHERE substr(codec, -5) = '@blob';

CREATE TABLE cursors (
    trigger TEXT NOT NULL,
    key     TEXT NOT NULL,
    value   BLOB NOT NULL,
    PRIMARY KEY (trigger, key)
) WITHOUT ROWID;

CREATE TABLE dead (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    event        INTEGER NOT NULL,
    subscription TEXT NOT NULL,
    reason       TEXT NOT NULL,
    at           INTEGER NOT NULL,
    redriven_at  INTEGER,
    body         BLOB                               -- the bytes as they came, when a redrive replaced the event's body
);
CREATE INDEX dead_event ON dead (event);

CREATE TABLE holds (
    trigger TEXT PRIMARY KEY,
    at      INTEGER NOT NULL
) WITHOUT ROWID;
