"""Run folders to text, tables and HTML. No torch."""
