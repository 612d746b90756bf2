"""Data sets: found, checked, cut into shards and read by ranks."""

from hpclab.data.images import Images as Images
from hpclab.data.series import Series as Series
from hpclab.data.sets import Source as Source
from hpclab.data.sets import cache as cache
from hpclab.data.sets import fetch as fetch
from hpclab.data.sets import find as find
from hpclab.data.sets import load as load
from hpclab.data.sets import share as share
from hpclab.data.sets import verify as verify
from hpclab.data.sets import write as write
from hpclab.data.tables import table as table
from hpclab.data.text import Text as Text
