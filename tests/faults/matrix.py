"""All rows, in their order."""

from tests.faults import coverage, damage, hostile, kills, numeric, owners, texts
from tests.faults.table import ROWS

ROOMS = (kills, damage, owners, texts, coverage, numeric, hostile)
ALL = dict(sorted(ROWS.items()))
