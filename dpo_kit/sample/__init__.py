"""The embedded sample of preference pairs, and the script that made it; see README.md beside this."""
