"""Results as data, tables, figures and pages."""
