-- Runs that were told of as late. A run is told of once for each `after` that somebody names.

CREATE TABLE late (
    run   INTEGER NOT NULL,
    after INTEGER NOT NULL,   -- microseconds; 0: the run had ended when a person retried it, so what was due by then is not told
    at    INTEGER NOT NULL,   -- when it was told, or retried
    PRIMARY KEY (run, after)
) WITHOUT ROWID;
