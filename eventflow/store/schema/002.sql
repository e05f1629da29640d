-- What sinks still have to be given: one row for an event and an outlet, or for a dead letter (of this event and subscription)
-- and an outlet, written in the transaction that records it and deleted once the sink has it.

CREATE TABLE outbox (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,   -- the order in which an outlet sends
    outlet       TEXT NOT NULL,
    event        INTEGER NOT NULL,
    subscription TEXT,                                -- NULL: the event itself
    at           INTEGER NOT NULL
);
CREATE INDEX outbox_outlet ON outbox (outlet, id);
CREATE INDEX outbox_event ON outbox (event);
