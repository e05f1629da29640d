-- Runs of a paused trigger have a state of their own (-1); HELD (3) is left to runs that a person must look at.

UPDATE runs SET state = -1 WHERE state < 4 AND state = 3 AND token = 0 AND reason IS NULL;

-- A pattern could match after its trigger was resumed, and its run was left behind.
UPDATE runs SET state = 0, due_at = 0 WHERE state < 4 AND state = -1
    AND NOT EXISTS (SELECT 1 FROM events e JOIN holds h ON h.trigger = e.trigger WHERE e.id = runs.event);

-- Standard terms for tables and columns.

ALTER TABLE ledger RENAME COLUMN one TO id;

ALTER TABLE runs RENAME COLUMN lane TO ordering_key;
ALTER TABLE runs RENAME COLUMN parent_claim TO parent_call_key;
ALTER TABLE runs RENAME COLUMN suspect TO crash_suspect;         -- 1: a crash left it in flight, and it has recorded nothing since
ALTER TABLE runs RENAME COLUMN deaths TO crash_count;            -- journaled attempt starts that nothing followed
ALTER TABLE runs RENAME COLUMN orphans TO unclaimed_entries;     -- journal entries that the completed flow did not ask for
DROP INDEX runs_lane;
CREATE INDEX runs_ordering ON runs (flow, ordering_key, blocked, id) WHERE ordering_key IS NOT NULL AND state < 4;

ALTER TABLE windows RENAME COLUMN lane TO ordering_key;

ALTER TABLE journal RENAME COLUMN claim TO call_key;
ALTER TABLE journal RENAME COLUMN pos TO position;

ALTER TABLE holds RENAME TO paused_triggers;
ALTER TABLE late RENAME TO late_runs;

ALTER TABLE members RENAME TO run_events;
DROP INDEX members_event;
CREATE INDEX run_events_event ON run_events (event);

ALTER TABLE facts RENAME TO pattern_events;
ALTER TABLE pattern_events RENAME COLUMN lapsed TO expired;
DROP INDEX facts_open;
CREATE INDEX pattern_events_open ON pattern_events (subscription, key) WHERE expired IS NULL;

ALTER TABLE dead RENAME TO dead_letters;
DROP INDEX dead_event;
DROP INDEX dead_open;
CREATE INDEX dead_letters_event ON dead_letters (event);
CREATE INDEX dead_letters_open ON dead_letters (id) WHERE redriven_at IS NULL;

ALTER TABLE outbox RENAME COLUMN outlet TO sink;
DROP INDEX outbox_outlet;
CREATE INDEX outbox_sink ON outbox (sink, id);
