"""Faults and bad input, tried for real: `make faults`, and with QUICK=1 a part of `make test-all`."""
