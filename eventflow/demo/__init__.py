"""`eventflow demo`: the main job in some seconds, on real parts, checking itself. The command line
has `play.demo`.

    play.py ─► stage.py ─► `eventflow serve shop.py` (app/shop.py, loaded by its path: eventflow knows no trigger)
       │                        ▲ HTTP, files, signals
       └─► proof.py ────────────┘ what must be true afterwards ─► report.py: the timeline, the sums, ok or BROKEN

One task is written to fail twice; the posts, the files, the kill -9 and the recovery are real.
"""
