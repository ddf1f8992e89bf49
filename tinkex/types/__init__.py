"""Everything that travels between a client and a training server.

Frozen attrs classes over numpy arrays, grouped by subject. They check their data when they are
made. Imports no other part of tinkex. Each module lists its public names in `__all__`; they are
the names of this package.
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
