"""Where tasks come from, and the table of their prompts."""

from .mixture import duplicates as duplicates
from .mixture import mix as mix
from .sources import Rows as Rows
from .sources import load as load
from .table import Dropped as Dropped
from .table import TaskTable as TaskTable
from .table import batch as batch
from .table import bucket_of as bucket_of
from .table import buckets as buckets
from .table import prepare as prepare
from .table import take as take
