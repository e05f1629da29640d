-- Lists: the runs of one flow, however rare it is (each flow's part grows at its end only), and the dead letters that are open,
-- however many were redriven.

CREATE INDEX runs_flow ON runs (flow, id);
CREATE INDEX dead_open ON dead (id) WHERE redriven_at IS NULL;
