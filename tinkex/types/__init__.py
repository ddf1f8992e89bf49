"""The requests and results between a client and a training server.

Frozen attrs classes over numpy arrays, grouped by subject. They validate their data when they are
created. Imports no other part of tinkex. The public names in each module's `__all__` are the names
of this package.
"""

from tinkex.types.checks import *
from tinkex.types.data import *
from tinkex.types.losses import *
from tinkex.types.provenance import *
from tinkex.types.ready import *
from tinkex.types.rest import *
from tinkex.types.sampling import *
from tinkex.types.service import *
from tinkex.types.tensors import *
from tinkex.types.training import *
