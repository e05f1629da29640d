-- The schema of a new store, as the numbered files make it of an empty one (a test compares both). A
-- change of the schema is a new numbered file, and the same change here.
--
-- Instants and durations are microseconds; 0/1 are booleans. `state` and `kind` are the numbers of
-- run.State and journal.Kind. A `crc` is the CRC-32 of the columns that rows.py names, NULL once
-- retention has removed the payload.

CREATE TABLE ledger (                    -- one row: the last commit, and the sum of P9
    id               INTEGER PRIMARY KEY CHECK (id = 1),
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
INSERT INTO ledger (id) VALUES (1);

CREATE TABLE events (
    id                INTEGER PRIMARY KEY,
    key               BLOB NOT NULL,              -- digest of (trigger, source, id)
    digest            BLOB NOT NULL,              -- of the content, to find conflicts
    trigger           TEXT NOT NULL,
    event_id          TEXT NOT NULL,              -- the sender's
    source            TEXT NOT NULL,
    type              TEXT NOT NULL,
    subject           TEXT,
    received_at       INTEGER NOT NULL,
    matched           INTEGER NOT NULL,           -- runs that it started, pruned ones included
    kept              INTEGER NOT NULL DEFAULT 1, -- 0: retention removed body and headers
    duplicates        INTEGER NOT NULL DEFAULT 0,
    last_duplicate_at INTEGER,
    conflicts         INTEGER NOT NULL DEFAULT 0,
    crc               INTEGER,
    verdicts          BLOB NOT NULL,
    headers           BLOB,
    body              BLOB
);
-- Begins with the sender's id: ids that grow (offsets, dates, counters, ULIDs, UUIDv7) change few
-- pages of this index in a commit, however many events there are; digests alone would spread.
CREATE UNIQUE INDEX events_key ON events (substr(event_id, 1, 16), key);
-- Grows at its end only. Lists, look-ups by the sender's id and retention read it, not the bodies.
CREATE INDEX events_scan ON events (id, received_at, kept, trigger, type, event_id);

CREATE TABLE runs (
    id                INTEGER PRIMARY KEY,
    flow              TEXT NOT NULL,
    subscription      TEXT NOT NULL,
    event             INTEGER,                    -- of several events, the first
    state             INTEGER NOT NULL,
    created_at        INTEGER NOT NULL,
    due_at            INTEGER NOT NULL,           -- 0: due at once; rows.NEVER: until woken
    started_at        INTEGER,
    finished_at       INTEGER,
    token             INTEGER NOT NULL,           -- fencing token: increases with each claim
    ordering_key      TEXT,
    blocked           INTEGER NOT NULL,           -- 1: an earlier run of its ordering key is live
    priority          INTEGER NOT NULL,
    parent            INTEGER,
    parent_call_key   TEXT,
    depth             INTEGER NOT NULL,
    crash_suspect     INTEGER NOT NULL,           -- 1: in flight during a crash, nothing recorded since
    crash_count       INTEGER NOT NULL,           -- recorded starts of attempts without a record after
    cancel_requested  INTEGER NOT NULL,
    size              INTEGER NOT NULL,           -- bytes of the backlog while it is live
    unclaimed_entries INTEGER,                    -- entries that the completed flow did not ask for
    codec             TEXT,
    reason            TEXT,
    crc               INTEGER NOT NULL,
    outcome_crc       INTEGER,
    params            BLOB,
    result            BLOB,
    error             BLOB,
    mode              TEXT,                       -- of delivery; NULL: one event, one run
    deliveries        INTEGER NOT NULL DEFAULT 1  -- events in it, as the sum of P9 counts them
);
CREATE INDEX runs_live ON runs (state, flow, priority DESC, due_at, id) WHERE state < 4 AND blocked = 0;
CREATE INDEX runs_ordering ON runs (flow, ordering_key, blocked, id)
    WHERE ordering_key IS NOT NULL AND state < 4;
CREATE UNIQUE INDEX runs_child ON runs (parent, parent_call_key) WHERE parent IS NOT NULL;
CREATE INDEX runs_event ON runs (event) WHERE event IS NOT NULL;
CREATE INDEX runs_unwell ON runs (state, id) WHERE state > 4;
CREATE INDEX runs_flow ON runs (flow, id);
CREATE INDEX runs_blobs ON runs (result) WHERE substr(codec, -5) = '@blob';

CREATE TABLE run_events (                -- the later events of a run that has several
    run   INTEGER NOT NULL,
    event INTEGER NOT NULL,
    PRIMARY KEY (run, event)
) WITHOUT ROWID;
CREATE INDEX run_events_event ON run_events (event);

CREATE TABLE journal (
    run         INTEGER NOT NULL,
    call_key    TEXT NOT NULL,
    attempt     INTEGER NOT NULL,
    kind        INTEGER NOT NULL,
    batch       INTEGER NOT NULL,        -- the commit that recorded it
    position    INTEGER NOT NULL,        -- in that commit
    at          INTEGER NOT NULL,
    due_at      INTEGER,
    crc         INTEGER NOT NULL,
    codec       TEXT,
    fingerprint BLOB,                    -- of the call's arguments
    value       BLOB,
    error       BLOB,
    after       INTEGER,                 -- the batch that the flow had received when it made the call
    waited      INTEGER,                 -- from the call, or the attempt's due time, to the body
    took        INTEGER,                 -- from the start of the body to its end
    PRIMARY KEY (run, call_key, attempt, kind)
) WITHOUT ROWID;
CREATE INDEX journal_blobs ON journal (value) WHERE substr(codec, -5) = '@blob';

CREATE TABLE cursors (
    trigger TEXT NOT NULL,
    key     TEXT NOT NULL,
    value   BLOB NOT NULL,
    PRIMARY KEY (trigger, key)
) WITHOUT ROWID;

CREATE TABLE dead_letters (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    event        INTEGER NOT NULL,
    subscription TEXT NOT NULL,
    reason       TEXT NOT NULL,
    at           INTEGER NOT NULL,
    redriven_at  INTEGER,
    body         BLOB                    -- the received bytes, if a redrive replaced the event's body
);
CREATE INDEX dead_letters_event ON dead_letters (event);
CREATE INDEX dead_letters_open ON dead_letters (id) WHERE redriven_at IS NULL;

CREATE TABLE paused_triggers (
    trigger TEXT PRIMARY KEY,
    at      INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE outbox (                    -- what sinks must still receive; deleted once it is sent
    id           INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of sending
    sink         TEXT NOT NULL,
    event        INTEGER NOT NULL,
    subscription TEXT,                   -- of a dead letter; NULL: the event itself
    at           INTEGER NOT NULL
);
CREATE INDEX outbox_sink ON outbox (sink, id);
CREATE INDEX outbox_event ON outbox (event);

CREATE TABLE windows (                   -- the last delivery window of a subscription and key
    subscription TEXT NOT NULL,
    ordering_key TEXT NOT NULL,          -- '' without a key
    run          INTEGER NOT NULL,       -- closed once this run has started, ended, or is full
    count        INTEGER NOT NULL,
    opened_at    INTEGER NOT NULL,
    PRIMARY KEY (subscription, ordering_key)
) WITHOUT ROWID;
CREATE INDEX windows_run ON windows (run);

CREATE TABLE patterns (                  -- the open state of a pattern, per key
    subscription TEXT NOT NULL,
    key          TEXT NOT NULL,          -- '' without a key
    due_at       INTEGER NOT NULL,       -- of its next timer; rows.NEVER: none, or its code is gone
    open         INTEGER NOT NULL,       -- events that wait in it: pending deliveries without a run
    crc          INTEGER NOT NULL,
    state        BLOB,
    PRIMARY KEY (subscription, key)
) WITHOUT ROWID;
CREATE INDEX patterns_due ON patterns (due_at);

CREATE TABLE pattern_events (            -- events that wait in a pattern, or matched nothing
    event        INTEGER NOT NULL,
    subscription TEXT NOT NULL,
    key          TEXT NOT NULL,
    size         INTEGER NOT NULL,
    expired      TEXT,                   -- why it matched nothing; NULL while it waits
    PRIMARY KEY (event, subscription)
) WITHOUT ROWID;
CREATE INDEX pattern_events_open ON pattern_events (subscription, key) WHERE expired IS NULL;

CREATE TABLE late_runs (                 -- late-run events that were sent, one per run and `after`
    run   INTEGER NOT NULL,
    after INTEGER NOT NULL,              -- 0: retried after its end; earlier due times do not count
    at    INTEGER NOT NULL,
    PRIMARY KEY (run, after)
) WITHOUT ROWID;
