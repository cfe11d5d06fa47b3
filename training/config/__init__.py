"""All that a user can choose: fields that are options, bounds and defaults. Imports no torch."""
