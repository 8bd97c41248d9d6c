"""How a benchmark case is opened, checked against float64 and timed."""
