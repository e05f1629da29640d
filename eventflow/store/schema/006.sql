-- By the beginning of the sender's id first: of ids that grow (offsets, dates, counters, ULIDs, UUIDv7) a commit then touches a few
-- pages of this index, however many events there are; digests alone touch a page for each event.

DROP INDEX events_key;
CREATE UNIQUE INDEX events_key ON events (substr(event_id, 1, 16), key);
