"""How a cell is opened, checked against float64 and timed."""
