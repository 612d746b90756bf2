"""Data sets: found, checked, cut into shards and read by ranks."""

from hpclab.data.images import Images as Images
from hpclab.data.images import Source as Source
from hpclab.data.images import cache as cache
from hpclab.data.images import fetch as fetch
from hpclab.data.images import find as find
from hpclab.data.images import load as load
from hpclab.data.images import share as share
from hpclab.data.images import verify as verify
from hpclab.data.shards import write as write
from hpclab.data.tables import table as table
