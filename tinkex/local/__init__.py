"""The training server: what `pip install tinkex[local]` adds. Imports none of its modules.

Sets how torch's threads wait for each other, which OpenMP reads once, when torch is first imported:
by sleeping, not by spinning. A thread that spins holds the core that the one it waits for needs:
on a machine with anything else to do (the client, say) that made training up to ten times slower.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
