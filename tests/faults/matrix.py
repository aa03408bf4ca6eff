"""All rows, in their order."""

from tests.faults import coverage, damage, hostile, kills, numeric, owners, streams, texts
from tests.faults.table import ROWS

ROOMS = (kills, damage, owners, texts, coverage, numeric, hostile, streams)
ALL = dict(sorted(ROWS.items()))
