"""Journal entries in a transaction: which calls have an end or a child run already, and the entries
to write.

Called by apply.py and admin.py; `Transaction.flush` writes. An entry gets its batch, position and
time here.
"""

from collections.abc import Iterable, Sequence

from eventflow.runs.journal import Entry
from eventflow.runs.run import Run
from eventflow.store import rows
from eventflow.store.commit import Commit
from eventflow.store.rows import Values

CallName = tuple[int, str]
"""A run and the key of one of its calls."""


class JournalRows:
    """The journal entries of one transaction.

    `finals`: calls that have an end; `children`: calls that have a child run.
    """

    def __init__(self, commit: Commit) -> None:
        self.finals: set[CallName] = set()
        self.children: set[CallName] = set()
        self.unseen: set[int] = set()  # runs with entries that their flow may not have seen
        self.must_probe = False  # whether an entry may be in the ledger already (see `Writer`)
        self._commit = commit
        self._entries: list[Values] = []
        self._position = 0

    def add(self, run: int, entry: Entry) -> Entry:
        """Numbers the entry and adds it; an `at` that is given stays."""
        commit = self._commit
        entry.batch = commit.batch
        entry.position = self._position
        entry.at = entry.at or commit.at
        self._position += 1
        self._entries.append(rows.entry_row(run, entry))
        self.unseen.add(run)
        return entry

    def load_children(self, children: Iterable[Run]) -> None:
        """Reads which of these child runs their parents have started already."""
        calls = [(child.parent, child.parent_call_key) for child in children]
        for text in rows.known_children.read(self._commit.connection, calls):
            self.children.update(rows.decode_pairs(text))

    def load_finals(self, calls: Sequence[CallName]) -> None:
        """Reads which of these calls have an end already."""
        for text in rows.finals.read(self._commit.connection, calls):
            self.finals.update(rows.decode_pairs(text))

    def load_unseen(self, suspensions: Sequence[tuple[int, int, int]]) -> None:
        """Reads which runs have entries after the batch, or more entries, than the run has seen:
        (run, batch, entries).
        """
        for text in rows.later_entries.read(self._commit.connection, suspensions):
            self.unseen.update(rows.decode_ids(text))

    def has_any(self, run: int, entries: Sequence[Entry]) -> bool:
        """Whether the ledger has one of these entries already, or two of them are the same."""
        names = [(run, entry.call_key, entry.attempt, int(entry.kind)) for entry in entries]
        if len(set(names)) < len(names):
            return True
        return any(rows.known_entries.read(self._commit.connection, names))

    def forget_calls(self, run: int) -> None:
        """This run's calls have no child and no end any more."""
        self.children = {call for call in self.children if call[0] != run}
        self.finals = {call for call in self.finals if call[0] != run}

    def flush(self) -> None:
        if self._entries:
            rows.insert_entries.execute(self._commit.connection, self._entries)
            self._entries.clear()
