"""What the collector of cycles need not look at: everything that is there when a process has started.

Importing torch and transformers makes a million objects. Looking at them all takes the collector 0.2 s, in the middle of
a step or of everybody's streams.
"""

from __future__ import annotations

import gc


def keep_for_good() -> None:
    """Leave what exists now out of all later collections. For processes of quire's own; not for a user's program."""
    gc.freeze()
