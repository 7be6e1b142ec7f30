"""Files and settings that people met elsewhere, by topic."""
