"""What a run did, as tables for people and as plain values for programs: one subject a file, imported from there."""
