"""The training engine, installed by `pip install tinkex[local]`. Imports none of its modules.

Sets how torch's threads wait for each other, which OpenMP reads once, when torch is first imported:
by spinning for some microseconds, as between two products that follow each other, then by sleeping.
A thread that spins on holds the core that the one it waits for needs: on a machine with anything
else to do (the client, say) that made training up to ten times slower. One that sleeps at once has
to be woken for every product: a third slower on a machine with nothing else to do.

And how much oneDNN keeps (see matmul.py). It prepares a product of a new shape, and keeps what it
prepared, working memory and all: of a thousand shapes, by default, which came to 8 GB. Too few are
slow as well: each layer repeats the shapes of a micro-batch, 114 with 8 texts in bfloat16, and if
they do not all fit, every layer prepares every product again (0.3 ms each, a tenth of a step).
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
for _cache, _shapes in (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256"), ("LRU_CACHE_CAPACITY", "64")):
    os.environ.setdefault(_cache, _shapes)
