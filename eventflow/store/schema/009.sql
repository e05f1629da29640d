-- What a timeline of a run needs, on the entries that end an attempt; NULL on others and on those of an earlier version. They are
-- part of the row's checksum where they are not NULL.

ALTER TABLE journal ADD COLUMN after INTEGER;    -- the batch that the flow had received last when it made the call
ALTER TABLE journal ADD COLUMN waited INTEGER;   -- microseconds from the call, or the due time of the attempt, to the start of the body
ALTER TABLE journal ADD COLUMN took INTEGER;     -- microseconds from the start of the body to its end
