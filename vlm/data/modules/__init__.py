"""The three DataModules and their base."""
