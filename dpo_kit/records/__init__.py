"""The run folder, where the rooms meet: what is written there, by whom, and how it is read. No torch."""
