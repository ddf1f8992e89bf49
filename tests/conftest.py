"""What holds for all tests."""

from __future__ import annotations

import signal

# Started in the background (`make test &`), a shell has Ctrl-C ignored, and what we start inherits
# that; but what Ctrl-C does is among what is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
