"""The training engine, installed by `pip install tinkex[local]`. Imports none of its modules.

Sets how torch's threads wait for each other, which OpenMP reads once, when torch is first imported:
they spin for some microseconds, as between two consecutive products, then sleep. Spinning longer
would occupy cores that other threads need: on a machine with other load (such as the client)
training was up to ten times slower. Sleeping at once needs a wake-up for every product: a third
slower on an idle machine.

Also limits oneDNN's cache (see matmul.py). oneDNN sets up each product of a new shape, and keeps
the set-up with its working memory, by default for a thousand shapes, which took 8 GB. Too few are
slow as well: each layer repeats the shapes of a micro-batch, 114 with 8 texts in bfloat16, and if
they do not all fit, every layer prepares every product again (0.3 ms each, a tenth of a step).

Also lets torch ask for huge pages, where Linux gives them on request: the processor looks up the
address of each page that it reads, and a decoding step reads all weights (3 to 8 % faster).
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
for _cache, _shapes in (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256"), ("LRU_CACHE_CAPACITY", "64")):
    os.environ.setdefault(_cache, _shapes)
