"""The store: events, runs, journals. protocol.py declares its verbs, sqlite.py implements them on
one SQLite file, url.py turns a URL into a store.
"""
