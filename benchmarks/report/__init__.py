"""What was measured, as data, tables, figures and pages."""
